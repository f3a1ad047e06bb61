"""Many rows as a few flat arrays: what a split is in memory, in its packed twin and on its way to either."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

IGNORE_INDEX = -100
"""The value in `targets` of a position that no loss looks at."""

BLOCK_ROWS = 512
"""Rows that are gathered, checked or written at a time."""


@dataclass(frozen=True)
class Schema:
    """The keys of one stage's rows: sequences of int64 ids, and scalars; `reference` is the only text."""

    sequences: tuple[str, ...]
    scalars: tuple[str, ...]

    @property
    def keys(self) -> set[str]:
        return {*self.sequences, *self.scalars}


SCHEMAS = {
    "finetune": Schema(("input_ids", "targets"), ("prompt_len",)),
    "preference": Schema(("chosen_input_ids", "rejected_input_ids"), ("prompt_len",)),
    "feedback": Schema(("input_ids",), ("prompt_len", "label")),
    "prompts": Schema(("input_ids", "reference"), ("prompt_len",)),
}
STAGES = tuple(SCHEMAS)
SPLIT_NAMES = ("train", "validation", "test")

SCALAR_TYPES = {"prompt_len": np.dtype("int64"), "label": np.dtype("bool")}


def sequence_type(column: str) -> np.dtype:
    """Ids are stored in 32 bits; a text as its UTF-8 bytes."""
    return np.dtype("uint8") if column == "reference" else np.dtype("int32")


@dataclass
class PackedRows:
    """Rows of one stage: each sequence column end to end in one array, with N + 1 offsets.

    The arrays may be views of memory-mapped files (`maps`); nothing here copies more than the rows it is asked for,
    and `blocks` gives the pages that it has read back to the system as it goes.
    """

    stage: str
    flat: dict[str, np.ndarray]
    offsets: dict[str, np.ndarray]
    scalars: dict[str, np.ndarray]
    maps: tuple[mmap.mmap, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.scalars["prompt_len"])

    def sequence(self, column: str, i: int) -> np.ndarray:
        """Column `column` of row `i`, as stored."""
        offsets = self.offsets[column]
        return self.flat[column][offsets[i] : offsets[i + 1]]

    def lengths(self, column: str) -> np.ndarray:
        """Length of every row's `column` (N,), int64."""
        return np.diff(self.offsets[column])

    def row(self, i: int) -> dict[str, Any]:
        """Row `i` as the dict that stands in the `.pt` file."""
        row: dict[str, Any] = {"prompt_len": int(self.scalars["prompt_len"][i])}
        for column in SCHEMAS[self.stage].sequences:
            values = self.sequence(column, i)
            if column == "reference":
                row[column] = values.tobytes().decode("utf-8")
            else:
                row[column] = torch.from_numpy(values.astype(np.int64))
        if "label" in self.scalars:
            row["label"] = bool(self.scalars["label"][i])
        return row

    def hash_of(self, i: int) -> bytes:
        """The 128-bit hash of row `i`: the same bytes as `hashes()[i]`."""
        columns = SCHEMAS[self.stage].sequences
        parts = [self.sequence(column, i).tobytes() for column in columns]
        lengths = [self.offsets[column][i + 1] - self.offsets[column][i] for column in columns]
        label = int("label" in self.scalars and self.scalars["label"][i])
        head = struct.pack(f"<{2 + len(lengths)}q", self.scalars["prompt_len"][i], label, *lengths)
        return xxhash.xxh3_128_digest(b"".join((head, *parts)))

    def blocks(self) -> Iterator[PackedRows]:
        """All rows, in order and without a copy, some hundred at a time."""
        for start in range(0, len(self), BLOCK_ROWS):
            yield self._slice(start, BLOCK_ROWS)
            for mapped in self.maps:
                if hasattr(mapped, "madvise"):
                    mapped.madvise(mmap.MADV_DONTNEED)

    def _slice(self, start: int, count: int) -> PackedRows:
        offsets = {column: values[start : start + count + 1] for column, values in self.offsets.items()}
        return PackedRows(
            self.stage,
            {column: self.flat[column][values[0] : values[-1]] for column, values in offsets.items()},
            {column: values - values[0] for column, values in offsets.items()},
            {name: values[start : start + count] for name, values in self.scalars.items()},
        )

    def hashes(self) -> np.ndarray:
        """A 128-bit hash of each row's content, (N, 2) uint64: of the values alone, wherever they are stored."""
        columns = SCHEMAS[self.stage].sequences
        views = [memoryview(np.ascontiguousarray(self.flat[c])).cast("B") for c in columns]
        widths = [sequence_type(c).itemsize for c in columns]
        bounds = [(self.offsets[c] * w).tolist() for c, w in zip(columns, widths, strict=True)]
        label = self.scalars.get("label", np.zeros(len(self), dtype=bool))
        heads = np.column_stack([self.scalars["prompt_len"], label, *(self.lengths(c) for c in columns)]).astype("<i8")
        digests = bytearray()
        for i in range(len(self)):
            parts = [view[b[i] : b[i + 1]] for view, b in zip(views, bounds, strict=True)]
            digests += xxhash.xxh3_128_digest(b"".join((heads[i].tobytes(), *parts)))
        return np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each of the rows starts, and where the last ends: (N,) to (N + 1,), int64."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def pack(stage: str, rows: Sequence[Mapping[str, Any]]) -> PackedRows:
    """Rows as dicts of lists, arrays or tensors (and `reference` as a string), packed."""
    schema = SCHEMAS[stage]
    flat, offsets = {}, {}
    for column in schema.sequences:
        dtype = sequence_type(column)
        if column == "reference":
            parts = [np.frombuffer(row[column].encode("utf-8"), dtype=dtype) for row in rows]
        else:
            parts = [np.asarray(row[column], dtype=dtype) for row in rows]
        flat[column] = np.concatenate(parts) if parts else np.zeros(0, dtype)
        offsets[column] = offsets_of(np.array([len(part) for part in parts], dtype=np.int64))
    scalars = {name: np.array([row[name] for row in rows], dtype=SCALAR_TYPES[name]) for name in schema.scalars}
    return PackedRows(stage, flat, offsets, scalars)
