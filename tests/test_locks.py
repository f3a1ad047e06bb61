"""One run at a time in an experiment folder; locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf import locks, rlhf_sft
from rlhf.errors import UserError
from rlhf.experiment.run import Run
from rlhf.locks import LockedError, let_go, locked, take
from tests.kill import World, differences, in_child, times

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")

LOCK = "lock.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.make(tmp_path_factory.mktemp("locks") / "world")


@pytest.fixture(autouse=True)
def _none_is_left():
    yield
    for descriptor in locks._held.values():
        os.close(descriptor)
    locks._held.clear()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_in_use_is_refused(world, tmp_path, processes):
    """--resume=True while a run goes on there: one sentence, status 2 on every process, nothing touched. Once that run
    has let go, it goes on as if nothing had been."""
    given = {"devices": "2", "strategy": "ddp"} if processes == 2 else {}
    given |= {"logger": "none", "eval_interval": 0, "max_steps": 3}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for place in (whole, folder):
        in_child(world.run("sft", place, **given), place, processes=processes)
    (folder / "summary.json").unlink()  # not at its end
    take(folder / LOCK)
    before = times(folder), (folder / LOCK).read_text()
    second = in_child(world.run("sft", folder, resume=True, **given), folder, processes=processes)
    assert (second.status, second.others) == (2, (2,) * (processes - 1)), second.output
    assert second.output.count(f"error: --experiment_dir={folder} is in use by process {os.getpid()} on ") == processes
    assert (times(folder), (folder / LOCK).read_text()) == before
    let_go(folder / LOCK)
    again = in_child(world.run("sft", folder, resume=True, **given), folder, processes=processes)
    assert again.status == 0, again.output
    assert differences(whole, folder) == []


def test_of_two_that_begin_in_one_folder_one_goes_on(world, tmp_path):
    """Neither sees the other's args.json as it starts: the second finds the folder locked, or holding a run by now."""
    folder = tmp_path / "run"
    take(folder / LOCK)
    second = in_child(world.run("sft", folder), folder)
    assert (second.status, "is in use by process" in second.output) == (2, True), second.output
    assert [path.name for path in folder.iterdir()] == [LOCK]
    let_go(folder / LOCK)

    def late(run, *_):
        (folder / "args.json").write_text("{}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "restore", late)
        with pytest.raises(UserError, match="holds a run already; give another folder, or --resume=True"):
            rlhf_sft.main(world.flags("sft", folder))
    assert not locks._held
    assert sorted(path.name for path in folder.iterdir()) == ["args.json", LOCK]


def test_a_run_says_who_it_is_and_lets_go_at_its_end(world, tmp_path, capsys):
    folder = tmp_path / "run"
    rlhf_sft.main(world.flags("sft", folder, max_steps=1))
    assert json.loads((folder / LOCK).read_text())["process"] == os.getpid()
    assert not locks._held
    assert "without locks" not in capsys.readouterr().out


def holder(path: Path, then: str) -> int:
    """A process that has the lock, and a child of its own: how it was started says `then`."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        take(path)
        if then == "forks":
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(0)
        else:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]).pid
        os.write(writing, f"{child}\n".encode())
        time.sleep(30)
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        child = int(pipe.readline())
    with pytest.raises(LockedError, match=f"^process {process} on "):
        take(path)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return child


@pytest.mark.parametrize("then", ["forks", "executes"])
def test_a_killed_holder_is_gone_at_once(tmp_path, then):
    """Also while a process lives on that it had forked, or started, with the lock in hand."""
    child = holder(tmp_path / LOCK, then)
    try:
        os.kill(child, 0)
        assert take(tmp_path / LOCK)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_process_may_take_its_own_lock_again(tmp_path):
    assert take(tmp_path / LOCK)
    assert take(tmp_path / LOCK)
    assert len(locks._held) == 1
    let_go(tmp_path / LOCK)
    let_go(tmp_path / LOCK)
    assert not locks._held


def test_without_locks_it_is_said_once(world, tmp_path, monkeypatch, capsys):
    """A file system that has none: the run goes on."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    rlhf_sft.main(world.flags("sft", tmp_path / "run", max_steps=1))
    assert capsys.readouterr().out.count("run is on a file system without locks; see to it") == 1
    monkeypatch.setattr(locks, "fcntl", None)  # nor has the system
    assert not take(tmp_path / LOCK)


def test_what_stands_in_the_place_of_the_lock(tmp_path):
    """A link, whose target must not be written; a folder; a pipe, which must not be waited for."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe"):
        with pytest.raises(UserError, match=f"{name} .*; remove it"):
            take(tmp_path / name)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not locks._held


@pytest.mark.parametrize("note", ["", "[1]", '{"process": "x", "host": 1, "since": 2}', "[" * 999, "{}"])
def test_a_holder_that_left_no_name(tmp_path, monkeypatch, note):
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    with (tmp_path / LOCK).open("w") as file:
        file.write(note)
        file.flush()
        locks.fcntl.flock(file, locks.fcntl.LOCK_EX)
        with pytest.raises(LockedError, match=r"^another process$"):
            take(tmp_path / LOCK)
    assert (tmp_path / LOCK).read_text() == note


def test_locked_waits(tmp_path):
    """Until a process that holds the lock of a folder for 0.3 s lets it go."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        with locked(tmp_path):
            os.write(writing, b".")
            time.sleep(0.3)
            (tmp_path / "done").touch()
        os._exit(0)
    os.read(reading, 1)
    with locked(tmp_path):
        assert (tmp_path / "done").exists()
    os.waitpid(process, 0)
