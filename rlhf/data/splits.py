"""The splits of a prepared data folder, as training reads them: memory-mapped, shared by all processes of a node."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf.data.exchange import pt_blocks, read_pt, write_pt
from rlhf.data.packed import IGNORE_INDEX, SCHEMAS, SPLIT_NAMES, STAGES, PackedRows, pack
from rlhf.data.text import template_fingerprint, tokenizer_fingerprint
from rlhf.data.twin import (
    DamagedTwinError,
    Twin,
    adopt_time,
    check_row,
    file_hash,
    open_twin,
    stamp_twin,
    write_twin,
)
from rlhf.errors import UserError
from rlhf.files import WriteError, atomic_write
from rlhf.locks import locked
from rlhf.untrusted import read_json

__all__ = [
    "IGNORE_INDEX",
    "SPLIT_NAMES",
    "STAGES",
    "Split",
    "check_tokenizer",
    "data_info",
    "has_split",
    "load_split",
    "write_split",
]


class Split:
    """One split of one stage. `split[i]` is the dict that stands in row i of the `.pt` file.

    Every row is checked against its hash as it is read; a damaged file is rebuilt from the `.pt` and read again.
    `targets` always use `IGNORE_INDEX`, whatever `--ignore_index` the `.pt` was written with.
    """

    stage: str
    name: str
    path: Path
    fingerprint: str
    largest_id: int
    tokenizer: dict[str, str] | None
    format: dict[str, Any]

    def __init__(self, data_dir: str | Path, stage: str, name: str) -> None:
        self.stage, self.name = stage, name
        self.path = Path(data_dir) / f"{stage}_{name}.pt"
        entry = data_info(data_dir)["stages"].get(stage, {})
        self.tokenizer = entry.get("tokenizer")
        self.format = entry.get("format", {"kind": "plain"})
        self._ignore_index = entry.get("arguments", {}).get("ignore_index", IGNORE_INDEX)
        self._attach(_open_or_build(self.path, stage, self._ignore_index))

    def _attach(self, twin: Twin) -> None:
        self._rows, self._hashes, self.fingerprint = twin.rows, twin.row_hashes, twin.fingerprint
        self.largest_id = twin.largest_id

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of a split of {len(self)} rows")
        if self._rows.hash_of(i) != self._hashes[i].tobytes():
            self._attach(_build(self.path, self.stage, self._ignore_index, keep_if_fresh=False))
        try:
            check_row(self._rows, i, self.largest_id)
        except DamagedTwinError as error:
            raise UserError(
                f"{self.path.with_suffix('.safetensors')}, {error}; remove that file, and it is rebuilt"
            ) from None
        return self._rows.row(i)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __reduce__(self) -> tuple:
        return Split, (self.path.parent, self.stage, self.name)

    @property
    def prompt_lens(self) -> torch.Tensor:
        """Tokens of each row's prompt, (N,) int64."""
        return torch.from_numpy(self._rows.scalars["prompt_len"].astype(np.int64))

    @property
    def labels(self) -> torch.Tensor:
        """The label of each row of binary feedback, (N,) bool."""
        return torch.from_numpy(self._rows.scalars["label"].copy())

    def lengths(self, column: str) -> torch.Tensor:
        """Length of each row's `column` (prompt and response together), (N,) int64."""
        if column not in self._rows.offsets:
            raise KeyError(f"{self.stage} rows have {list(self._rows.offsets)}, not {column!r}")
        return torch.from_numpy(self._rows.lengths(column))

    def row_hashes(self) -> np.ndarray:
        """A 128-bit hash of each row's content, (N, 2) uint64: equal rows have equal hashes, in any file."""
        return self._hashes


def load_split(data_dir: str | Path, stage: str, name: str) -> Split:
    """Open a split in milliseconds; its packed twin is rebuilt first if it is missing, stale or damaged.

    Raises:
        UserError: no such split, or a `.pt` file that needs code, is damaged, or has a row that can't be used.
    """
    if stage not in STAGES or name not in SPLIT_NAMES:
        raise UserError(f"there is no {stage}_{name}; stages are {', '.join(STAGES)}, and splits {SPLIT_NAMES}")
    if not has_split(data_dir, stage, name):
        found = sorted(path.name for path in Path(data_dir).glob("*.pt"))
        there = f"it holds {', '.join(found)}" if found else "it holds no .pt file"
        if not Path(data_dir).is_dir():
            there = "there is no such folder"
        share = "" if name == "train" else f" --{name}_percentage=0.1"
        raise UserError(
            f"{Path(data_dir) / f'{stage}_{name}.pt'} is missing ({there}); write it with a prepare_data.py: "
            f"--destination_dir={data_dir} --stage={stage}{share}"
        )
    split = Split(data_dir, stage, name)
    if not len(split):
        raise _no_rows(split.path)
    return split


def has_split(data_dir: str | Path, stage: str, name: str) -> bool:
    """Whether the folder holds the `.pt` file of this split."""
    return (Path(data_dir) / f"{stage}_{name}.pt").is_file()


def data_info(data_dir: str | Path) -> dict[str, Any]:
    """What `args.json` says of a data folder: `{"stages": {stage: {...}}}`; without the file, no stage is known."""
    path = Path(data_dir) / "args.json"
    try:
        info = read_json(path, "prepare the data again", constants=True)
    except FileNotFoundError:
        return {"stages": {}}
    stages = info.get("stages")
    if not isinstance(stages, dict) or not all(_is_entry(entry) for entry in stages.values()):
        raise UserError(f"{path} was not written by a prepare_data.py; prepare the data again")
    return info


