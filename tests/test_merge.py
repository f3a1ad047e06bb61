"""Files that come into a folder together: whatever fails, it holds all of them or none, and the user's own files."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import sys
import time
from pathlib import Path

import pytest

from data_prep.custom import prepare_data
from rlhf import merge
from rlhf.data import prepare
from rlhf.errors import UserError
from rlhf.merge import alone, discard, put_in, staging
from tests.data_makers import files, run, save_tokenizers, write_rows
from tests.kill import Counter

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")

NEW = {"args.json": "new", "a.pt": "new", "b.pt": "new"}


def make_old(folder: Path) -> None:
    """Two files that are replaced, one that goes, and a user's own: files, a folder nobody may write to, links."""
    (folder / "mine" / "locked").mkdir(parents=True)
    for name in ("args.json", "a.pt", "stale.pt", "other.pt", "mine/notes", "mine/locked/key"):
        (folder / name).write_text("old")
    (folder / "link").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    (folder / "mine" / "locked").chmod(0o555)
    folder.chmod(0o2750)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Kind, mode and content of all that stands in a folder, but for folders on their way."""
    found = {}
    for path in sorted([folder, *(path for path in folder.rglob("*") if not path.name.startswith(".data."))]):
        mode = path.lstat().st_mode
        content = path.read_text() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else None
        found[path.relative_to(folder).as_posix()] = mode, content
    return found


def bring(folder: Path) -> None:
    """One call from start to end, as a preparation makes it."""
    stage = staging(folder)
    try:
        (stage / "out").mkdir()
        for name, text in NEW.items():
            (stage / "out" / name).write_text(text)
        with alone(folder):
            put_in(folder, stage / "out", instead_of=["a.pt", "stale.pt", "never.pt"])
    finally:
        discard(stage)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.parent.rglob(".*") if path.is_dir()]


DISASTERS = {
    "killed": {},
    "full": {"full": math.inf},
    "failing": {"full": math.inf, "error": errno.EIO},
    "failing once": {"full": 1, "error": errno.EIO},
}


class Killed(BaseException):
    pass


class Breaker(Counter):
    """Breaks this process's operations; from a kill on each of them, so that nothing is tidied up."""

    def die(self) -> None:
        raise Killed


_breakers: list[Breaker] = []


@pytest.fixture(scope="module")
def listening():
    """One audit hook for all breakers, as none can be taken away again."""
    sys.addaudithook(lambda event, arguments: _breakers[-1].hear(event, arguments) if _breakers else None)


def broken(place: Path, moment: int | None, work, **death) -> tuple[BaseException | None, int]:
    """Do `work` with a disaster at a moment; what it ended with, and the operations in `place`."""
    breaker = Breaker(place, moment, **death)
    _breakers.append(breaker)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", breaker.around("fsync", lambda _: None))
            patch.setattr(merge, "exchanged", breaker.around("exchange", merge.exchanged))
            work()
    except (Killed, OSError, UserError) as error:
        return error, breaker.count
    finally:
        _breakers.clear()
    return None, breaker.count


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("disaster", DISASTERS)
@pytest.mark.parametrize("way", ["swapped", "moved", "new"])
def test_c23_at_every_operation_it_is_all_or_nothing(tmp_path, monkeypatch, way, disaster):
    """C23: killed, full or failing at each operation: the folder is wholly the old one or the new one, at once where it
    is exchanged, after the next call's start where files must move one by one; and that next call succeeds."""
    monkeypatch.setattr(merge, "_is_working_directory", lambda _: way == "moved")
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def at(name: str, moment: int | None = None, **death) -> tuple[Path, BaseException | None, int]:
        folder = tmp_path / name / "data"
        folder.parent.mkdir()
        if way != "new":
            make_old(folder)
        return folder, *broken(folder.parent, moment, lambda: bring(folder), **death)

    whole, error, operations = at("whole")
    assert error is None
    old = {} if way == "new" else snapshot_of_old(tmp_path / "old")
    new, ends = snapshot(whole), set()
    assert operations > 12
    for moment in range(1, operations + 1):
        folder, error, _ = at(f"{moment}", moment, **DISASTERS[disaster])
        assert isinstance(error, Killed) == (disaster == "killed")
        if way == "moved" and disaster in ("killed", "failing"):
            discard(staging(folder))
        found = snapshot(folder) if folder.exists() else {}
        assert found in (old, new), f"{moment} of {operations}"
        assert error is not None or found == new
        ends.add(found == new)
        bring(folder)
        assert snapshot(folder) == new
        assert leftovers(folder) == []
    assert ends == {False, True}


def test_the_working_directory_is_not_left_behind(tmp_path, monkeypatch):
    """Who stands in the folder, or deeper in it, stands in it still."""
    make_old(tmp_path / "data")
    for place in ("data", "data/mine"):
        monkeypatch.chdir(tmp_path / place)
        bring(tmp_path / "data")
        assert Path.cwd() == tmp_path / place
    assert Path("../a.pt").read_text() == "new"


def snapshot_of_old(folder: Path) -> dict[str, tuple]:
    make_old(folder)
    return snapshot(folder)


