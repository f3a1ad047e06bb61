"""metrics.jsonl, samples.jsonl, environment.json, and a logger beside them."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger

from rlhf.errors import UserError
from rlhf.files import WriteError, atomic_write, remove_dir, shown_bytes, writing

BLOCK_BYTES = 1 << 16
MOST_WAITING = 16 << 20
"""Bytes of lines of one file that wait in memory for room on the disk."""


class Logs:
    """The first device's logs.

    Args:
        sizes: bytes of each file, as `sizes()` gave them with the checkpoint that is resumed: what was written after
            it is cut off, whether that was lines of steps that are done again or half a line. Files that it does not
            name are begun anew.
    """

    def __init__(self, folder: Path, logger: str, script: str, *, sizes: dict[str, int] | None = None) -> None:
        self._folder, sizes = folder, sizes or {}
        self._metrics, self._samples = (Lines(folder / n, sizes.get(n, 0)) for n in ("metrics.jsonl", "samples.jsonl"))
        for path in self._events():
            size = sizes.get(path.relative_to(folder).as_posix())
            path.unlink() if size is None else _cut(path, size)
        self._logger = _make_logger(logger, folder, script)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, null for what is not finite (JSON has no NaN); the logger gets the numbers."""
        self._metrics.write({"step": step, **finite_or_null(values)})
        if self._logger is not None:
            try:
                self._logger.log_metrics(values, step)
            except OSError as error:
                print(f"warning: the logger has stopped ({error.strerror}); metrics.jsonl goes on")
                self._logger = None

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            self._samples.write({"step": step, **sample})

    def sizes(self) -> dict[str, int]:
        """Bytes of every file so far, all of them on the disk, for a checkpoint.

        Raises:
            WriteError: lines that the disk has no room for are still waiting.
        """
        if isinstance(self._logger, TensorBoardLogger):
            with writing(self._folder / "tensorboard"):
                self._logger.experiment.flush()
        lines = {part.path.name: part.sync() for part in (self._metrics, self._samples)}
        return {**lines, **{path.relative_to(self._folder).as_posix(): path.stat().st_size for path in self._events()}}

    def close(self) -> None:
        """Write what still waits.

        Raises:
            WriteError: the disk has no room for it.
        """
        self._metrics.sync()
        self._samples.sync()
        if self._logger is not None:
            with writing(self._folder):
                self._logger.finalize("success")

    def _events(self) -> list[Path]:
        return sorted((self._folder / "tensorboard").glob("events.*"))


def finite_or_null(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None for numbers that are not finite, which JSON has no word for."""
    return {n: None if isinstance(x, float) and not math.isfinite(x) else x for n, x in values.items()}


def check_logger(name: str) -> None:
    """Raise `UserError` for a logger whose package is not installed."""
    if name == "wandb" and find_spec("wandb") is None:
        raise UserError("--logger=wandb needs the wandb package: pip install wandb")


class Lines:
    """A file of JSON lines, each whole. Lines that a full disk keeps out wait, in their order, for the next one.

    At most `MOST_WAITING` bytes of them: beyond that the oldest are lost, counted, and spoken of.

    Args:
        size: bytes of the file that are kept.

    Attributes:
        lost: lines that will never be in the file.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.lost = path, 0
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = self._told = 0
        if path.exists():
            _cut(path, size)

    def write(self, value: dict[str, Any]) -> None:
        """Append a line."""
        line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        try:
            self._append()
        except OSError as error:
            if len(self._waiting) == 1 and self.lost == self._told:
                print(f"warning: {self.path} cannot be written ({error.strerror}); its lines wait in memory")
            self._drop()

    def sync(self) -> int:
        """Bring every line to the disk; returns the file's bytes.

        Raises:
            WriteError: there is no room.
        """
        with writing(self.path):
            self._append()
            if not self.path.exists():
                return 0
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
                return os.fstat(file.fileno()).st_size

    def _append(self) -> None:
        if not self._waiting:
            return
        with self.path.open("ab", buffering=0) as file:
            before, data = file.tell(), memoryview(b"".join(self._waiting))
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(before)
                raise
        self._waiting.clear()
        self._waiting_bytes = 0
        if self.lost > self._told:
            print(f"warning: {self.path} can be written again, and {self.lost - self._told:,} of its lines are lost")
            self._told = self.lost

    def _drop(self) -> None:
        """Give up the oldest lines of those that wait, as many as are too many."""
        if self._waiting_bytes > MOST_WAITING and self.lost == self._told:
            print(
                f"warning: the lines of {self.path} that wait have more than {shown_bytes(MOST_WAITING)}; from here on "
                f"the oldest are lost: make room on that disk"
            )
        while self._waiting_bytes > MOST_WAITING:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.lost += 1


def _cut(path: Path, size: int) -> None:
    """Cut a file to `size` bytes; one that is shorter already (a power cut took its end) to its last whole line."""
    found = path.stat().st_size
    if found < size and path.suffix == ".jsonl":
        print(f"note: {path} has lost its last lines; {found:,} of {size:,} bytes are there")
        size = _end_of_last_line(path)
    os.truncate(path, min(size, found))


def _end_of_last_line(path: Path) -> int:
    end = path.stat().st_size
    with path.open("rb") as file:
        while end > 0:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                return start + place + 1
            end = start
    return 0


class CSVLogger:
    """csv/metrics.csv: metrics.jsonl as a table, a column for every name so far, written anew as a name is added.

    Where the disk is full it stops, and is written anew at the end.
    """

    def __init__(self, folder: Path) -> None:
        self._source, self._path = folder / "metrics.jsonl", folder / "csv" / "metrics.csv"
        self._columns: dict[str, None] = {}
        self._stopped = False
        if self._path.parent.is_dir():
            remove_dir(self._path.parent)
        if self._source.exists() and self._source.stat().st_size:
            self._rewrite()

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Append the line that stands last in metrics.jsonl."""
        if self._stopped:
            return
        try:
            if {"step", *values} <= self._columns.keys():
                with self._path.open("a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self._columns).writerow({"step": step, **values})
            else:
                self._rewrite()
        except (OSError, WriteError) as error:
            self._stopped = True
            print(f"warning: {self._path} waits for the end of the run ({error})")

    def finalize(self, _: str) -> None:
        """Write what was left out."""
        if self._stopped:
            self._rewrite()

    def _rewrite(self) -> None:
        with self._source.open(encoding="utf-8") as lines:
            for line in lines:
                self._columns.update(dict.fromkeys(json.loads(line)))
        with atomic_write(self._path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, self._columns)
            table.writeheader()
            with self._source.open(encoding="utf-8") as lines:
                for line in lines:
                    table.writerow({n: "nan" if x is None else x for n, x in json.loads(line).items()})


def _make_logger(name: str, folder: Path, script: str):
    if name == "tensorboard":
        return TensorBoardLogger(root_dir=folder, name="tensorboard", version="")
    if name == "csv":
        return CSVLogger(folder)
    if name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(project="rlhf", name=f"{script}/{folder.name}", save_dir=str(folder))
    return None


def environment(fabric: Fabric) -> dict[str, Any]:
    """Versions, hardware, command line and git commit: what a number may depend on besides the flags."""
    names = ("rlhf", "torch", "lightning", "transformers", "tokenizers", "peft", "datasets", "safetensors", "numpy")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(sys.argv),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(fabric.device),
        "device_name": torch.cuda.get_device_name() if fabric.device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "world_size": fabric.world_size,
        "precision": str(fabric.strategy.precision.precision),
        "versions": {name: _version(name) for name in names},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
