"""Encoded rows on their way to the splits: tokens wait on disk, and what decides a row's split in a few arrays."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from rlhf.data.encode import CUT_PROMPT, CUT_RESPONSE, Encoded
from rlhf.data.packed import BLOCK_ROWS, SCALAR_TYPES, SCHEMAS, PackedRows, offsets_of, sequence_type

DUPLICATE = "prompt seen before (--remove_same_inputs)"
_CUTS = {CUT_PROMPT: "prompt cut", CUT_RESPONSE: "response cut"}


class Spool:
    """The encoded rows of one source. `add` appends; `finish` gives them back, their tokens still on disk."""

    def __init__(self, folder: Path, stage: str, name: str) -> None:
        self.stage, self.name = stage, name
        self._paths = {column: folder / f"{name}.{column}" for column in SCHEMAS[stage].sequences}
        self._files = {column: open(path, "wb") for column, path in self._paths.items()}  # noqa: SIM115
        self._lengths: dict[str, list[np.ndarray]] = {column: [] for column in self._paths}
        self._scalars: dict[str, list[np.ndarray]] = {name: [] for name in SCHEMAS[stage].scalars}
        self._meta: dict[str, list[np.ndarray]] = {"source_row": [], "key": [], "cut": []}
        self._dropped: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def add(self, encoded: Encoded) -> None:
        for column, file in self._files.items():
            file.write(encoded.rows.flat[column].data)
            self._lengths[column].append(encoded.rows.lengths(column).astype(np.int32))
        for name, parts in self._scalars.items():
            parts.append(encoded.rows.scalars[name])
        for name, parts in self._meta.items():
            parts.append(getattr(encoded, name))
        for reason, keys in encoded.dropped.items():
            self._dropped[reason].append(np.array(keys, dtype=np.uint64))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def finish(self) -> SpooledRows:
        """All rows that were added, in order."""
        self.close()
        lengths = {c: _joined(parts, np.dtype("int32")) for c, parts in self._lengths.items()}
        scalars = {name: _joined(parts, SCALAR_TYPES[name]) for name, parts in self._scalars.items()}
        source_row = _joined(self._meta["source_row"], np.dtype("int64"))
        key = _joined(self._meta["key"], np.dtype("uint64"))
        cut = _joined(self._meta["cut"], np.dtype("uint8"))
        dropped = {reason: np.concatenate(parts) for reason, parts in self._dropped.items()}
        tokens = SpooledTokens(self.stage, self._paths, {c: offsets_of(n) for c, n in lengths.items()}, scalars)
        return SpooledRows(tokens, source_row, key, cut, dropped)


class SpooledTokens:
    """The tokens of the rows of one source, on disk, and their scalars."""

    def __init__(
        self, stage: str, paths: Mapping[str, Path], offsets: dict[str, np.ndarray], scalars: dict[str, np.ndarray]
    ) -> None:
        self.stage, self.offsets, self.scalars = stage, offsets, scalars
        self._paths = paths

    def __len__(self) -> int:
        return len(self.scalars["prompt_len"])

    def lengths(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Lengths of the rows `index` (n,) by column, each (n,) int64."""
        return {column: places[index + 1] - places[index] for column, places in self.offsets.items()}

    def blocks(self, index: np.ndarray) -> Iterator[PackedRows]:
        """The rows `index` (n,), in that order, some hundred in memory at a time."""
        for start in range(0, len(index), BLOCK_ROWS):
            rows = index[start : start + BLOCK_ROWS]
            flat, offsets, lengths = {}, {}, self.lengths(rows)
            for column, path in self._paths.items():
                offsets[column] = offsets_of(lengths[column])
                flat[column] = _gather(path, sequence_type(column), self.offsets[column][rows], offsets[column])
            yield PackedRows(self.stage, flat, offsets, {name: values[rows] for name, values in self.scalars.items()})


