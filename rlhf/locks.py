"""Locks on files and folders. The system frees them with the process that holds them, however it ends.

They hold between processes; on a network file system that has locks, between machines too. A process that is forked
holds none of its parent's, so that a worker which outlives the process it works for keeps nobody out.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf.errors import UserError
from rlhf.files import writing

try:
    import fcntl
except ImportError:  # no file locks there
    fcntl = None

PATIENCE = 0.5
"""Seconds for which a lock is asked for again: a process that is just dying, or being forked, may still hold it."""

_NOTE_BYTES = 1000
_held: dict[tuple[int, int], int] = {}
"""The open file of each lock that this process has taken, by device and inode."""


class LockedError(Exception):
    """Another process has the lock; the text says which, as far as that is known."""


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the lock of the file or folder at `path`, waiting for it; without it where the file system has none."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def take(path: Path) -> bool:
    """Take the lock of the file at `path`, made where there is none, until `let_go` or the end of this process.

    The file says who has the lock, or had it last. A process may take a lock again that it holds.

    Returns:
        False where the file system has no locks.

    Raises:
        LockedError: another process has it.
        WriteError: the file cannot be made.
        UserError: what stands there is no file.
    """
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise UserError(f"{path} can't be opened ({error.strerror}); remove it") from None
    kept = False
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is no file; remove it")
        if (found.st_dev, found.st_ino) in _held:
            return True
        if not _taken(descriptor):
            return False
        kept = True
        _held[found.st_dev, found.st_ino] = descriptor
        with suppress(OSError):  # on a full disk the lock holds without its note
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _note(), 0)
        return True
    except BlockingIOError:
        raise LockedError(_holder(descriptor)) from None
    finally:
        if not kept:
            os.close(descriptor)


def let_go(path: Path) -> None:
    """Free the lock of the file at `path`, if this process has it."""
    with suppress(OSError):
        found = path.stat()
        descriptor = _held.pop((found.st_dev, found.st_ino), None)
        if descriptor is not None:
            os.close(descriptor)


def _taken(descriptor: int) -> bool:
    """Take a lock; False where there are none. Raises BlockingIOError where another process keeps it."""
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - began > PATIENCE:
                raise
            time.sleep(PATIENCE / 10)
        except (AttributeError, OSError):
            return False
        else:
            return True


def _note() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return (json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n").encode()


def _holder(descriptor: int) -> str:
    """What a lock file says of its holder, for people; no more than that there is one where it says nothing."""
    try:
        note = json.loads(os.pread(descriptor, _NOTE_BYTES, 0))
        process, host, since = int(note["process"]), str(note["host"]), str(note["since"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "another process"
    return f"process {process} on {host!r} (since {since!r})"


def _forget() -> None:
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)
