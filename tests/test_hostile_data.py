"""Hostile data, source files and chat templates: one sentence and status 2, nothing executed, little memory.

Every case runs a whole script in a child of this process and looks at how it ended (`hostile.in_child`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.custom import prepare_data as custom
from rlhf.data.splits import load_split
from rlhf.errors import UserError
from rlhf.untrusted import read_json, tensor_header
from tests import hostile, hostile_runs
from tests.hostile_runs import MOST_MB, Lab, assert_refused, script, sft

lab, spoilt, canary = hostile_runs.lab, hostile_runs.spoilt, hostile_runs.canary

# --data_dir


@pytest.mark.parametrize("call", hostile.calls(Path("x")))
def test_a_split_that_would_execute(lab, spoilt, tmp_path, canary, call):
    """DESIGN.md §3: in a zip archive, in the formats before it, as a plain pickle and as a tar."""
    path = spoilt("data") / "finetune_train.pt"
    kinds = {
        "os.system": hostile.plain_pickle,
        "eval": lambda path, content: hostile.save(path, content, zipped=False),
        "exec": hostile.tar,
    }
    kinds.get(call, hostile.save)(path, hostile.calls(canary)[call])
    assert_refused(sft(lab, tmp_path, data_dir=path.parent), path)


@pytest.mark.parametrize("lie", hostile.LYING_ARCHIVES)
def test_a_split_that_declares_more_than_it_holds(lab, spoilt, tmp_path, lie):
    path = spoilt("data") / "finetune_train.pt"
    hostile.archive(path, hostile.LYING_ARCHIVES[lie])
    assert_refused(sft(lab, tmp_path, data_dir=path.parent), path)


@pytest.mark.parametrize("record", ["archive/data/0", "archive/data.pkl"])
def test_a_zip_bomb(lab, spoilt, tmp_path, record):
    path = spoilt("data") / "finetune_train.pt"
    hostile.zip_bomb(path, record)
    assert path.stat().st_size < 20 << 20
    assert_refused(sft(lab, tmp_path, data_dir=path.parent), path, "compressed")


@pytest.mark.parametrize("kind", ["pipe", "zeros", "loop", "dangling", "folder"])
@pytest.mark.parametrize("name", ["finetune_train.pt", "args.json", "finetune_train.safetensors"])
def test_data_that_is_no_file(lab, spoilt, tmp_path, name, kind):
    """Nothing waits for a pipe or reads a device to its end; a twin that is none is made anew."""
    folder = spoilt("data")
    hostile.no_file(folder / name, kind)
    if name.endswith(".safetensors"):
        outcome = hostile.in_child(lambda: load_split(folder, "finetune", "train"), tmp_path / "printed")
        assert (outcome.status, outcome.grown < MOST_MB) == (0, True), outcome
    elif name != "args.json" or kind != "dangling":
        assert_refused(sft(lab, tmp_path, data_dir=folder), folder)


@pytest.mark.parametrize("content", hostile.BAD_JSON)
def test_a_bad_args_json_of_data(spoilt, content):
    path = spoilt("data") / "args.json"
    path.write_bytes(hostile.BAD_JSON[content])
    with pytest.raises(UserError, match=r"args\.json .*; prepare the data again"):
        load_split(path.parent, "finetune", "train")


@pytest.mark.parametrize(
    "stages", [{"finetune": 3}, [1], {"finetune": {"arguments": {"ignore_index": "../x"}}}, {"x": {"tokenizer": [1]}}]
)
def test_an_args_json_of_other_types(spoilt, stages):
    path = spoilt("data") / "args.json"
    hostile.change_json(path, stages=stages)
    with pytest.raises(UserError, match="was not written by a prepare_data"):
        load_split(path.parent, "finetune", "train")


def _set(name: str, place, value) -> Callable:
    def change(layout, arrays, metadata) -> None:
        arrays[name][place] = value

    return change


def _layout(name: str, **values) -> Callable:
    return lambda layout, arrays, metadata: layout[name].update(values)


REBUILT_TWINS = {
    "an offset beyond the ids": _set("input_ids.offsets", 3, 1 << 40),
    "a last offset beyond the ids": _set("input_ids.offsets", -1, 1 << 40),
    "offsets that fall": _set("targets.offsets", 5, 0),
    "a negative offset": _set("input_ids.offsets", 2, -7),
    "a prompt longer than its row": _set("prompt_len", 1, 1 << 30),
    "a negative prompt": _set("prompt_len", 0, -1),
    "ids beyond the file": _layout("input_ids", data_offsets=[0, 1 << 60]),
    "negative places": _layout("input_ids", data_offsets=[-64, 0]),
    "another dtype": _layout("prompt_len", dtype="I32"),
    "an unknown dtype": _layout("prompt_len", dtype="F8"),
    "an entry that is a list": lambda layout, arrays, metadata: layout.update(prompt_len=[1]),
    "hashes of another shape": _layout("row_hashes", shape=[28, 1]),
    "a largest id that is no number": lambda layout, arrays, metadata: metadata.update(largest_id="ten"),
}


@pytest.mark.parametrize("lie", REBUILT_TWINS)
def test_a_twin_that_lies_is_made_anew(lab, spoilt, lie):
    """Its checksums are right: what is wrong is found in what it says."""
    path = spoilt("data") / "finetune_train.pt"
    rows = [row["input_ids"].tolist() for row in torch.load(path, weights_only=True)]
    before = path.with_suffix(".safetensors").read_bytes()
    hostile.change_twin(path, REBUILT_TWINS[lie])
    assert path.with_suffix(".safetensors").read_bytes() != before
    assert [row["input_ids"].tolist() for row in load_split(path.parent, "finetune", "train")] == rows
    assert path.with_suffix(".safetensors").read_bytes() == before


@pytest.mark.parametrize(("column", "value"), [("input_ids", -3), ("input_ids", 1 << 30), ("targets", -5)])
def test_a_twin_whose_ids_are_none(spoilt, column, value):
    """The hashes of its rows are right too: the row is refused when it is read."""
    path = spoilt("data") / "finetune_train.pt"
    hostile.change_twin(path, _set(column, -1, value))
    with pytest.raises(UserError, match=rf"finetune_train.safetensors, row 13, '{column}'.*remove that file"):
        list(load_split(path.parent, "finetune", "train"))


@pytest.mark.parametrize("header", [b"\xff" * 16, (1 << 62).to_bytes(8, "little") + b"{}", b"\x00\x00\x08" + bytes(9)])
def test_a_twin_with_a_bad_header_is_made_anew(spoilt, header):
    path = spoilt("data") / "finetune_train.pt"
    path.with_suffix(".safetensors").write_bytes(header + b"[" * 700_000)
    assert len(load_split(path.parent, "finetune", "train")) == 14


def test_an_example_prompt_that_would_execute(lab, spoilt, tmp_path, canary):
    path = spoilt("data") / "example_prompt.pt"
    hostile.save(path, {"input_ids": hostile.calls(canary)["os.system"]})
    assert_refused(sft(lab, tmp_path, data_dir=path.parent), path, "needs posix.system")
    assert not (tmp_path / "out").exists()


# prepare_data


def prepare(lab: Lab, tmp_path: Path, **flags) -> hostile.Outcome:
    given = {"tokenizer_name": lab.model, "destination_dir": tmp_path / "new", "stage": "finetune", "num_workers": 1}
    return script(custom, custom.PrepareFlags, tmp_path, **{**given, **flags})


@pytest.mark.parametrize(
    ("suffix", "first"),
    [
        ("jsonl", b""),
        ("json", b'[{"prompt": "'),
        ("json", b"[" * 100_000),
        ("csv", b"prompt,response\n"),
        ("csv", b'prompt,response\n"'),
        ("parquet", b"PAR1"),
    ],
)
def test_gzip_bombs(lab, tmp_path, suffix, first):
    """A line, a row or a cell of 10 GB; a file of one."""
    path = tmp_path / f"train.{suffix}.gz"
    hostile.gzip_bomb(path, first, hostile.GIGA if suffix == "parquet" else 10 * hostile.GIGA)
    assert_refused(prepare(lab, tmp_path, dataset_path=path), path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("body", ["[" * 100_000, '{"prompt": 1' + "0" * 10_000 + "}", '{"prompt": NaN}'])
def test_rows_of_hostile_json(lab, tmp_path, body):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{body}\n")
    assert_refused(prepare(lab, tmp_path, dataset_path=path), path)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation"),
        ("{{ cycler.__init__.__globals__.os.system('touch {canary}') }}", "refuses the conversation"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses the conversation"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes longer than 1 second",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the conversation"),
        ("{{ 1 / 0 }}", "refuses the conversation"),
        ("{% if %}", "refuses the conversation"),
    ],
)
def test_a_hostile_chat_template(lab, spoilt, tmp_path, canary, monkeypatch, template, named):
    """It sees nothing outside jinja's sandbox, and a loop without an end has one."""
    monkeypatch.setattr("rlhf.data.chat.LONGEST_RENDERING", 1.0)
    folder = spoilt("model")
    (folder / "chat_template.jinja").write_text(template.replace("{canary}", str(canary)))
    path = tmp_path / "train.jsonl"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    assert_refused(prepare(lab, tmp_path, dataset_path=path, tokenizer_name=folder), named)


# What is right is read.


def test_what_is_unusual_but_right(tmp_path):
    """JSON with a byte order mark; NaN where it is asked for; links to files, as in the hub's cache; empty tensors."""
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": NaN}')
    with pytest.raises(UserError, match="NaN is no JSON"):
        read_json(path)
    assert str(read_json(path, constants=True)["a"]) == "nan"
    save_file({"a": torch.zeros(0, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "w.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "w.safetensors")
    found = tensor_header(tmp_path / "link.safetensors")
    assert {name: entry.shape for name, entry in found.items()} == {"a": (0, 3), "b": (2,)}
    assert set(load_file(tmp_path / "w.safetensors")) == set(found)
    assert os.path.islink(tmp_path / "link.safetensors")
