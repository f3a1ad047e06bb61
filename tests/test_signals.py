"""Signals to a run: it stops with a checkpoint, ends at once, or saves and goes on."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

import pytest
import torch

from rlhf import rlhf_grpo, rlhf_sft
from rlhf.experiment.run import Step
from rlhf.experiment.signals import Signals
from rlhf.flags import launch
from rlhf.rlhf_sft import SFTFlags
from tests.kill import World, differences, in_child, raise_signals


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.make(tmp_path_factory.mktemp("signals") / "world")


@pytest.mark.parametrize(
    ("script", "module", "name", "at", "steps"),
    [
        ("sft", rlhf_sft, "evaluate", 2, 3),
        ("grpo", rlhf_grpo, "sample_groups", 2, 2),
        ("sft", Step, "update", 4, 4),
        ("sft", rlhf_sft, "evaluate", 4, 5),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_stage_saves_and_goes_on(world, tmp_path, monkeypatch, script, module, name, at, steps, number):
    """In an evaluation, a rollout, an update: the step in hand is the last; in the last evaluation, the run ends."""
    main = {"sft": rlhf_sft, "grpo": rlhf_grpo}[script].main
    folder = tmp_path / "run"
    given = {"save_interval": 0}
    with monkeypatch.context() as patch:
        raise_signals(patch, module, name, at, number)
        handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
        assert main(world.flags(script, folder, **given))["steps"] == steps
        assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert (folder / "final").exists() == (name == "evaluate" and at == 4)
    main(world.flags(script, folder, resume=True, **given))
    straight = tmp_path / "straight"
    main(world.flags(script, straight, **given))
    assert not [f for f in differences(straight, folder) if not f.startswith("checkpoints/")]


def test_sigusr1_saves_after_the_step_in_hand_and_goes_on(world, tmp_path, monkeypatch):
    given = {"save_interval": 100, "keep_checkpoints": 9}
    rlhf_sft.main(world.flags("sft", tmp_path / "straight", **given))
    raise_signals(monkeypatch, Step, "update", 3, signal.SIGUSR1)
    assert rlhf_sft.main(world.flags("sft", tmp_path / "run", **given))["steps"] == 5
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*3")] == ["step-00000003"]
    found = differences(tmp_path / "straight", tmp_path / "run")
    assert all("step-00000003" in fault for fault in found), found


def hang() -> None:
    """Never return from native code, as a collective operation may; no signal interrupts it."""
    native, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    for _ in range(2):
        native.pthread_mutex_lock(mutex)


def test_the_second_ctrl_c_stops_at_once(world, tmp_path):
    """Status 130 and a sentence, while a save that has begun never ends; what was saved before is there to go on from,
    to the end that the unbroken run has."""
    folder, saves, save = tmp_path / "run", [], torch.save

    def hanging(*arguments, **options):
        saves.append(0)
        if len(saves) == 2:
            for seconds in (0.1, 0.2, 1.0):
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
            hang()
        return save(*arguments, **options)

    def work() -> None:
        torch.save = hanging
        world.run("sft", folder)()

    ended = in_child(work, folder)
    assert ended.status == 130, ended.output
    assert ended.output.count("asked to stop: what is in hand is finished and saved first") == 1
    assert "stopped: at once, without a checkpoint; --resume=True goes on from the last one" in ended.output
    assert (folder / "checkpoints" / "last").resolve().name == "step-00000002"
    assert in_child(world.run("sft", folder, resume=True), folder).status == 0
    in_child(world.run("sft", tmp_path / "whole"), tmp_path / "whole")
    assert differences(tmp_path / "whole", folder) == []


def test_one_ctrl_c_that_comes_twice_is_one(world, tmp_path):
    """From the terminal and, at the same moment, from a launcher: the step in hand is finished and saved."""

    def work() -> None:
        raise_signals(pytest.MonkeyPatch(), Step, "update", 3, signal.SIGINT, signal.SIGINT)
        assert world.run("sft", tmp_path / "run")()["steps"] == 3
        assert "signals" not in [thread.name for thread in threading.enumerate()]

    ended = in_child(work, tmp_path / "run")
    assert (ended.status, ended.output.count("asked to stop")) == (0, 1), ended.output


def test_ctrl_c_before_the_run_is_a_word(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlhf_sft.py", "--data_dir=d"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(SystemExit) as ended:
            launch(lambda _: os.kill(os.getpid(), signal.SIGINT), SFTFlags)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.value.code, capsys.readouterr().err.strip()) == (130, "stopped")


@pytest.mark.parametrize(
    ("number", "heard"),
    [(signal.SIGTERM, (True, False)), (signal.SIGINT, (True, False)), (signal.SIGUSR1, (False, True))],
)
def test_each_signal_asks_for_its_own_and_gets_its_handler_back(number, heard):
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    signals = Signals()
    with signals.listening():
        os.kill(os.getpid(), number)
    assert (signals.stop, signals.save) == heard
    assert {s: signal.getsignal(s) for s in before} == before
