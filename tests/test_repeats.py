"""Runs that are repeated from their args.json, and runs that go on with other batches on other devices."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf import rlhf_sft
from rlhf.experiment import start
from rlhf.flags import parse
from rlhf.rlhf_sft import SFTFlags
from tests.ppo import on_two_processes
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags
from tests.two_processes import run_all


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
    monkeypatch.setattr(start.time, "strftime", lambda *_: "later")
    again = Path(rlhf_sft.main(parse(SFTFlags, [f"--args_file={first}/args.json"]))["experiment_dir"])
    assert again == Path("experiments/runs/rlhf_sft-later")
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert same_final(first, again)


def test_c27_a_run_goes_on_with_the_same_steps_on_two_processes(lab, tmp_path):
    """C27: two steps of 6 of 14 rows on one process, then two on two with half the mini-batch each: the rows, losses
    and weights of the unbroken run, to rounding, over the end of an epoch."""

    def go(folder: str, world_size: int, **given) -> list[dict]:
        flags = flags_of(
            lab, tmp_path / folder, max_steps=4, mini_batch_size=6 // world_size, save_interval=2, keep_checkpoints=0,
            optimizer="sgd", **given,
        )  # fmt: skip
        plan = tmp_path / f"{folder}.json"
        plan.write_text(json.dumps([("sft", dataclasses.asdict(flags))]))
        if world_size == 1:
            run_all(plan)
        else:
            on_two_processes(Path(__file__).with_name("two_processes.py"), str(plan))
        return torch.load(tmp_path / folder / "rank-0.pt", weights_only=True)

    whole = go("one", 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=True)
    for gone in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(tmp_path / "two" / gone)
    rest = go("two", 2, resume=True, devices="2", strategy="ddp")
    assert [step["rows"] for step in rest] == [step["rows"] for step in whole[2:]]
    assert [len(step["rows"]) for step in rest] == [2, 6]
    losses = [
        [line["train/loss"] for line in metrics_of(tmp_path / name) if "train/loss" in line] for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for mine, theirs in zip(rest[-1]["weights"], whole[-1]["weights"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