def _is_entry(entry: Any) -> bool:
    """Whether `entry` has the parts of a stage's entry, each of its type, as far as it has them."""
    if not isinstance(entry, dict):
        return False
    parts = (entry.get("tokenizer") or {}, entry.get("format", {}), entry.get("arguments", {}))
    return all(isinstance(part, dict) for part in parts) and isinstance(parts[2].get("ignore_index", 0), int)


def check_tokenizer(split: Split, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model whose tokenizer is not the one that the data was made with: its ids would mean other words.

    A split without an `args.json` (a user's own `.pt`) carries no tokenizer, and passes.

    Raises:
        UserError: naming both tokenizers.
    """
    made_with = split.tokenizer
    if not made_with:
        return
    theirs = tokenizer.name_or_path or type(tokenizer).__name__
    remedy = f"prepare the data again with --tokenizer_name={theirs}, or take the model of that tokenizer"
    fingerprint = tokenizer_fingerprint(tokenizer)
    if made_with.get("fingerprint") != fingerprint:
        raise UserError(
            f"{split.path} was tokenised by {made_with.get('name')!r} (fingerprint "
            f"{str(made_with.get('fingerprint'))[:8]}), and the model's tokenizer {theirs!r} ({fingerprint[:8]}) "
            f"is another one; {remedy}"
        )
    template = split.format.get("template_fingerprint")
    if split.format.get("kind") == "chat_template" and template != template_fingerprint(tokenizer):
        raise UserError(
            f"{split.path} went through the chat template of {made_with.get('name')!r}, and the model's tokenizer "
            f"{theirs!r} has another template; {remedy}"
        )


def write_split(data_dir: str | Path, stage: str, name: str, rows: PackedRows | Sequence[Mapping[str, Any]]) -> Path:
    """Write rows (dicts as they stand in the `.pt`, or packed) as a `.pt` with its twin; returns the `.pt`'s path."""
    packed = rows if isinstance(rows, PackedRows) else pack(stage, rows)
    path = Path(data_dir) / f"{stage}_{name}.pt"
    twin_path = path.with_suffix(".safetensors")
    with atomic_write(twin_path) as temporary_twin, atomic_write(path) as temporary:
        write_twin(temporary_twin, stage, {c: packed.lengths(c) for c in packed.offsets}, packed.blocks())
        write_pt(temporary, packed)
        stamp_twin(temporary_twin, temporary)
    return path


def _open_or_build(path: Path, stage: str, ignore_index: int) -> Twin:
    twin = _fresh_twin(path, stage)
    return twin or _build(path, stage, ignore_index, keep_if_fresh=True)


def _fresh_twin(path: Path, stage: str) -> Twin | None:
    """The twin beside the `.pt` at `path`, if it is whole and belongs to it.

    It does if the sizes agree and so do the times of change; copies often lose those, so other times ask for the
    hash of the `.pt`, and the twin takes over its time for the next opening.
    """
    twin_path = path.with_suffix(".safetensors")
    try:
        twin = open_twin(twin_path)
        pt_stat, twin_stat = path.stat(), twin_path.stat()
    except (OSError, DamagedTwinError):
        return None
    if twin.rows.stage != stage or twin.pt_size != pt_stat.st_size:
        return None
    if pt_stat.st_mtime_ns == twin_stat.st_mtime_ns:
        return twin
    if twin.pt_hash != file_hash(path):
        return None
    with suppress(OSError):  # in a read-only folder the hash is taken again next time
        adopt_time(twin_path, path)
    return twin


def _build(path: Path, stage: str, ignore_index: int, *, keep_if_fresh: bool) -> Twin:
    """Write the twin of the `.pt` at `path` anew, in one process at a time, and open it."""
    with locked(path):
        if keep_if_fresh and (twin := _fresh_twin(path, stage)):
            return twin
        rows = read_pt(path, stage, ignore_index=ignore_index)
        if not rows:
            raise _no_rows(path)
        lengths = {
            c: np.array([len(row[c].encode()) if c == "reference" else len(row[c]) for row in rows], np.int64)
            for c in SCHEMAS[stage].sequences
        }
        twin_path = path.with_suffix(".safetensors")
        try:
            with atomic_write(twin_path) as temporary:
                write_twin(temporary, stage, lengths, pt_blocks(rows, stage, ignore_index=ignore_index))
                stamp_twin(temporary, path)
        except (OSError, WriteError):
            return _build_elsewhere(stage, lengths, rows, ignore_index)
        return open_twin(twin_path)


def _build_elsewhere(stage: str, lengths: dict, rows: list, ignore_index: int) -> Twin:
    """For a folder that can't be written: a twin without a name, gone when the process ends."""
    handle, name = tempfile.mkstemp(suffix=".safetensors")
    os.close(handle)
    try:
        write_twin(Path(name), stage, lengths, pt_blocks(rows, stage, ignore_index=ignore_index))
        return open_twin(Path(name))
    finally:
        os.unlink(name)


def _no_rows(path: Path) -> UserError:
    return UserError(f"{path} holds no rows; prepare the data again")
