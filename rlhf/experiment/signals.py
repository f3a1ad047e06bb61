"""What a run does when it is sent a signal: stop with a checkpoint, stop at once, or save and go on."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rlhf.errors import LAST_WORDS

SAVE = getattr(signal, "SIGUSR1", None)

ONE_KEY = 0.5
"""Seconds in which a second SIGINT is the first one again: a launcher may pass on the Ctrl-C that all of its processes
have had from the terminal."""


class Signals:
    """Requests that came by signal while `listening`; the run looks at them between its steps.

    A second Ctrl-C ends the process at once, with status 130, be it in the middle of a collective operation that never
    ends or of a save: what is on the disk is whole all the same, as after `kill -9`.

    Attributes:
        stop: SIGTERM or SIGINT (Ctrl-C) came: stop after the step in hand, with a checkpoint.
        save: SIGUSR1 came: save after the step in hand, and go on.
    """

    def __init__(self) -> None:
        self.stop = self.save = False
        self._asked_at: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals in, in place of what they would do otherwise."""
        heard = [s for s in (signal.SIGTERM, signal.SIGINT, SAVE) if s is not None]
        before = {s: signal.signal(s, self._hear) for s in heard}
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reading,), daemon=True, name="signals")
        watcher.start()
        try:
            yield
        finally:
            current = signal.set_wakeup_fd(-1)  # of a later run, where this one was left by an error
            with suppress(OSError, ValueError):  # the one before us may have been closed
                signal.set_wakeup_fd(wakeup if current == writing.fileno() else current, warn_on_full_buffer=False)
            writing.shutdown(socket.SHUT_RDWR)  # closing it is not enough: forked processes may have it open too
            watcher.join()
            writing.close()
            reading.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        if number == SAVE:
            self.save = True
        else:
            self.stop = True

    def _watch(self, reading: socket.socket) -> None:
        """Answer signals as they come. Python's handlers run only once the operation in hand has returned."""
        while numbers := reading.recv(4096):
            now = time.monotonic()
            for number in numbers:
                if number in (signal.SIGTERM, signal.SIGINT) and self._asked_at is None:
                    self._asked_at = now
                    _say("asked to stop: what is in hand is finished and saved first; Ctrl-C once more stops at once")
                elif number == signal.SIGINT and now - self._asked_at > ONE_KEY:
                    _say("stopped: at once, without a checkpoint; --resume=True goes on from the last one")
                    for tell in LAST_WORDS:
                        tell("Ctrl-C")
                    os._exit(130)


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # print may wait for a lock that the main thread has
