"""Full disks: simulated at any operation, real limits on file sizes for native writers, and too little room."""

from __future__ import annotations

import errno
import math
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest

from data_prep.custom import prepare_data
from rlhf import files
from rlhf.experiment import logs
from rlhf.experiment.checkpoints import SMALL_FILES
from rlhf.experiment.logs import Lines
from rlhf.files import WriteError, atomic_dir, atomic_write, remove_dir, sweep, write_json
from tests.data_makers import dialogue_rows, write_rows
from tests.kill import World, differences, in_child, moments
from tests.splits import metrics_of, tokenizer_for
from tests.test_checkpoints import Lab, store_in

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each run")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.make(tmp_path_factory.mktemp("disk") / "world")


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> dict[str, tuple[Path, int]]:
    found = {}
    for script in ("sft", "ppo"):
        folder = tmp_path_factory.mktemp("whole") / script
        found[script] = folder, in_child(world.run(script, folder), folder).operations
    return found


def one_sentence(output: str) -> bool:
    return output.count("error: ") == 1 and "Traceback" not in output


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_c23_a_disk_that_stays_full_costs_nothing_that_was_whole(world, whole, tmp_path, script):
    """C23: ENOSPC from some operation on: a sentence, status 2 and no half file; with room again the run ends as the
    one that always had it."""
    straight, operations = whole[script]
    for moment in moments(operations - 1, 4, seed=1):  # the last one removes a file, which needs no room
        folder = tmp_path / f"{moment}"
        full = in_child(world.run(script, folder), folder, moment=moment, full=math.inf)
        assert (full.status, one_sentence(full.output)) == (2, True), full.output
        assert "No space left on device" in full.output
        assert leftovers(folder) == []
        again = in_child(world.run(script, folder, resume=folder.exists()), folder)
        assert again.status == 0, again.output
        assert differences(straight, folder) == [], f"full from operation {moment} of {operations}"


