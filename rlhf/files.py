"""Files and folders that appear whole or not at all: written beside, synced, renamed."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

_LEFTOVER = re.compile(r"\.(?P<target>.+)\.(?P<pid>\d+)\.(?P<kind>tmp|old)")
_EXCHANGE, _FROM_HERE = 2, -100  # RENAME_EXCHANGE, AT_FDCWD of Linux
_OF_THE_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES}
"""Errors that say something of where is written, not of what: full, over the quota, over a limit, unreachable."""


class WriteError(UserError):
    """Something could not be written: a full disk, a quota, a limit on file sizes, a disk that fails.

    Attributes:
        reason: what the system said; None where the room was found too small beforehand.
    """

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the libraries raise when they cannot write `path`, or part of it, into one sentence.

    Raises:
        WriteError: naming the path, the reason and the free space.
    """
    try:
        yield
    except Exception as error:
        reason = error.reason if isinstance(error, WriteError) else _write_fault(error, Path(path).absolute().parent)
        if reason is None:
            raise
        raise WriteError(
            f"{path} cannot be written: {reason} ({shown_bytes(free_bytes(path))} are free); make room there",
            reason=reason,
        ) from error


def _write_fault(error: Exception, folder: Path) -> str | None:
    """Why a write into `folder` failed; None for an error of another kind, or about a file elsewhere.

    Native writers put the number into their text alone.
    """
    name = getattr(error, "filename", None)
    if isinstance(name, str):
        place = Path(name).absolute()
        if not (place.is_relative_to(folder) or folder.is_relative_to(place)):
            return None
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number in _OF_THE_PLACE:
        return os.strerror(number)
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch.save says no more
        return "torch could not write all of it"
    return None


def free_bytes(path: str | Path) -> int:
    """Bytes that this user may still write on the disk of `path`, which need not exist."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def shown_bytes(count: int) -> str:
    """A number of bytes for people.

    >>> shown_bytes(0), shown_bytes(1_499_999), shown_bytes(23_000_000_000)
    ('0.0 MB', '1.5 MB', '23.0 GB')
    """
    return f"{count / 1e9:,.1f} GB" if count >= 1e10 else f"{count / 1e6:,.1f} MB"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`, else remove it.

    Raises:
        WriteError: the disk has no room for it, or fails; what stood at `path` still does.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_write(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text(), [p.name for p in target.parent.iterdir()]
    ('whole', ['a.txt'])
    """
    path = Path(path)
    temporary = beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success sync all of it and rename it to `path`, else remove it.

    A folder that already stands at `path` changes places with the new one in one system call. Where the system has
    no such call it is moved aside first and removed last, and `sweep` puts it back if the process dies in between.

    Raises:
        WriteError: the disk has no room for it, or fails; what stood at `path` still does.
    """
    path = Path(path)
    temporary, aside = beside(path), beside(path, "old")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    sync(Path(folder) / name)
                sync(Path(folder))
            if not path.exists():
                os.replace(temporary, path)
            elif not exchanged(temporary, path):
                os.replace(path, aside)
                try:
                    os.replace(temporary, path)
                except OSError:
                    os.replace(aside, path)
                    raise
            sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)


def remove_dir(path: Path) -> None:
    """Remove a folder, which is gone from its name at once; what cannot be removed now is left to `sweep`.

    Raises:
        WriteError: the disk fails.
    """
    temporary = beside(path)
    with writing(path):
        shutil.rmtree(temporary, ignore_errors=True)
        os.replace(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target`, in the place of the one that may stand there."""
    temporary = beside(path)
    with writing(path):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, path)
        sync(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all.

    Raises:
        WriteError: the disk has no room for it, or fails.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sweep(folder: Path, *, target: str | None = None, is_alive: Callable[[int], bool] | None = None) -> list[str]:
    """Clear `folder` of what processes left that died while they wrote there; returns the names that are gone.

    Only names of this module's pattern are touched, and those of another living process are left alone. A folder
    that was moved aside is put back where its successor never came.

    Args:
        target: only what was on its way to this name; unless given, to any.
        is_alive: process id to whether that process, another than this one, still runs.
    """
    gone = []
    for path in sorted(folder.glob(".*")) if folder.is_dir() else []:
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or target not in (None, found["target"]):
            continue
        place = folder / found["target"]
        if found["kind"] == "old" and not os.path.lexists(place):
            os.replace(path, place)
        elif _is_gone(int(found["pid"]), is_alive or _is_alive):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        else:
            continue
        gone.append(path.name)
    return gone


def beside(path: Path, kind: str = "tmp") -> Path:
    """A name beside `path`, of this process, that `sweep` knows."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _is_gone(pid: int, is_alive: Callable[[int], bool]) -> bool:
    return pid == os.getpid() or not is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def is_leftover(path: Path, target: str) -> bool:
    """Whether `path` has a name by `beside`, on its way to `target`, of a process that runs no more."""
    found = _LEFTOVER.fullmatch(path.name)
    return found is not None and found["target"] == target and _is_gone(int(found["pid"]), _is_alive)


def exchanged(one: Path, other: Path) -> bool:
    """Let two names change places at once; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other), _EXCHANGE) == 0


def sync(path: Path) -> None:
    """Bring a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claimed(folder: Path) -> Path:
    """Make a folder that nobody else has: this one, or with -2, -3 and so on where other runs have taken its name.

    Runs that start in one second, or in an hour that the clock repeats, come to the same name.
    """
    names = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
    name = folder
    while True:
        try:
            name.mkdir(parents=True)
        except FileExistsError:
            name = next(names)
        except OSError:
            return name  # the first write into it says why
        else:
            return name
