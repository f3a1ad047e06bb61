"""The demos: which models a page offers, how their prompts are written, answers that stream and stop, the pages.

No browser here: what the pages' buttons call is called directly, and served once on this machine.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import socket
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
import torch

from rlhf.data.formats import format_of, render_prompt
from rlhf.data.text import encode_prompt
from rlhf.errors import UserError
from rlhf.flags import parse
from rlhf.rollouts import Sampling
from tests.splits import make_model_dir, tokenizer_for

DEMOS = Path(__file__).resolve().parents[1] / "demos"
TURNS = [
    {"role": "user", "content": "Are snails slow?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "How slow?"},
]
DIALOGUE = "\n\nHuman: Are snails slow?\n\nAssistant: Yes.\n\nHuman: How slow?\n\nAssistant:"


@pytest.fixture(autouse=True)
def _found_as_scripts(monkeypatch):
    """The modules of demos/ import each other as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(DEMOS))


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny SFT experiment from a pretrained folder, and a DPO experiment that went on from it."""
    root = tmp_path_factory.mktemp("runs")
    make_model_dir(root / "base")
    data = {"stages": {"finetune": {"format": format_of("dialogue", tokenizer_for())}}}
    for seed, (name, args) in enumerate(
        {
            "sft": {"model_name": str(root / "base"), "sft_experiment_dir": None},
            "dpo": {"model_name": None, "sft_experiment_dir": "sft"},
        }.items(),
        start=1,
    ):
        run = root / name
        for place in ("final", "checkpoints/best/model", "checkpoints/step-00000020/model"):
            make_model_dir(run / place, seed=seed)
        (run / "checkpoints" / "step-00000100").mkdir()
        (run / "checkpoints" / "last").symlink_to("step-00000020")
        best = {"step": 10, "metric": "val/loss", "value": 1.25}
        (run / "checkpoints" / "best" / "best.json").write_text(json.dumps(best))
        (run / "args.json").write_text(json.dumps({**args, "data_dir": str(root / "nowhere")}))
        (run / "data.json").write_text(json.dumps(data))
    return root


@pytest.fixture(scope="module")
def loaded(folder):
    sys.path.insert(0, str(DEMOS))
    try:
        serving, checkpoints = load("serving"), load("checkpoints")
    finally:
        sys.path.remove(str(DEMOS))
    (checkpoint,) = checkpoints.find_checkpoints([str(folder / "base")])
    return serving.Models(serving.ServingFlags(experiment_dir=[])).get(checkpoint)


def answers(loaded, sampling, *, stop=None, stop_texts=(), prompt="Snails?"):
    return list(load("serving").reply(loaded, prompt, sampling, stop or threading.Event(), stop_texts))


# Which models there are


def test_an_experiment_lists_its_checkpoints_and_what_it_started_from(folder):
    """A step without a model (one that is being written) is left out, and so is the link `last`."""
    found = load("checkpoints").find_checkpoints([str(folder / "dpo")])
    dpo, sft = folder / "dpo", folder / "sft"
    assert [(c.label, Path(c.source)) for c in found] == [
        ("dpo · final", dpo / "final"),
        ("dpo · best (step 10, val/loss 1.25)", dpo / "checkpoints/best/model"),
        ("dpo · step 20", dpo / "checkpoints/step-00000020/model"),
        ("sft · final, the start of dpo", sft / "final"),
        ("base · pretrained, the start of sft", folder / "base"),
    ]
    assert {c.format["kind"] for c in found} == {"dialogue"}


def test_several_experiments_are_listed_once_each(folder):
    """The SFT final is listed under its own name, not again as where DPO started."""
    found = load("checkpoints").find_checkpoints([str(folder / "dpo"), str(folder / "sft")])
    labels = [c.label for c in found]
    assert labels[0] == "dpo · final"
    assert labels[3] == "sft · final"
    assert labels[6:] == ["base · pretrained, the start of sft"]
    assert len({Path(c.source).resolve() for c in found}) == len(found) == 7


def test_experiments_of_one_name_are_told_apart(folder, tmp_path):
    make_model_dir(tmp_path / "dpo")
    found = load("checkpoints").find_checkpoints([str(folder / "dpo"), str(tmp_path / "dpo")])
    assert found[0].label == f"{folder / 'dpo'} · final"
    assert found[3].label == str(tmp_path / "dpo")


def test_a_hub_id_is_a_model_of_its_own():
    (found,) = load("checkpoints").find_checkpoints(["someone/some-model"])
    assert (found.label, found.source, found.format) == ("someone/some-model", "someone/some-model", None)


@pytest.mark.parametrize("part", ["final", "checkpoints/best/model"])
def test_a_model_folder_inside_an_experiment_knows_its_format(folder, part):
    (found,) = load("checkpoints").find_checkpoints([str(folder / "dpo" / part)])
    assert found.format["kind"] == "dialogue"


def test_the_format_comes_from_the_data_folder_where_the_experiment_has_none(tmp_path):
    format = format_of("plain", tokenizer_for(), "Question: {prompt}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "args.json").write_text(json.dumps({"stages": {"preference": {"format": format}}}))
    (tmp_path / "args.json").write_text(json.dumps({"data_dir": str(tmp_path / "data")}))
    assert load("checkpoints").recorded_format(tmp_path) == format
    assert load("checkpoints").recorded_format(tmp_path / "data" / "..") == format
    assert load("checkpoints").recorded_format(tmp_path / "elsewhere") is None


def test_a_start_that_is_gone_is_left_out(folder, tmp_path, capsys):
    make_model_dir(tmp_path / "run" / "final")
    (tmp_path / "run" / "args.json").write_text(json.dumps({"model_name": str(tmp_path / "gone")}))
    found = load("checkpoints").find_checkpoints([str(tmp_path / "run")])
    assert [c.label for c in found] == ["run · final"]
    assert "gone" in capsys.readouterr().out


def test_sources_that_are_no_model_are_refused(folder, tmp_path):
    make_model_dir(tmp_path / "rm" / "final", scorer=True)
    (tmp_path / "rm" / "args.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "args.json").write_text("{")
    find = load("checkpoints").find_checkpoints
    for source, sentence in [
        (tmp_path / "rm", "holds a reward model"),
        (tmp_path / "rm" / "final", "holds a reward model"),
        (tmp_path, "holds no model"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "broken", "can't be read|holds no model"),
    ]:
        with pytest.raises(UserError, match=sentence):
            find([str(source)])


# How prompts are written


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        ("dialogue", DIALOGUE),
        (
            "chat_template",
            "<|im_start|>user\nAre snails slow?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
            "<|im_start|>user\nHow slow?<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("plain", "How slow?"),
    ],
    ids=["dialogue", "chat_template", "plain"],
)
def test_chat_writes_prompts_as_the_data_does(loaded, kind, prompt):
    chat, checkpoint = load("chat"), load("checkpoints").Checkpoint
    recorded = checkpoint("x", "x", format_of(kind, loaded.tokenizer))
    format = chat.chat_format(chat.ChatFlags(experiment_dir=[]), recorded, loaded)
    assert render_prompt(format, TURNS, loaded.tokenizer) == prompt
    told = chat.chat_format(chat.ChatFlags(experiment_dir=[], format=kind), checkpoint("x", "x"), loaded)
    assert told == format


def test_a_model_of_unknown_data_gets_its_chat_template_or_else_turns(loaded):
    serving = load("serving")
    assert serving.default_format(loaded.tokenizer)["kind"] == "chat_template"
    bare = tokenizer_for(pad_is_eos=True)
    template, bare.chat_template = bare.chat_template, None
    try:
        assert serving.default_format(bare)["kind"] == "dialogue"
    finally:
        bare.chat_template = template


def test_chat_refuses_models_of_summaries_unless_told_how(loaded):
    chat = load("chat")
    summary = load("checkpoints").Checkpoint("tldr · final", "x", format_of("summary", loaded.tokenizer))
    with pytest.raises(UserError, match=r"demos/summarize\.py"):
        chat.refuse_summaries(chat.ChatFlags(experiment_dir=[]), [summary])
    chat.refuse_summaries(chat.ChatFlags(experiment_dir=[], format="dialogue"), [summary])


def test_summaries_get_the_prompt_of_the_data(loaded):
    summarize, checkpoint = load("summarize"), load("checkpoints").Checkpoint
    dialogue = checkpoint("x", "x", format_of("dialogue", loaded.tokenizer))
    format = summarize.summary_format(dialogue, loaded)
    assert summarize.summary_prompt(format, " I lent it {title}.\n", "My car", "r/advice") == (
        "SUBREDDIT: r/advice\nTITLE: My car\nPOST: I lent it {title}.\nTL;DR:"
    )
    assert summarize.summary_prompt(format, "I lent it.", "", "") == "POST: I lent it.\nTL;DR:"
    own = {**format, "template": "{post}\nShort:"}
    assert summarize.summary_format(checkpoint("x", "x", own), loaded) == own


# Answers


def test_an_answer_grows_to_what_generate_gives(loaded):
    """Greedy: the text of the last part is that of transformers' own generate, and each part begins the next."""
    ids = torch.tensor([encode_prompt(loaded.tokenizer, "Snails?")])
    out = loaded.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=list(loaded.end_ids))
    expected = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    parts = answers(loaded, Sampling(max_new_tokens=12, do_sample=False))
    assert parts[-1].text == expected
    assert (parts[-1].num_tokens, parts[-1].ended) == (12, "length limit")
    assert len(parts) > 2
    assert not any(part.ended for part in parts[:-1])
    for before, after in pairwise(parts):
        assert after.text.startswith(before.text.rstrip())