def test_c23_a_disk_that_is_full_for_a_while_stops_no_training(world, whole, tmp_path):
    """C23: full while a checkpoint is written, and no longer: a warning, and all that comes later is there."""
    straight, operations = whole["sft"]
    for moment in range(operations // 3, operations, operations // 12):
        folder = tmp_path / f"{moment}"
        tried = in_child(world.run("sft", folder), folder, moment=moment, full=10)
        assert tried.status == 0, tried.output
        if "warning: no checkpoint after step" in tried.output:
            break
    assert "No space left on device" in tried.output
    found = differences(straight, folder)
    assert all(name.startswith("checkpoints/step-") for name in found), found
    assert not any("step-00000005" in name for name in found), found


def test_c23_all_processes_of_a_run_hear_of_a_full_disk(world, tmp_path):
    """C23: the first one writes; where it cannot, both say the same sentence and end with status 2."""
    folder = tmp_path / "run"
    work = world.run("sft", folder, devices="2", strategy="ddp", logger="none")
    full = in_child(work, folder, processes=2, moment=60, full=math.inf)
    assert (full.status, full.others) == (2, (2,)), full.output
    assert full.output.count("error: ") == 2
    assert leftovers(folder) == []


def limited(world: World, folder: Path, limit: int, **given):
    """A run whose files must not pass `limit` bytes: EFBIG from the system, also for native writers."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        world.run("sft", folder, logger="none", **given)()

    return in_child(work, folder)


def test_c23_native_writers_that_fail_are_one_sentence(world, whole, tmp_path):
    """C23: safetensors that cannot finish the model; torch that cannot finish the optimiser's state, twice as large."""
    straight, _ = whole["sft"]
    size = (straight / "final" / "model.safetensors").stat().st_size
    small = limited(world, tmp_path / "small", size // 2)
    assert (small.status, one_sentence(small.output)) == (2, True), small.output
    assert "/final cannot be written: File too large" in small.output
    assert "warning: no checkpoint after step 2" in small.output
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "args.json", "checkpoints", "data.json", "environment.json", "lock.json", "metrics.jsonl",
        "samples.jsonl",
    ]  # fmt: skip
    middle = limited(world, tmp_path / "middle", size * 3 // 2)
    assert middle.status == 0, middle.output
    assert "warning: no checkpoint after step 4" in middle.output
    assert [path.name for path in (tmp_path / "middle" / "checkpoints").iterdir()] == ["best"]
    assert leftovers(tmp_path) == []
    assert differences(straight / "final", tmp_path / "middle" / "final") == []


def test_c34_the_bytes_needed_are_compared_with_the_room(tmp_path, monkeypatch, world):
    """C34: what is asked for covers what is written, and little more; the older checkpoint stays."""
    store, lab = store_in(tmp_path, 1), Lab(world.policy).step()
    lab.save(store, 1)
    written = sum(path.stat().st_size for path in (store.folder / "step-00000001").rglob("*") if path.is_file())
    asked = []
    monkeypatch.setattr("rlhf.experiment.checkpoints.free_bytes", lambda path: asked.append(path) or written)
    with pytest.raises(WriteError, match=r"step-00000002 needs (.*) MB and (.*) MB are free there; make room") as error:
        lab.save(store, 2)
    needed = float(str(error.value).split(" needs ")[1].split(" MB")[0]) * 1e6
    assert written <= needed <= written + SMALL_FILES
    with pytest.raises(WriteError, match="best needs"):
        store.save_best(2, lab.policy, tokenizer_for(), "val/x", 1.0, higher=True)
    assert [path.name for path in store.steps()] == ["step-00000001"]
    assert len(asked) == 2


@pytest.fixture
def prepared(tmp_path, world):
    """A call that prepares data, for `in_child`, over a folder that holds some already."""
    rows = [
        {"prompt": row["chosen"][:20], "chosen": row["chosen"][20:], "rejected": row["rejected"][20:] + " no"}
        for row in dialogue_rows(40)
    ]
    source = write_rows(tmp_path / "source" / "rows.jsonl", rows)

    def work(name: str = "data"):
        flags = prepare_data.PrepareFlags(
            dataset_path=source, destination_dir=str(tmp_path / name), tokenizer_name=world.policy, stage="preference",
            validation_percentage=0.2,
        )  # fmt: skip
        return lambda: prepare_data.main(flags)

    return work


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_c23_preparing_data_on_a_full_disk_leaves_what_was_there(prepared, tmp_path):
    """C23: ENOSPC at some operation, and a real limit on file sizes: one sentence, status 2, nothing half."""
    first = in_child(prepared(), tmp_path)
    assert first.status == 0, first.output
    before = contents(tmp_path / "data")
    for moment in [*range(4, first.operations, 9), first.operations - 1]:
        full = in_child(prepared(), tmp_path, moment=moment, full=math.inf)
        assert (full.status, one_sentence(full.output)) == (2, True), full.output
        assert re.search(r"/data can(not|'t) be written.*No space left on device", full.output), full.output
        assert contents(tmp_path / "data") == before
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["data", "source"]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["preference_train.pt"]) // 2, resource.RLIM_INFINITY))
        prepared("new")()

    cut = in_child(limit, tmp_path)
    assert (cut.status, "cannot be written: File too large" in cut.output) == (2, True), cut.output
    assert not (tmp_path / "new").exists()


def test_c23_preparing_data_that_is_killed_is_done_again(prepared, tmp_path):
    """C23: killed at any operation there is no folder or a whole one; what is left beside it the next one clears."""
    first = in_child(prepared("whole"), tmp_path)
    whole, ends = contents(tmp_path / "whole"), []
    splits = [name for name in whole if name.startswith("preference_")]
    for moment in [*range(1, first.operations, 9), *range(first.operations - 3, first.operations + 1)]:
        died = in_child(prepared(), tmp_path, moment=moment)
        assert died.status == -signal.SIGKILL
        ends.append((tmp_path / "data").exists())
        if ends[-1]:
            found = contents(tmp_path / "data")
            assert found.keys() == whole.keys()
            assert all(found[name] == whole[name] for name in splits)
            shutil.rmtree(tmp_path / "data")
    assert (ends[0], ends[-1]) == (False, True)
    assert in_child(prepared(), tmp_path).status == 0
    assert leftovers(tmp_path) == []
    assert all(contents(tmp_path / "data")[name] == whole[name] for name in splits)


DEAD, ALIVE = 999_999_999, 1


def make(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(path.name)
    return path


def test_c23_what_dead_processes_left_is_swept(tmp_path):
    """Only our own names, and none of a living process; a folder moved aside comes back where none took its place."""
    make(tmp_path / f".step-1.{DEAD}.tmp")
    make(tmp_path / f".best.{DEAD}.old")
    make(tmp_path / "other")
    make(tmp_path / f".other.{DEAD}.old")
    (tmp_path / f".last.{os.getpid()}.tmp").symlink_to("nowhere")
    kept = {f".step-2.{ALIVE}.tmp", ".hidden", ".step-3.tmp", "a.1.tmp"}
    for name in kept:
        (tmp_path / name).touch()
    assert sweep(tmp_path, target="none", is_alive=lambda pid: pid == ALIVE) == []
    gone = sweep(tmp_path, is_alive=lambda pid: pid == ALIVE)
    assert set(gone) == {
        f".step-1.{DEAD}.tmp", f".best.{DEAD}.old", f".other.{DEAD}.old", f".last.{os.getpid()}.tmp",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == kept | {"best", "other"}
    assert (tmp_path / "best" / "file").read_text() == f".best.{DEAD}.old"
    assert (tmp_path / "other" / "file").read_text() == "other"
    assert sweep(tmp_path / "none") == []


@pytest.mark.parametrize("at_once", [True, False])
def test_c23_a_folder_is_replaced_without_a_moment_without_one(tmp_path, monkeypatch, at_once):
    """Where the system can exchange names there is always a whole folder; elsewhere the old one comes back."""
    target = make(tmp_path / "best")
    seen, replace, exchanged = [], os.replace, files.exchanged

    def watched(*arguments):
        replace(*arguments)
        seen.append(target.exists())

    monkeypatch.setattr(files.os, "replace", watched)
    monkeypatch.setattr(files, "exchanged", exchanged if at_once else lambda *_: False)
    with atomic_dir(target) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert seen == ([] if at_once and exchanged(make(tmp_path / "a"), make(tmp_path / "b")) else [False, True])
    assert leftovers(tmp_path) == []


def test_c23_a_failed_write_names_the_file_and_what_is_free(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"a": 1})

    def fail(error: Exception) -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise error

    for error, words in (
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(122, "Disk quota exceeded"), "Disk quota exceeded"),
        (Exception("File too large (os error 27)"), "File too large"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5 vs 3"), "could not write all"),
    ):
        with pytest.raises(WriteError, match=rf"a\.json cannot be written: .*{words}.* \(.* are free\); make room"):
            fail(error)
    for error in (ValueError("no number"), OSError(2, "No such file"), OSError(13, "Permission denied", "/elsewhere")):
        with pytest.raises(type(error), match=str(error.args[-1])) as raised:
            fail(error)
        assert raised.value is error
    assert contents(tmp_path) == {"a.json": b'{\n  "a": 1\n}\n'}
    with pytest.raises(WriteError, match="Permission denied"):
        fail(PermissionError(13, "Permission denied", str(tmp_path / "x")))


def test_c23_a_removed_folder_is_never_half(tmp_path, monkeypatch):
    """Its name goes first; what could not be removed (a file that is still open elsewhere, on NFS) goes later."""
    target = make(tmp_path / "step-1")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: None)
        remove_dir(target)
    assert leftovers(tmp_path) == [f".step-1.{os.getpid()}.tmp"]
    assert sweep(tmp_path) == [f".step-1.{os.getpid()}.tmp"]
    assert leftovers(tmp_path) == []


def test_c23_lines_wait_for_room(tmp_path, monkeypatch, capsys):
    """A full disk keeps lines out, but none is lost, doubled or cut, and it is said once."""
    lines = Lines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15, limits[1]))
        lines.write({"step": 2})
        lines.write({"step": 3})
        with pytest.raises(WriteError, match=r"metrics\.jsonl cannot be written"):
            lines.sync()
        assert metrics_of(tmp_path) == [{"step": 1}]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    lines.write({"step": 4})
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("its lines wait in memory") == 1
    assert lines.sync() == (tmp_path / "metrics.jsonl").stat().st_size


def test_c23_the_lines_that_wait_are_bounded(tmp_path, monkeypatch, capsys):
    """Room for 30 waiting bytes, lines of 12: of six the last two are kept, and the four lost ones are counted; then a
    second time, with a count of its own."""
    monkeypatch.setattr(logs, "MOST_WAITING", 30)
    lines, append = Lines(tmp_path / "metrics.jsonl", 0), Lines._append

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for first in (1, 7):
        with monkeypatch.context() as patch:
            patch.setattr(Lines, "_append", full)
            for step in range(first, first + 6):
                lines.write({"step": step})
        append(lines)
    assert [line["step"] for line in metrics_of(tmp_path)] == [5, 6, 11, 12]
    assert lines.lost == 8
    printed = capsys.readouterr().out
    assert printed.count("its lines wait in memory") == 2
    assert printed.count("from here on the oldest are lost") == 2
    assert printed.count("can be written again, and 4 of its lines are lost") == 2
