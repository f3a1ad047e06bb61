"""What a run hears while it listens, without a run; with one: tests/test_resume.py."""

from __future__ import annotations

import os
import signal

import pytest

from rlhf.experiment.signals import Signals


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
