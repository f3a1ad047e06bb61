"""The exceptions that a user is meant to read."""

from __future__ import annotations

from collections.abc import Callable

LAST_WORDS: list[Callable[[str], None]] = []
"""Called with a process's last sentence before it ends with an error: the other processes of a run want to know."""


class UserError(Exception):
    """A mistake of the user's: a flag, a path, a row, a file or a model.

    The message is one sentence that names the thing, where it is, and what would be right. The scripts print
    it without a traceback and exit with its status (`rlhf.flags.launch`).
    """

    status = 2


class NonFiniteError(UserError):
    """Numbers that are not finite. A step with them may be skipped (`Step.skip`); an evaluation goes without them."""
