"""Files that come into a folder together: all of them or none, whatever fails and whenever the process dies.

The folder changes places, in one system call, with a new one that holds links to everything that stays. Where that
cannot be (a mount point; the working directory, which would stay behind in the old folder; a file system without hard
links or without that call; files that belong to others) the files move in one by one, with a journal: an error brings
back what was there, and after a kill the next `staging` does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from rlhf.errors import UserError
from rlhf.files import beside, exchanged, is_leftover, sweep, sync, write_json
from rlhf.locks import locked

JOURNAL = "journal.json"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold off others that would bring files into `folder`, after waiting for those who do.

    The lock is that of the folder above, which stays where it is when `folder` itself is exchanged.
    """
    above = next(path for path in folder.parents if path.is_dir())
    place = next((path for path in (above, folder) if os.access(path, os.R_OK)), None)
    with locked(place) if place is not None else nullcontext():
        yield


def staging(folder: Path) -> Path:
    """Make an empty folder of this process on the file system of `folder`, where what is to come into it is made.

    It lies beside `folder`, or in it where that is a mount point or the folder above belongs to somebody else.

    Args:
        folder: an absolute path without links; it need not exist.

    Raises:
        OSError: it can't be made.
    """
    outside, inside = beside(folder), folder / beside(folder).name
    with alone(folder):
        _recover(folder)
        if not folder.is_dir():
            outside.mkdir(parents=True)
            return outside
        try:
            outside.mkdir()
            os.rename(outside, inside)  # only within one file system, and one mount of it
            os.rename(inside, outside)
        except OSError:
            with suppress(OSError):
                outside.rmdir()
            inside.mkdir(exist_ok=True)
            return inside
        return outside


def put_in(folder: Path, new: Path, *, instead_of: Collection[str]) -> None:
    """Bring the files of `new` into `folder`, in the place of those of the same names and of `instead_of`.

    Everything else that stands there stays: files, links and folders, their owners and modes. Hold `alone(folder)`
    around it.

    Args:
        new: a folder of files within `staging(folder)`; it is used up.

    Raises:
        OSError, WriteError: it failed, and everything is as it was.
        UserError: a folder stands where a file should go.
    """
    names = {path.name for path in new.iterdir()}
    for name in names:
        sync(new / name)
    if not folder.is_dir():
        os.replace(new, folder)
    else:
        gone = {name for name in {*names, *instead_of} if os.path.lexists(folder / name)}
        for name in sorted(gone):
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                raise UserError(f"{folder / name} is a folder, and a file must go there; move it away")
        if not _swapped(folder, new, gone):
            _moved(folder, new, names, gone)
    sync(folder.parent)


def discard(stage: Path) -> None:
    """Remove a `staging` folder, unless it holds what could not be brought back yet."""
    if not (stage / JOURNAL).exists():
        _remove(stage)


def _recover(folder: Path) -> None:
    """Put right what processes left that died in `put_in`, and remove their `staging` folders."""
    for place in (folder.parent, folder):
        for stage in place.iterdir() if place.is_dir() else ():
            if is_leftover(stage, folder.name) and stage.is_dir() and not stage.is_symlink():
                _roll_back(folder, stage)
                _loosen(stage)
        sweep(place, target=folder.name)


def _swapped(folder: Path, new: Path, gone: Collection[str]) -> bool:
    """Exchange `folder` for one with links to the new files and to all but `gone`; False where that can't be done."""
    stage, whole = new.parent, new.parent / "whole"
    if stage.parent == folder or _is_working_directory(folder):
        return False
    try:
        _link_all(folder, whole, leave_out=gone)
        for path in new.iterdir():
            os.link(path, whole / path.name)
        sync(whole)
        done = exchanged(whole, folder)
    except OSError:
        done = False
    if done:
        try:
            _follow(whole, folder, leave_out=gone)
        except OSError as error:
            print(f"warning: what came into {folder} in these seconds may be lost ({error})")
    _remove(whole)
    return done


def _is_working_directory(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except OSError:
        return False


def _link_all(source: Path, target: Path, *, leave_out: Collection[str] = ()) -> None:
    """Make `target` a folder like `source`: the same files (hard links), its folders anew, modes and owners kept."""
    target.mkdir()
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.name in leave_out:
                continue
            if entry.is_dir(follow_symlinks=False):
                _link_all(Path(entry.path), target / entry.name)
            else:
                os.link(entry.path, target / entry.name, follow_symlinks=False)
    theirs = _owner(source.stat())
    if theirs != _owner(target.stat()):
        os.chown(target, *theirs)
    sync(target)
    shutil.copystat(source, target)


def _owner(found: os.stat_result) -> tuple[int, int]:
    return found.st_uid, found.st_gid


def _follow(old: Path, folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """Take over what others have written into the old folder since it was linked."""
    with os.scandir(old) as entries:
        for entry in entries:
            place = folder / entry.name
            if entry.name in leave_out:
                continue
            if not os.path.lexists(place):
                os.rename(entry.path, place)
            elif entry.is_dir(follow_symlinks=False):
                _follow(Path(entry.path), place)
            elif entry.inode() != place.lstat().st_ino and entry.stat().st_mtime_ns > place.stat().st_mtime_ns:
                os.replace(entry.path, place)


def _moved(folder: Path, new: Path, names: Collection[str], gone: Collection[str]) -> None:
    """Move `gone` out and the new files in, `args.json` last; an error or an interruption brings all back."""
    stage = new.parent
    before = stage / "before"
    before.mkdir()
    write_json(stage / JOURNAL, {"new": sorted(names), "gone": sorted(gone)})
    try:
        for name in sorted(gone):
            os.replace(folder / name, before / name)
        for name in sorted(names, key=lambda name: (name == "args.json", name)):
            os.replace(new / name, folder / name)
        sync(folder)
        (stage / JOURNAL).unlink()  # from here on it is done
    except BaseException:
        _roll_back(folder, stage)
        raise


def _roll_back(folder: Path, stage: Path) -> None:
    """Bring back what stood in `folder` before the `_moved` of this journal, if it did not come to its end."""
    try:
        plan = json.loads((stage / JOURNAL).read_text(encoding="utf-8"))
        new, gone = ([name for name in plan[key] if Path(name).name == name] for key in ("new", "gone"))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return
    for name in new:
        if name not in gone:
            (folder / name).unlink(missing_ok=True)
    for name in gone:
        if os.path.lexists(stage / "before" / name):
            os.replace(stage / "before" / name, folder / name)
    sync(folder)
    (stage / JOURNAL).unlink()


def _remove(tree: Path) -> None:
    _loosen(tree)
    shutil.rmtree(tree, ignore_errors=True)


def _loosen(tree: Path) -> None:
    """Let this user remove what lies in the folders of a tree, also in those that were linked without that right."""
    for folder, _, _ in os.walk(tree):
        with suppress(OSError):
            os.chmod(folder, 0o700)
