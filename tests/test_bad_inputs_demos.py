"""What a user gets wrong with the demos: one sentence, status 2, nothing written, and no server that starts."""

from __future__ import annotations

import socket

import pytest

from tests import bad_inputs
from tests.bad_inputs import WORDS, Case, EntryPoint, World
from tests.demo_runs import load

GOOD = {"experiment_dir": ["{llama}"], "port": "{free_port}", "device": "cpu"}
CASES: list[Case] = [
    ({"experiment_dir": None}, "--experiment_dir is missing"),
    ({"experiment_dir": []}, "--experiment_dir needs a value"),
    ({"experiment_dir": [""]}, "--experiment_dir is empty"),
    ({"experiment_dir": ["{nowhere}"]}, "--experiment_dir={nowhere}: there is no such folder"),
    ({"experiment_dir": ["{llama}", "{nowhere}"]}, "--experiment_dir={nowhere}: there is no such folder"),
    ({"experiment_dir": ["{empty}"]}, "--experiment_dir={empty} holds no model"),
    ({"experiment_dir": ["{file}"]}, "--experiment_dir={file} holds no model"),
    ({"experiment_dir": ["{data}"]}, "holds no model"),
    ({"experiment_dir": ["{taken}"]}, "holds no model"),
    ({"experiment_dir": ["{too_long}"]}, "file name too long"),
    ({"experiment_dir": ["{reward}"]}, "holds a reward model"),
    ({"experiment_dir": ["{t5}"]}, "{t5} is an encoder-decoder"),
    ({"experiment_dir": ["{no_tokenizer}"]}, "{no_tokenizer}"),
    ({"experiment_dir": ["{broken_config}"]}, "{broken_config}/config.json can"),
    ({"experiment_dir": ["nobody/nothing"]}, "nobody/nothing"),
    ({"experiment_dir": ["{broken_run}"]}, "{broken_run}/data.json can"),
    ({"experiment_dir": ["{list_run}"]}, "{list_run}/data.json holds no JSON object"),
    ({"port": "{taken_port}"}, "--port={taken_port} can't be listened on"),
    ({"port": "0"}, "--port=0 must be in [1, 65,535]"),
    ({"port": "65536"}, "--port=65536 must be in [1, 65,535]"),
    ({"port": "-1"}, "--port=-1 must be in [1, 65,535]"),
    ({"port": "http"}, "--port=http must be a whole number"),
    ({"host": ""}, "--host is empty"),
    ({"host": "999.999.999.999"}, "--host=999.999.999.999"),
    ({"host": "h" * 70}, "can't be listened on"),
    ({"host": "::zz"}, "--host=::zz"),
    ({"device": "tpux"}, "--device=tpux can't be used"),
    ({"device": "meta"}, "--device=meta can't be used"),
    ({"device": "cuda:99"}, "--device=cuda:99 can't be used"),
    ({"device": ""}, "--device is empty"),
    ({"precision": "16"}, "--precision=16 must be one of auto, 32-true, bf16-true"),
    ({"keep_loaded": "0"}, "--keep_loaded=0 must be above 0"),
    ({"max_new_tokens": "0"}, "--max_new_tokens=0 must be above 0"),
    ({"max_new_tokens": "ten"}, "--max_new_tokens=ten must be a whole number"),
    ({"temperature": "-0.5"}, "--temperature=-0.5 must not be below 0"),
    ({"temperature": "nan"}, "--temperature=nan must be a finite number"),
    ({"top_p": "0"}, "--top_p=0.0 must be in (0, 1]"),
    ({"top_p": "1.5"}, "--top_p=1.5 must be in (0, 1]"),
    ({"top_k": "-1"}, "--top_k=-1 must not be below 0"),
    ({"do_sample": "maybe"}, "--do_sample=maybe must be True or False"),
    ({"trust_remote_code": "maybe"}, "--trust_remote_code=maybe must be True or False"),
    *WORDS,
]
OWN: dict[str, list[Case]] = {
    "chat": [
        ({"format": "xml"}, "--format=xml must be one of auto, dialogue"),
        ({"experiment_dir": ["{summaries}"]}, "was trained on posts and summaries"),
    ],
    "summarize": [({"format": "dialogue"}, "--format is no flag of this script")],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = bad_inputs.make_world(tmp_path_factory.mktemp("bad"))
    data = '{"stages": {"finetune": {"format": {"kind": "summary", "template": "{post}", "stop": []}}}}'
    for name, content in (("broken_run", "{"), ("list_run", "[]"), ("summaries", data)):
        bad_inputs.make_model_dir(made.root / name / "final")
        (made.root / name / "args.json").write_text("{}")
        (made.root / name / "data.json").write_text(content)
        made.paths[name] = str(made.root / name)
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        made.paths["taken_port"], made.paths["free_port"] = (str(s.getsockname()[1]) for s in (taken, free))
        free.close()
        yield made


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    """A mistake that is let through fails its case, and serves nobody."""
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)


def entry_of(name: str) -> EntryPoint:
    """A demo's entry point; its module is imported as a script finds it."""
    module = load(name)
    return EntryPoint(module.main, getattr(module, f"{name.capitalize()}Flags"), GOOD)


@pytest.mark.parametrize("name", OWN)
def test_a_mistake_is_one_sentence_status_2_and_nothing_written(world, monkeypatch, capsys, name):
    """DESIGN.md section 11: forty and more for each page."""
    cases = [*CASES, *OWN[name]]
    assert len(cases) >= 40
    bad_inputs.check_all(entry_of(name), world, cases, monkeypatch, capsys)


def test_what_is_not_wrong_is_served(world, monkeypatch, capsys):
    """The command line that the cases spoil is a good one."""
    for name in OWN:
        entry = entry_of(name)
        flags = entry.flags(experiment_dir=[world.paths["llama"]], port=int(world.paths["free_port"]), device="cpu")
        entry.main(flags)
        assert f"{name}: open http://127.0.0.1:{world.paths['free_port']}" in capsys.readouterr().out


def test_no_flag_takes_a_value_that_it_cannot_have(tmp_path, monkeypatch, capsys):
    """C21: a word for a number, NaN, infinities, numbers out of range, wrong choices, nothing: for every flag."""
    known: set[str] = set()
    for name in OWN:
        entry = entry_of(name)
        cases = [(case, f"error: --{next(iter(case))}") for case in wrong_for(entry, known)]
        bad_inputs.check_all(entry, World(tmp_path, {"llama": "x", "free_port": "7860"}), cases, monkeypatch, capsys)


def wrong_for(entry: EntryPoint, known: set[str]) -> list[dict[str, str]]:
    """`wrong_values`, but for the temperature 0, which here stands for the likeliest token."""
    return [{name: v} for name, v in bad_inputs.wrong_values(entry, known) if (name, v) != ("temperature", "0")]
