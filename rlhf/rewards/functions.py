"""The user's own Python functions as rewards, under a time limit."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rlhf.errors import UserError
from rlhf.flag_values import shown
from rlhf.rewards.answers import Answers

Result = TypeVar("Result")


class TimeLimitError(Exception):
    """A call did not come back in time."""


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What `call()` returns or raises, if it does within `seconds`; 0 waits for ever, in the calling thread.

    The call runs in a daemon thread of its own. Python can't end a thread: one that is late goes on in the background
    until the process ends, which it does not hold up. Code that needs the main thread (signals, alarms) needs 0.

    Raises:
        TimeLimitError: it is late.
    """
    if seconds <= 0:
        return call()
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeLimitError
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


class FunctionReward:
    """`reward(prompts, responses, rows) -> rewards` of the user's.

    Args:
        function: takes three lists of N: texts of the prompts, texts of the responses, and rows (`Answers.rows`).
        name: as errors call it.
        timeout: seconds of one call; 0: no limit.
    """

    def __init__(self, function: Callable, name: str, timeout: float) -> None:
        self.function, self.name, self.timeout = function, name, timeout

    def __call__(self, answers: Answers) -> Any:
        """What the function returns.

        Raises:
            UserError: it raises or is late. Where it raises, it is called again for one response after the other, so
                that the error names the row.
        """
        everything = range(len(answers))
        try:
            return within(self.timeout, lambda: self._call(answers, everything))
        except TimeLimitError:
            raise UserError(
                f"{self.name} took longer than {self.timeout:g} s for {answers.places()}; make it faster, or raise "
                f"--reward_timeout"
            ) from None
        except (Exception, SystemExit) as error:
            i, error = self._culprit(answers) or (None, error)
            where = answers.places() if i is None else answers.place(i)
            raise UserError(f"{self.name} failed on {where} ({self._told(error)}); mend it, or the row") from error

    def _call(self, answers: Answers, which: range) -> Any:
        rows = [dict(answers.rows[i]) for i in which]
        return self.function([answers.prompts[i] for i in which], [answers.responses[i] for i in which], rows)

    def _culprit(self, answers: Answers) -> tuple[int, BaseException] | None:
        """The first response on which the function fails alone, and how."""

        def search() -> tuple[int, BaseException] | None:
            for i in range(len(answers)):
                try:
                    self._call(answers, range(i, i + 1))
                except (Exception, SystemExit) as error:
                    return i, error
            return None

        try:
            return within(self.timeout, search)
        except TimeLimitError:
            return None

    def _told(self, error: BaseException) -> str:
        code = getattr(self.function, "__code__", None)
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if code is not None and frame.filename == code.co_filename] or frames
        return f"{first_line(error)}, at {own[-1].filename}:{own[-1].lineno}"


def load_function(argument: str) -> Callable:
    """The function that `module:name` or `file.py:name` names.

    Raises:
        UserError: it is not of that form, can't be imported, or is no function.
    """
    place, _, name = argument.rpartition(":")
    argument = shown(argument)
    if not place or not name or (place.startswith(".") and not place.endswith(".py")):
        raise UserError(f"function:{argument} does not say which function; write function:FILE.py:NAME")
    try:
        module = _module_of(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise UserError(f"function:{argument}: there is no file {shown(place)}; give the path of one") from None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"function:{argument}: {shown(place)} can't be imported ({first_line(error)}); mend it, or give a "
            f"FILE.py:NAME"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"function:{argument}: {place} has no function {name!r}; define reward(prompts, responses, rows)"
        )
    return function


def _module_of(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    name = f"reward_function_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module


def first_line(error: BaseException) -> str:
    """The kind of an exception, and the first line of what it says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