def test_one_seed_gives_one_answer(loaded):
    texts = [answers(loaded, Sampling(max_new_tokens=10, seed=seed))[-1].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stopping_ends_within_a_token_or_two(loaded):
    """The event is set after the third part; what the model has computed by then is at most a token ahead."""
    stop, computed = threading.Event(), []
    handle = loaded.model.register_forward_hook(lambda *_: computed.append(1))
    try:
        parts = []
        for part in load("serving").reply(loaded, "Snails?", Sampling(max_new_tokens=400), stop):
            parts.append(part)
            if len(parts) == 3:
                seen = len(computed)
                stop.set()
    finally:
        handle.remove()
    assert parts[-1].ended == "stopped"
    assert parts[-1].num_tokens == parts[2].num_tokens
    assert len(computed) <= seen + 2


def test_closing_an_answer_ends_the_computation_and_lets_the_next_one_start(loaded):
    stream = load("serving").reply(loaded, "Snails?", Sampling(max_new_tokens=400), threading.Event())
    next(stream)
    stream.close()
    threads = [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]
    assert not any(thread.is_alive() for thread in threads)
    assert answers(loaded, Sampling(max_new_tokens=2))[-1].num_tokens <= 2


def test_an_answer_waits_for_another_one_and_can_be_stopped_while_it_waits(loaded):
    first = load("serving").reply(loaded, "Snails?", Sampling(max_new_tokens=400), threading.Event())
    next(first)
    stop = threading.Event()
    stop.set()
    (part,) = answers(loaded, Sampling(), stop=stop)
    assert (part.num_tokens, part.ended) == (0, "stopped")
    first.close()


def test_a_stop_text_ends_the_answer_and_is_not_shown(loaded):
    """The stop text is the middle of what a greedy answer says without it."""
    whole = answers(loaded, Sampling(max_new_tokens=12, do_sample=False))[-1].text
    middle = whole[len(whole) // 2 :][:4]
    parts = answers(loaded, Sampling(max_new_tokens=12, do_sample=False), stop_texts=["\n\nHuman:", middle])
    assert parts[-1].text == whole[: whole.index(middle)].strip()
    assert parts[-1].ended == "end of turn"
    assert parts[-1].num_tokens < 12
    assert not any(middle in part.text for part in parts)


def test_a_control_token_among_the_stop_texts_ends_the_answer(loaded):
    """It never shows up in the text, so its id must end the answer: here the one that greedy sampling gives first."""
    ids = torch.tensor([encode_prompt(loaded.tokenizer, "Snails?")])
    first = int(loaded.model(ids).logits[0, -1].argmax())
    tokenizer = make_control(loaded.tokenizer, first)
    other = dataclasses.replace(loaded, tokenizer=tokenizer)
    sampling = Sampling(max_new_tokens=5, do_sample=False)
    assert answers(other, sampling)[-1].num_tokens == 5
    (*_, last) = answers(other, sampling, stop_texts=[tokenizer.convert_ids_to_tokens(first)])
    assert (last.text, last.num_tokens, last.ended) == ("", 1, "end of turn")


def make_control(tokenizer, index: int):
    """A copy of the tokenizer in which one token is a control token."""
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    copy.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(index)]})
    return copy


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Water it.\n\nHum", "Water it."),
        (" Water it.\n", "Water it."),
        (" Caf\ufffd", "Caf"),
        (" Water it.\n\nHumus", "Water it.\n\nHumus"),
    ],
    ids=["half", "start", "character", "other"],
)
def test_half_a_stop_text_and_half_a_character_are_held_back(text, shown):
    assert load("serving")._settled(text, ["\n\nHuman:"]) == shown


