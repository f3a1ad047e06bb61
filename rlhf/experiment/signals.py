"""What a run does when it is sent a signal: stop with a checkpoint, stop at once, or save and go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SAVE = getattr(signal, "SIGUSR1", None)


class Signals:
    """Requests that came by signal while `listening`; the run looks at them between its steps.

    Attributes:
        stop: SIGTERM or SIGINT (Ctrl-C) came: stop after the step in hand, with a checkpoint.
        save: SIGUSR1 came: save after the step in hand, and go on.
    """

    def __init__(self) -> None:
        self.stop = self.save = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals in, in place of what they would do otherwise.

        Raises:
            KeyboardInterrupt: at once, at the second SIGINT.
        """
        heard = [s for s in (signal.SIGTERM, signal.SIGINT, SAVE) if s is not None]
        before = {s: signal.signal(s, self._hear) for s in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        if number == SAVE:
            self.save = True
            return
        if number == signal.SIGINT and self.stop:
            raise KeyboardInterrupt("at once, without a checkpoint; --resume=True goes on from the last one")
        self.stop = True
        text = "asked to stop: what is in hand is finished and saved first; Ctrl-C once more stops at once\n"
        os.write(2, text.encode())  # print is not safe in a handler
