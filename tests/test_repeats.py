"""Runs that are repeated from their args.json, and runs that go on with other batches on other devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf import rlhf_sft
from rlhf.experiment import run as run_module
from rlhf.flags import parse
from rlhf.rlhf_sft import SFTFlags
from tests.splits import make_data, make_model_dir, quick_flags


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("repeats")
    return {"data": make_data(root / "data"), "model": make_model_dir(root / "model")}


def flags_of(lab: dict[str, str], folder: Path | str, **given) -> SFTFlags:
    return quick_flags(SFTFlags, lab["data"], folder, model_name=lab["model"], **given)


def same_final(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_repeat_never_writes_into_the_folder_of_the_first(lab, tmp_path, monkeypatch):
    """args.json names the folder that a run made for itself; repeated from it, the run makes another."""
    monkeypatch.chdir(tmp_path)
    flags = flags_of(lab, "")
    flags.experiment_dir = None
    first = Path(rlhf_sft.main(flags)["experiment_dir"])
    assert first.parent == Path("experiments/runs")
    assert json.loads((first / "args.json").read_text())["experiment_dir"] == str(first)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    monkeypatch.setattr(run_module.time, "strftime", lambda *_: "later")
    again = Path(rlhf_sft.main(parse(SFTFlags, [f"--args_file={first}/args.json"]))["experiment_dir"])
    assert again == Path("experiments/runs/rlhf_sft-later")
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert same_final(first, again)
