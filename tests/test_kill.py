"""Runs that die at any moment and go on: what is left in the end is what the run leaves that never died."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.experiment.run import Step
from tests.kill import SETTINGS, World, differences, in_child, moments, survive, times
from tests.splits import metrics_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each run")

EVERY_SCRIPT = pytest.mark.parametrize("script", SETTINGS)
NUM_MOMENTS = 5


class Lab:
    """The unbroken run of every script and mode, made when it is first asked for, and how many operations it takes."""

    def __init__(self, root: Path) -> None:
        self.root, self.world = root, World.make(root / "world")
        self._whole: dict[str, tuple[Path, int]] = {}

    def whole(self, script: str, processes: int = 1, **given) -> tuple[Path, int]:
        key = f"{script}-{processes}-{given.get('finetune_mode', 'all')}"
        if key not in self._whole:
            folder = self.root / key
            ended = in_child(self.world.run(script, folder, **given), folder, processes=processes)
            assert ended.status == 0, ended.output
            self._whole[key] = folder, ended.operations
        return self._whole[key]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("kill"))


@pytest.mark.parametrize("mode", ["all", "lora"])
@EVERY_SCRIPT
def test_c4_c11_c23_killed_at_any_operation_it_ends_as_if_never(lab, tmp_path, script, mode):
    """C4, C11, C23: kill -9 before some operation on the run's files, `open`, saves, `best` and `final/` among them."""
    given = {"finetune_mode": mode}
    whole, operations = lab.whole(script, **given)
    for moment in moments(operations, NUM_MOMENTS if mode == "all" else 2, seed=len(script)):
        found = survive(lab.world, script, tmp_path / f"at-{moment}", whole, given=given, moment=moment)
        assert not found, f"killed before operation {moment} of {operations}: {found}"


@EVERY_SCRIPT
def test_c4_killed_at_any_time_it_ends_as_if_never(lab, tmp_path, script):
    """C4: kill -9 by the clock, twice in one run, the second time while it goes on."""
    whole, _ = lab.whole(script)
    draw = random.Random(script)
    folder = tmp_path / "run"
    in_child(lab.world.run(script, folder), folder, seconds=draw.uniform(0.1, 0.4))
    assert not survive(lab.world, script, folder, whole, given={}, seconds=draw.uniform(0.1, 0.4))


@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_c4_two_processes_killed_end_as_if_never(lab, tmp_path, script):
    """C4: the same on two processes (gloo, DDP), the first of which kills itself."""
    given = {"devices": "2", "strategy": "ddp", "finetune_mode": "all"}
    whole, operations = lab.whole(script, processes=2, **given)
    for moment in moments(operations, 2, seed=3):
        found = survive(lab.world, script, tmp_path / f"{moment}", whole, processes=2, given=given, moment=moment)
        assert not found, f"killed before operation {moment} of {operations}: {found}"


def test_one_of_two_processes_is_asked_to_stop(lab, tmp_path):
    """SIGTERM to the second process alone: both stop after the same step, with a checkpoint, and go on."""
    given = {"devices": "2", "strategy": "ddp", "finetune_mode": "all"}
    whole, _ = lab.whole("sft", processes=2, **given)
    folder, update = tmp_path / "run", Step.update

    def asking(self, *arguments, **options):
        if (self.run.rank, self.run.step_index) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *arguments, **options)

    def work() -> None:
        Step.update = asking
        lab.world.run("sft", folder, **given)()

    stopped = in_child(work, folder, processes=2)
    assert (stopped.status, "stopped after step 3" in stopped.output) == (0, True), stopped.output
    assert in_child(lab.world.run("sft", folder, resume=True, **given), folder, processes=2).status == 0
    found = differences(whole, folder)
    assert all("/step-00000003/" in fault or "/step-00000002/" in fault for fault in found), found
    again = in_child(lab.world.run("sft", folder, resume=True, **given), folder, processes=2)
    assert (again.status, again.others, "nothing left to do" in again.output) == (0, (0,), True), again.output


def test_c23_a_kill_is_noticed_by_this_test(lab, tmp_path):
    """What `differences` compares is worth comparing: a line less, another weight, a file more."""
    whole, _ = lab.whole("sft")
    copy = shutil.copytree(whole, tmp_path / "copy", symlinks=True)
    assert differences(whole, copy) == []
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:-1]))
    weights = copy / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    (copy / "checkpoints" / ".best.1.tmp").touch()
    assert differences(whole, copy) == [
        "checkpoints/.best.1.tmp is in one alone",
        "final/model.safetensors differs",
        "metrics.jsonl differs",
    ]
    assert len(metrics_of(whole)) == 9  # five steps; evaluations before, after two, after four and at the end


def test_c4_c23_resume_before_the_first_checkpoint(lab, tmp_path):
    """C4: whatever `open` left behind is taken up; no folder is an error; half a folder begins with a note."""
    whole, _ = lab.whole("sft")
    nowhere = in_child(lab.world.run("sft", tmp_path / "none", resume=True), tmp_path / "none")
    assert (nowhere.status, (tmp_path / "none").exists()) == (2, False)
    assert "there is no run there to resume; leave --resume out" in nowhere.output
    for name, keep, words in (
        ("empty", (), "holds no whole record of a run yet; it begins at the first step"),
        ("half", ("args.json",), "holds no whole record of a run yet; it begins at the first step"),
        ("opened", ("args.json", "environment.json", "data.json"), "holds no checkpoint yet; the run begins again"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in keep:
            shutil.copy(whole / file, folder / file)
        begun = in_child(lab.world.run("sft", folder, resume=True), folder)
        assert (begun.status, words in begun.output) == (0, True), begun.output
        assert differences(whole, folder) == []
    other = in_child(lab.world.run("sft", folder, resume=True, seed=7, weight_decay=0.5), folder)
    assert other.status == 2
    assert "--seed=7 differs from 42" in other.output
    assert "--weight_decay=0.5 differs from 0.0" in other.output


def test_c4_resume_of_a_run_that_has_ended_changes_nothing(lab, tmp_path):
    whole, _ = lab.whole("ppo")
    folder = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    before = times(folder)
    again = in_child(lab.world.run("ppo", folder, resume=True), folder)
    assert again.status == 0, again.output
    assert "there is nothing left to do" in again.output
    assert times(folder) == before
    shutil.rmtree(folder / "final")
    assert in_child(lab.world.run("ppo", folder, resume=True), folder).status == 0
    assert differences(whole, folder) == []


@pytest.mark.skipif(sys.platform != "linux", reason="what ends with its parent is Linux's")
def test_tokenising_processes_end_with_a_preparation_that_is_killed():
    code = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from rlhf.data.encode import _start_worker
with ProcessPoolExecutor(2, initializer=_start_worker, initargs=(None, os.getpid())) as pool:
    print(*{pool.submit(os.getpid).result() for _ in range(4)}, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert workers
        parent.kill()
    until = time.monotonic() + 20
    while left := [pid for pid in workers if _runs(pid)]:
        assert time.monotonic() < until, f"{left} still run"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