def _gather(path: Path, dtype: np.dtype, first: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Read values from `first` (n,) places of a file, one after the other, to `offsets` (n + 1,) of an array.

    By reads of the file: in random order, a mapping would take in 64 kB around each row, five times slower.
    """
    out = np.empty(int(offsets[-1]), dtype)
    view = memoryview(out).cast("B")
    places, bounds = (first * dtype.itemsize).tolist(), (offsets * dtype.itemsize).tolist()
    with open(path, "rb", buffering=0) as file:
        for place, start, stop in zip(places, bounds[:-1], bounds[1:], strict=True):
            file.seek(place)
            if file.readinto(view[start:stop]) != stop - start:
                raise EOFError(f"{path} has become shorter than it was written")
    return out


class SpooledRows:
    """The rows of one source, and of each its source row, its prompt's key, what was cut; and what was dropped."""

    def __init__(
        self,
        rows: SpooledTokens,
        source_row: np.ndarray,
        key: np.ndarray,
        cut: np.ndarray,
        dropped: dict[str, np.ndarray],
    ) -> None:
        self.rows, self.source_row, self.key, self.cut, self.dropped = rows, source_row, key, cut, dropped
        self.keep = np.ones(len(rows), dtype=bool)

    def drop(self, unwanted: np.ndarray, reason: str) -> None:
        """Drop the kept rows under the mask `unwanted` (N,), counted under `reason`."""
        unwanted = unwanted & self.keep
        if unwanted.any():
            self.dropped[reason] = np.concatenate(
                [self.dropped.get(reason, np.zeros(0, np.uint64)), self.key[unwanted]]
            )
            self.keep &= ~unwanted

    def drop_duplicates(self) -> None:
        """Keep, of the source rows with one prompt, the first."""
        index = np.flatnonzero(self.keep)
        keys, first, group = np.unique(self.key[index], return_index=True, return_inverse=True)
        if len(keys) < len(index):
            unwanted = np.zeros(len(self.keep), dtype=bool)
            unwanted[index] = self.source_row[index] != self.source_row[index[first]][group]
            self.drop(unwanted, DUPLICATE)


class Selection:
    """The rows of one split: `index` into one source's rows, in their final order, and the counts."""

    def __init__(self, source: SpooledRows, index: np.ndarray, dropped: dict[str, int]) -> None:
        self.source, self.index, self.dropped = source, index, dropped

    def counts(self) -> dict[str, object]:
        """`kept`, `dropped` and `cut`, the last two by reason."""
        cuts = self.source.cut[self.index]
        cut = {name: int(np.count_nonzero(cuts & bit)) for bit, name in _CUTS.items()}
        return {
            "kept": len(self.index),
            "dropped": self.dropped,
            "cut": {name: count for name, count in cut.items() if count},
        }


def select(
    sources: Mapping[str, SpooledRows],
    shares: Mapping[str, float],
    *,
    remove_same_inputs: bool,
    shuffle: bool,
    seed: int,
) -> dict[str, Selection]:
    """Divide the rows into train, validation and test.

    A split that is a source of its own is that source. The others are cut from train by the keys of the prompts
    (`shares`: the part of the prompts that each takes), so that all rows of one prompt land in one split, the same
    one for every stage prepared with this seed. A prompt of the test split occurs in no other split, one of the
    validation split not in train.
    """
    if remove_same_inputs:
        for source in sources.values():
            source.drop_duplicates()
    for first, second in (("test", "validation"), ("test", "train"), ("validation", "train")):
        if first in sources and second in sources:
            held_out = np.unique(sources[first].key[sources[first].keep])
            leaks = np.isin(sources[second].key, held_out)
            sources[second].drop(leaks, f"prompt is in the {first} split")
    train = sources["train"]
    borders = _borders(np.unique(train.key[train.keep]), shares)
    selections = {}
    for number, name in enumerate(("train", "validation", "test")):
        if name in borders or name == "train":
            source, low, high = train, *borders.get(name, (0, 0))
        elif name in sources:
            source, low, high = sources[name], 0, 0
        else:
            continue

        def inside(keys: np.ndarray, name: str = name, low: int = low, high: int = high) -> np.ndarray:
            if name in borders:
                return (keys >= np.uint64(low)) & (keys < np.uint64(high))
            return np.ones(len(keys), dtype=bool)

        index = np.flatnonzero(source.keep & inside(source.key))
        if shuffle:
            index = index[np.random.default_rng([seed, number]).permutation(len(index))]
        dropped = {reason: int(np.count_nonzero(inside(keys))) for reason, keys in sorted(source.dropped.items())}
        selections[name] = Selection(source, index, {reason: n for reason, n in dropped.items() if n})
    return selections


def _borders(keys: np.ndarray, shares: Mapping[str, float]) -> dict[str, tuple[int, int]]:
    """The range of keys of each split that is cut from train; `keys` are sorted.

    Keys are hashes, so a range of them is a random part of the prompts, and the same part in every stage. A part
    that would stay empty takes one prompt, as long as that leaves some for train.
    """
    if not any(shares.values()):
        return {}
    borders, low = {}, 0
    for name in ("test", "validation"):
        if not shares.get(name):
            continue
        high = min(low + int(shares[name] * 2**64), 2**64 - 1)
        later = keys[np.searchsorted(keys, np.uint64(low)) :]
        if len(later) and later[0] >= high and len(later) > 2:
            high = int(later[0]) + 1
        borders[name] = (low, high)
        low = high
    return borders | {"train": (low, 2**64 - 1)}


def _joined(parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