def test_a_prompt_longer_than_the_context_is_refused_and_a_long_one_gets_what_is_left(loaded):
    """The tiny model reads 512 tokens."""
    with pytest.raises(UserError, match="reads 512 with its answer"):
        answers(loaded, Sampling(), prompt="x" * 600)
    ids = len(encode_prompt(loaded.tokenizer, "Z" * 505))
    last = answers(loaded, Sampling(max_new_tokens=50, do_sample=False), prompt="Z" * 505)[-1]
    assert (last.num_tokens, last.ended) == (512 - ids, "context full")


def test_a_failure_of_the_model_is_one_sentence_and_the_next_answer_starts(loaded):
    def fail(*_):
        raise RuntimeError("out of memory\nat line 3")

    handle = loaded.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(UserError, match=r"^the model failed \(RuntimeError: out of memory\)$"):
            answers(loaded, Sampling(max_new_tokens=4))
    finally:
        handle.remove()
    assert answers(loaded, Sampling(max_new_tokens=1))[-1].ended


def test_models_used_last_stay_in_memory_and_rewritten_ones_are_read_again(folder, tmp_path):
    serving, checkpoint = load("serving"), load("checkpoints").Checkpoint
    models = serving.Models(serving.ServingFlags(experiment_dir=[], keep_loaded=2))
    a, b = (checkpoint(name, str(folder / name / "final")) for name in ("sft", "dpo"))
    c = checkpoint("c", make_model_dir(tmp_path / "c"))
    first = models.get(a)
    models.get(b)
    assert models.get(a) is first
    models.get(c)
    assert (models.has(a), models.has(b), models.has(c)) == (True, False, True)
    old = models.get(c).model.get_input_embeddings().weight.clone()
    make_model_dir(tmp_path / "c", seed=5)
    assert not models.has(c)
    assert not torch.equal(models.get(c).model.get_input_embeddings().weight, old)


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path):
    serving, checkpoint = load("serving"), load("checkpoints").Checkpoint
    models = serving.Models(serving.ServingFlags(experiment_dir=[]))
    make_model_dir(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="write or copy it again"):
        models.get(checkpoint("c", str(tmp_path / "c")))


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("bf16-true", torch.bfloat16)])
def test_precision(folder, precision, dtype):
    serving, checkpoint = load("serving"), load("checkpoints").Checkpoint
    models = serving.Models(serving.ServingFlags(experiment_dir=[], device="cpu", precision=precision))
    assert models.get(checkpoint("x", str(folder / "base"))).model.dtype == dtype


