"""The pages of the demos, without a browser: what their buttons call is called directly, and one is served."""

from __future__ import annotations

import re
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from rlhf.errors import UserError
from rlhf.flags import parse
from rlhf.rollouts import Sampling
from tests.demo_runs import Pace, load, make_runs

TURNS = [
    {"role": "user", "content": "Are snails slow?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "How slow?"},
]
CONTROLS = (0, 1, 0, 12, 5)
"""Greedy, twelve tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_runs(tmp_path_factory.mktemp("runs"))


def test_flags():
    chat, summarize = load("chat"), load("summarize")
    flags = parse(chat.ChatFlags, ["--experiment_dir", "a", "b", "--experiment_dir=c", "--port=80", "--top_k=5"])
    assert (flags.experiment_dir, flags.port, flags.top_k) == (["a", "b", "c"], 80, 5)
    for flags_class in (chat.ChatFlags, summarize.SummarizeFlags):
        assert parse(flags_class, ["--experiment_dir=a"]).host == "127.0.0.1"


@pytest.mark.parametrize(
    "wrong",
    [{"port": 0}, {"top_p": 0.0}, {"temperature": -1.0}, {"top_k": -1}, {"keep_loaded": 0}, {"max_new_tokens": 0}],
)
def test_flags_that_can_not_be_used(wrong):
    serving = load("serving")
    with pytest.raises(UserError, match=next(iter(wrong))):
        serving.ServingFlags(experiment_dir=["a"], **wrong)


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(device):
    serving = load("serving")
    with pytest.raises(UserError, match=f"--device={device}"):
        serving.Models(serving.ServingFlags(experiment_dir=[], device=device))


def test_controls_become_sampling():
    sampling_of = load("page").sampling_of
    assert sampling_of(0.7, 0.9, 20, 64, 3) == Sampling(64, 0.7, 20, 0.9, True, (), 3)
    assert not sampling_of(0, 0.9, 20, 64, 3).do_sample
    whole = sampling_of(2, 1, 0, 64, 3)  # a page sends 2.0 as 2, which transformers does not take for a temperature
    assert (type(whole.temperature), type(whole.top_p)) == (float, float)
    drawn = {sampling_of(1, 1, 0, 64, seed).seed for seed in (-1, None, -1)}
    assert len(drawn) == 3
    assert min(drawn) >= 0
    with pytest.raises(UserError, match="seed"):
        sampling_of(1, 1, 0, 64, 2.0**70)


def test_errors_are_shown_as_text():
    shown = load("page").failure(UserError("<b>x</b> is gone"))
    assert "&lt;b&gt;x&lt;/b&gt; is gone" in shown
    assert "<b>" not in shown


def test_without_gradio_a_page_is_refused_in_one_sentence(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("page", "chat"):  # first set, so that what is loaded here leaves with the test even if it is the first
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    chat = load("chat")
    with pytest.raises(UserError, match=r"pip install -e \.\[demo\]"):
        chat.build(chat.ChatFlags(experiment_dir=[str(folder / "dpo")]))


def test_gradio_is_told_to_record_and_fetch_nothing():
    pytest.importorskip("gradio")
    page, serving = load("page"), load("serving")
    options = page.mount_options(serving.ServingFlags(experiment_dir=[]))
    assert not any(options[name] for name in ("run_history", "enable_monitoring", "mcp_server", "ssr_mode", "pwa"))
    assert page.os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not any(options["theme"]._stylesheets)


def page_of(name: str, folder: Path, **flags):
    """A built page; its handlers by name, and its components by what the handlers call them."""
    pytest.importorskip("gradio")
    module = load(name)
    flags_class = module.ChatFlags if name == "chat" else module.SummarizeFlags
    blocks = module.build(flags_class(experiment_dir=[str(folder)], **flags))
    return blocks, {fn.fn.__name__: fn.fn for fn in blocks.fns.values() if fn.fn is not None}


@pytest.fixture
def pace(monkeypatch) -> Pace:
    return Pace(monkeypatch)


class Page:
    """What a browser shows: the last update of each component, by the kind of component."""

    def __init__(self, session: str = "s") -> None:
        self.request = SimpleNamespace(session_hash=session)
        self.shown: dict[str, Any] = {}

    def take(self, update: dict) -> None:
        for component, value in update.items():
            key = component.elem_id or type(component).__name__
            self.shown[key] = value.value if hasattr(value, "get_block_name") else value

    def chat(self) -> list[tuple[str, str]]:
        return [(turn["role"], turn["content"][0]["text"]) for turn in self.shown["chat"]]


def test_chat_streams_and_keeps_the_conversation(folder, pace):
    _, on = page_of("chat", folder / "dpo")
    page = Page()
    sizes = []
    for update in on["send"]("Hi", [], "dpo · final", page.request, *CONTROLS):
        page.take(update)
        pace.go()
        sizes.append(len(page.chat()[-1][1]) if "chat" in page.shown else 0)
    assert page.chat()[0] == ("user", "Hi")
    assert page.chat()[1][0] == "assistant"
    assert len(set(sizes)) > 4
    assert "dpo · final: 12 tokens" in page.shown["status"]
    assert "Human/Assistant turns" in page.shown["status"]
    history = page.shown["State"]
    pace.go(50)
    assert [turn["role"] for turn in history] == ["user", "assistant"]
    for update in on["send"]("Again", history, "sft · final, the start of dpo", page.request, *CONTROLS):
        page.take(update)
    assert page.shown["status"].startswith("<p>sft · final")
    assert page.shown["Textbox"] == (
        f"\n\nHuman: Hi\n\nAssistant: {history[1]['content']}\n\nHuman: Again\n\nAssistant:"
    )
    assert [role for role, _ in page.chat()] == ["user", "assistant"] * 2


@pytest.mark.parametrize("button", ["stop", "forget"])
def test_chat_stops_for_its_button_and_when_the_page_is_closed(folder, pace, button):
    _, on = page_of("chat", folder / "dpo")
    page, other = Page("mine"), Page("other's")
    num = 0
    for update in on["send"]("Hi", [], "dpo · final", page.request, 1, 1, 0, 400, 5):
        page.take(update)
        pace.go()
        num += len(page.shown.get("chat", [])) == 2
        if num == 4:
            on[button](other.request)
        if num == 8:
            on[button](page.request)
            pace.go(400)
    assert num == 10, "after the button, the last part and the line below it"
    assert "stopped" in page.shown["status"]
    assert page.chat()[-1][0] == "assistant"


def test_chat_gives_a_message_back_that_could_not_be_answered(folder, monkeypatch, capsys):
    _, on = page_of("chat", folder / "dpo")
    page = Page()
    for update in on["send"]("x" * 900, [], "dpo · final", page.request, *CONTROLS):
        page.take(update)
    assert 'class="error"' in page.shown["status"]
    assert "shorten it" in page.shown["status"]
    assert (page.chat(), page.shown["State"], page.shown["message"]) == ([], [], "x" * 900)
    monkeypatch.setattr(load("serving").Models, "get", lambda *_: 1 / 0)
    for update in on["send"]("Hi", [], "dpo · final", page.request, *CONTROLS):
        page.take(update)
    assert "ZeroDivisionError" in page.shown["status"]
    assert (page.shown["State"], page.shown["message"]) == ([], "Hi")
    assert "Traceback" in capsys.readouterr().err
    for update in on["send"]("  ", [], "dpo · final", page.request, *CONTROLS):
        page.take(update)
    assert "Write a message first" in page.shown["status"]


def test_chat_retries_undoes_and_clears(folder):
    _, on = page_of("chat", folder / "dpo")
    page = Page()
    turns = [*TURNS, {"role": "assistant", "content": "Very."}]
    for update in on["retry"](turns, "dpo · final", SimpleNamespace(index=2), page.request, *CONTROLS):
        page.take(update)
    assert page.shown["State"][:3] == TURNS
    assert page.shown["State"][3]["content"] != "Very."
    page.take(on["undo"](turns, SimpleNamespace(index=2)))
    assert (page.shown["State"], page.shown["message"]) == (TURNS[:2], "How slow?")
    page.take(on["clear"](page.request))
    assert (page.chat(), page.shown["State"], page.shown["message"]) == ([], [], "")


def test_summaries_stream_and_errors_are_shown(folder, pace):
    _, on = page_of("summarize", folder / "dpo")
    page = Page()
    texts = []
    for update in on["summarize"]("", "A car", "I lent it.", "dpo · final", page.request, *CONTROLS):
        page.take(update)
        pace.go()
        texts.append(page.shown.get("summary"))
    assert len(set(texts)) > 4
    assert page.shown["summary"]
    assert page.shown["Textbox"] == "TITLE: A car\nPOST: I lent it.\nTL;DR:"
    assert "12 tokens" in page.shown["status"]
    for update in on["summarize"]("", "", "x" * 900, "dpo · final", page.request, *CONTROLS):
        page.take(update)
    assert 'class="error"' in page.shown["status"]


def test_a_page_is_served_on_this_machine_alone_and_fetches_nothing_from_elsewhere(folder):
    """What the page loads comes from its server, which answers to no other name; a taken port is one sentence."""
    blocks, _ = page_of("chat", folder / "dpo")
    page, flags = load("page"), load("chat").ChatFlags(experiment_dir=[str(folder / "dpo")], port=free_port())
    assert not blocks.analytics_enabled
    server, listener = page.server_of(blocks, flags)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert listener.getsockname() == ("127.0.0.1", flags.port)
        html = urlopen(f"http://127.0.0.1:{flags.port}/").read().decode()
        fetched = re.findall(r'<(?:script|link)[^>]*(?:src|href)="([^"]*)"', html)
        assert fetched
        assert not [address for address in fetched if address.startswith(("http", "//"))]
        renamed = Request(f"http://127.0.0.1:{flags.port}/", headers={"Host": "elsewhere.example"})
        with pytest.raises(HTTPError, match="400"):
            urlopen(renamed)
        with pytest.raises(UserError, match=f"--port={flags.port}"):
            page.server_of(blocks, flags)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
    assert not blocks.share


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
