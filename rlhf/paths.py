"""Paths that a user gives: looked at before any work is done, so that a wrong one costs no time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rlhf.errors import UserError


def check_path(path: str | Path, flag: str) -> bool:
    """Whether something is there, at a path that may as well be a hub id or a folder to be made.

    Raises:
        UserError: the system can't say: the name is too long, goes in circles, or stands where nobody may look.
    """
    try:
        os.stat(Path(path).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, RuntimeError) as error:
        reason = (getattr(error, "strerror", None) or "no path of this system").lower()
        text = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
        raise UserError(f"--{flag}={text} can't be looked up ({reason}); give another path") from None
    return True


def check_writable(folder: str | Path, flag: str) -> None:
    """Refuse a folder that could not be made, or not be written to. Nothing is left behind.

    Raises:
        UserError: it is a file, lies inside one, or the system lets nobody write there.
    """
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        what = "is a file" if there == folder else f"lies inside {there}, which is a file"
        raise UserError(f"--{flag}={folder} {what}; give a folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".write-test.", suffix=f".{os.getpid()}.tmp", dir=there))  # `sweep` knows it
    except OSError as error:
        reason = (error.strerror or "no reason given").lower()
        raise UserError(f"--{flag}={folder} can't be written ({reason}); give a folder of your own") from None