# Flags and pages


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
        serving.check_serving(serving.ServingFlags(experiment_dir=[], **wrong))


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(device):
    serving = load("serving")
    with pytest.raises(UserError, match=f"--device={device}"):
        serving.Models(serving.ServingFlags(experiment_dir=[], device=device))


def test_controls_become_sampling():
    sampling_of = load("page").sampling_of
    assert sampling_of(0.7, 0.9, 20, 64, 3) == Sampling(64, 0.7, 20, 0.9, True, (), 3)
    assert not sampling_of(0, 0.9, 20, 64, 3).do_sample
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
    monkeypatch.delitem(sys.modules, "page", raising=False)
    monkeypatch.delitem(sys.modules, "chat", raising=False)
    chat = load("chat")
    with pytest.raises(UserError, match=r"pip install -e \.\[demo\]"):
        chat.build(chat.ChatFlags(experiment_dir=[str(folder / "dpo")]))
    monkeypatch.delitem(sys.modules, "page")
    monkeypatch.delitem(sys.modules, "chat")


def test_gradio_is_told_to_share_and_fetch_nothing():
    pytest.importorskip("gradio")
    page, serving = load("page"), load("serving")
    options = page.launch_options(serving.ServingFlags(experiment_dir=[]))
    assert options["server_name"] == "127.0.0.1"
    assert not any(options[name] for name in ("share", "inbrowser", "run_history", "enable_monitoring", "mcp_server"))
    assert page.os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not any(stylesheet for stylesheet in options["theme"]._stylesheets)


