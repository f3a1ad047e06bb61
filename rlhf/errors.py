"""The exceptions that a user is meant to read."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn

LAST_WORDS: list[Callable[[str], None]] = []
"""Called with a process's last sentence before it ends with an error: the other processes of a run want to know."""


def leave(status: int) -> NoReturn:
    """End this process, which has said why.

    One of several ends at once, after what is registered with `atexit`: threads of the process group may still be
    letting go of tensors, and one that does so while the interpreter shuts down aborts it, with another status.
    """
    if not LAST_WORDS:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class UserError(Exception):
    """A mistake of the user's: a flag, a path, a row, a file or a model.

    The message is one sentence that names the thing, where it is, and what would be right. The scripts print
    it without a traceback and exit with its status (`rlhf.flags.launch`).
    """

    status = 2


class NonFiniteError(UserError):
    """Numbers that are not finite. A step with them may be skipped (`Step.skip`); an evaluation goes without them."""
