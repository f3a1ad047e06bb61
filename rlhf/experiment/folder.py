"""Whose an experiment folder is: one run at a time writes there."""

from __future__ import annotations

from pathlib import Path

from rlhf import locks
from rlhf.errors import UserError

LOCK = "lock.json"
"""The file in an experiment folder that its run has locked; it says which process that is, or was last."""


def check_new(folder: Path) -> None:
    """Refuse a folder that a run has written to.

    Raises:
        UserError: there is one.
    """
    if (folder / "args.json").exists():
        raise UserError(f"--experiment_dir={folder} holds a run already; give another folder, or --resume=True")


def take_folder(folder: Path, *, new: bool) -> None:
    """Keep every other run out of the folder until `leave_folder`, or the end of this process, whatever ends it.

    Args:
        new: no run may have written to it.

    Raises:
        UserError: another run has it, or with `new` had it; nothing of it is touched.
        WriteError: it can't be written to.
    """
    try:
        if not locks.take(folder / LOCK):
            print(f"note: {folder} is on a file system without locks; see to it that no other run writes there")
    except locks.LockedError as holder:
        raise UserError(
            f"--experiment_dir={folder} is in use by {holder}; let that run end, or stop it, or give another folder"
        ) from None
    if new:
        try:
            check_new(folder)
        except UserError:
            leave_folder(folder)
            raise


def leave_folder(folder: Path) -> None:
    """Let other runs in."""
    locks.let_go(folder / LOCK)