def test_what_stays_is_the_same_file(tmp_path, monkeypatch):
    """Exchanged or moved: what stays keeps its inode and times, and what was there in the folder's place is gone."""
    for name in ("swapped", "moved"):
        folder = tmp_path / name
        make_old(folder)
        before = {p: (folder / p).lstat() for p in ("other.pt", "mine/notes", "mine/locked/key", "link", "pipe")}
        inode = folder.stat().st_ino
        if name == "moved":
            monkeypatch.setattr(merge, "exchanged", lambda *_: False)
        bring(folder)
        for path, then in before.items():
            now = (folder / path).lstat()
            assert (now.st_ino, now.st_mtime_ns) == (then.st_ino, then.st_mtime_ns), path
        assert (folder.stat().st_ino == inode) == (name == "moved")
        assert sorted(p.name for p in folder.iterdir()) == [
            "a.pt", "args.json", "b.pt", "link", "mine", "other.pt", "pipe",
        ]  # fmt: skip
        assert leftovers(folder) == []


@pytest.mark.parametrize("refused", ["link", "chown"])
def test_where_the_files_cannot_be_linked_they_move(tmp_path, monkeypatch, refused):
    """A file system without hard links; files of another's, whose owner could not be kept."""

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    folder = tmp_path / "data"
    make_old(folder)
    monkeypatch.setattr(merge.os, refused, refuse)
    if refused == "chown":
        monkeypatch.setattr(merge, "_owner", lambda found: (found.st_ino, 0))  # none is like another
    inode = folder.stat().st_ino
    bring(folder)
    assert folder.stat().st_ino == inode
    assert {name: (folder / name).read_text() for name in NEW} == NEW
    assert leftovers(folder) == []


def test_a_mount_point_is_prepared_in_itself(tmp_path, monkeypatch):
    """Where nothing can be renamed into the folder from beside it, nor beside it made: in the folder."""
    folder = tmp_path / "data"
    make_old(folder)
    rename = os.rename

    def within_one_device(source, target):
        if (Path(source).parent == tmp_path) != (Path(target).parent == tmp_path):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(merge.os, "rename", within_one_device)
    stage = staging(folder)
    assert stage.parent == folder
    discard(stage)
    bring(folder)
    assert {name: (folder / name).read_text() for name in NEW} == NEW
    assert leftovers(folder) == []


def test_what_others_write_meanwhile_is_not_lost(tmp_path, monkeypatch):
    """A run that stores a file beside the data between the linking and the exchange, anew or in a file's place."""
    folder, swap = tmp_path / "data", merge.exchanged
    make_old(folder)

    def late(one, other):
        (folder / "mine" / "later").write_text("new")
        (folder / "logps").mkdir()
        (folder / "logps" / "x").write_text("new")
        (folder / "fresh").write_text("new")
        os.replace(folder / "fresh", folder / "other.pt")
        return swap(one, other)

    monkeypatch.setattr(merge, "exchanged", late)
    bring(folder)
    for name in ("mine/later", "logps/x", "other.pt"):
        assert (folder / name).read_text() == "new", name
    assert not (folder / "stale.pt").exists()


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "data" / "a.pt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"data/a\.pt is a folder, and a file must go there; move it away"):
        bring(tmp_path / "data")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "a.pt"]


def test_a_journal_reaches_no_other_folder(tmp_path):
    """One that came with somebody's data, of names that lead out of the folder; one that is no journal."""
    folder = tmp_path / "data"
    for text in (json.dumps({"new": ["../precious", ".", "mine"], "gone": ["../x"]}), "[1", "[]"):
        stage = folder / ".data.999999999.tmp"
        (stage / "before").mkdir(parents=True)
        (stage / merge.JOURNAL).write_text(text)
        (tmp_path / "precious").write_text("here")
        (folder / "mine").write_text("mine")
        discard(staging(folder))
        assert (tmp_path / "precious").read_text() == "here"
        assert leftovers(folder) == []


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return save_tokenizers(tmp_path_factory)


PAIRS = [{"prompt": f"a {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(9)]


def test_two_stages_prepared_at_one_time(tmp_path, tokenizers, monkeypatch):
    """The one that is done while the other's files come in waits for it, and both stages are there."""
    folder, put = tmp_path / "data", prepare.put_in

    def slowly(*arguments, **options):
        (tmp_path / "begun").touch()
        time.sleep(0.5)
        put(*arguments, **options)

    for stage in ("finetune", "preference"):
        write_rows(tmp_path / "source" / f"{stage}.jsonl", PAIRS)
    first = os.fork()
    if first == 0:
        status = 1
        try:
            prepare.put_in = slowly
            run(prepare_data, tmp_path, tokenizers, PAIRS, stage="finetune")
            status = 0
        finally:
            os._exit(status)
    began = time.monotonic()
    while not (tmp_path / "begun").exists() and time.monotonic() - began < 60:
        time.sleep(0.01)
    run(prepare_data, tmp_path, tokenizers, PAIRS, stage="preference")
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0
    assert set(json.loads((folder / "args.json").read_text())["stages"]) == {"finetune", "preference"}
    assert sorted(path.name for path in folder.iterdir()) == files("finetune", "preference")


def test_a_link_to_a_folder_stays_one(tmp_path, tokenizers):
    """`--destination_dir` that is a link: what it points to is prepared."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "real")
    run(prepare_data, tmp_path, tokenizers, PAIRS, stage="preference")
    run(prepare_data, tmp_path, tokenizers, PAIRS, stage="preference")
    assert (tmp_path / "data").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk" / "real").iterdir()) == files("preference")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