def page_of(name: str, folder: Path, **flags):
    """A built page; its handlers by name, and its components by what the handlers call them."""
    pytest.importorskip("gradio")
    module = load(name)
    flags_class = module.ChatFlags if name == "chat" else module.SummarizeFlags
    blocks = module.build(flags_class(experiment_dir=[str(folder)], **flags))
    return blocks, {fn.fn.__name__: fn.fn for fn in blocks.fns.values() if fn.fn is not None}


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


CONTROLS = (0, 1, 0, 12, 5)


def test_chat_streams_and_keeps_the_conversation(folder):
    _, on = page_of("chat", folder / "dpo")
    page = Page()
    sizes = []
    for update in on["send"]("Hi", [], "dpo · final", page.request, *CONTROLS):
        page.take(update)
        sizes.append(len(page.chat()[-1][1]) if "chat" in page.shown else 0)
    assert page.chat()[0] == ("user", "Hi")
    assert page.chat()[1][0] == "assistant"
    assert len(set(sizes)) > 4
    assert "dpo · final: 12 tokens" in page.shown["status"]
    assert "Human/Assistant turns" in page.shown["status"]
    history = page.shown["State"]
    assert [turn["role"] for turn in history] == ["user", "assistant"]
    for update in on["send"]("Again", history, "sft · final, the start of dpo", page.request, *CONTROLS):
        page.take(update)
    assert page.shown["status"].startswith("<p>sft · final")
    assert page.shown["Textbox"] == (
        f"\n\nHuman: Hi\n\nAssistant: {history[1]['content']}\n\nHuman: Again\n\nAssistant:"
    )
    assert [role for role, _ in page.chat()] == ["user", "assistant"] * 2


@pytest.mark.parametrize("button", ["stop", "forget"])
def test_chat_stops_for_its_button_and_when_the_page_is_closed(folder, button):
    _, on = page_of("chat", folder / "dpo")
    page, other = Page("mine"), Page("other's")
    num = 0
    for update in on["send"]("Hi", [], "dpo · final", page.request, 1, 1, 0, 400, 5):
        page.take(update)
        num += len(page.shown.get("chat", [])) == 2
        if num == 2:
            on[button](other.request)
        if num == 4:
            on[button](page.request)
            kept = page.chat()[-1][1]
    assert "stopped" in page.shown["status"]
    assert page.chat()[-1][1].startswith(kept.rstrip())
    assert len(page.chat()[-1][1]) < len(kept) + 20


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


def test_summaries_stream_and_errors_are_shown(folder):
    _, on = page_of("summarize", folder / "dpo")
    page = Page()
    texts = []
    for update in on["summarize"]("", "A car", "I lent it.", "dpo · final", page.request, *CONTROLS):
        page.take(update)
        texts.append(page.shown.get("summary"))
    assert len(set(texts)) > 4
    assert page.shown["summary"]
    assert page.shown["Textbox"] == "TITLE: A car\nPOST: I lent it.\nTL;DR:"
    assert "12 tokens" in page.shown["status"]
    for update in on["summarize"]("", "", "x" * 900, "dpo · final", page.request, *CONTROLS):
        page.take(update)
    assert 'class="error"' in page.shown["status"]


def test_a_page_is_served_on_this_machine_alone_and_fetches_nothing_from_elsewhere(folder, monkeypatch):
    """The page's own HTML loads scripts, styles and fonts from the server; and a port that is taken is one sentence."""
    blocks, _ = page_of("chat", folder / "dpo", port=free_port())
    chat, page = load("chat"), load("page")
    flags = chat.ChatFlags(experiment_dir=[str(folder / "dpo")], port=free_port())
    monkeypatch.setattr(blocks, "block_thread", lambda: None)
    try:
        page.serve(blocks, flags, "chat")
        assert (blocks.server_name, blocks.share, blocks.analytics_enabled) == ("127.0.0.1", False, False)
        html = urlopen(f"http://127.0.0.1:{flags.port}/").read().decode()
        loaded = re.findall(r'(?:src|href)="([^"]*)"', html)
        assert loaded
        assert not [address for address in loaded if address.startswith(("http", "//"))]
        other, _ = page_of("chat", folder / "dpo")
        with pytest.raises(UserError, match=f"--port={flags.port}"):
            page.serve(other, flags, "chat")
    finally:
        blocks.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
