"""The packed twin of a split: one safetensors file that opens in milliseconds at any size.

Layout: for each sequence column `c` the flat array `c` and its N + 1 `c.offsets`, each scalar column, and
`row_hashes` (N, 2), the 128-bit hash of each row's content. The metadata holds the size and the hash of the `.pt`
file beside it, the largest token id, the fingerprint of the whole (a hash of the row hashes), and a checksum of
everything but the flat arrays, verified on opening, as are the offsets. The flat arrays are verified row by row as they
are read, by the row hashes: so damage is found however large the file, and a file is usable before it was read.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

from rlhf.data.packed import IGNORE_INDEX, SCALAR_TYPES, SCHEMAS, STAGES, PackedRows, offsets_of, sequence_type
from rlhf.untrusted import UnreadableFileError, open_file

VERSION = "rlhf-split-2"
_DTYPES = {"I64": "<i8", "U64": "<u8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}
_UNKNOWN_HASH = "0" * 32


class DamagedTwinError(Exception):
    """The file is no twin, was cut, or differs from what was written."""


class Twin:
    """An open twin: `rows`, whose arrays are views of the mapped file, and what the header says of them."""

    def __init__(self, rows: PackedRows, row_hashes: np.ndarray, metadata: dict[str, str]) -> None:
        self.rows = rows
        self.row_hashes = row_hashes
        self.fingerprint = metadata["fingerprint"]
        self.pt_size = int(metadata["pt_size"])
        self.pt_hash = metadata["pt_hash"]
        self.largest_id = int(metadata["largest_id"])


def write_twin(path: Path, stage: str, lengths: dict[str, np.ndarray], blocks: Iterable[PackedRows]) -> str:
    """Write the rows of `blocks` to `path`, one block in memory at a time.

    `lengths[column]` (N,) are the lengths of all rows to come. Not atomic: give a temporary path.

    Returns:
        The fingerprint: equal for equal rows in equal order.
    """
    schema = SCHEMAS[stage]
    num_rows = len(lengths[schema.sequences[0]])
    arrays: dict[str, np.ndarray] = {f"{c}.offsets": offsets_of(lengths[c]) for c in schema.sequences}
    arrays["row_hashes"] = np.zeros((num_rows, 2), dtype="<u8")
    arrays |= {name: np.zeros(num_rows, dtype=SCALAR_TYPES[name]) for name in schema.scalars}
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    shapes |= {c: (sequence_type(c), (int(arrays[f"{c}.offsets"][-1]),)) for c in schema.sequences}
    layout, position = {}, 0
    for name in sorted(shapes, key=lambda name: -shapes[name][0].itemsize):
        dtype, shape = shapes[name]
        size = dtype.itemsize * int(np.prod(shape))
        layout[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [position, position + size]}
        position += size
    metadata = {
        "format": VERSION,
        "stage": stage,
        "pt_size": "0" * 20,
        "pt_hash": _UNKNOWN_HASH,
        "largest_id": f"{0:010d}",
        "fingerprint": _UNKNOWN_HASH,
        "checksum": _UNKNOWN_HASH,
    }
    header = _encode_header(layout, metadata)
    with open(path, "wb") as file:
        file.truncate(len(header) + position)
        cursors = {c: len(header) + layout[c]["data_offsets"][0] for c in schema.sequences}
        start, largest = 0, 0
        for block in blocks:
            stop = start + len(block)
            largest = max([largest, *(int(block.flat[c].max(initial=0)) for c in id_columns(stage))])
            arrays["row_hashes"][start:stop] = block.hashes()
            for name in schema.scalars:
                arrays[name][start:stop] = block.scalars[name]
            for column in schema.sequences:
                file.seek(cursors[column])
                file.write(np.ascontiguousarray(block.flat[column], sequence_type(column)).data)
                cursors[column] = file.tell()
            start = stop
        if start != num_rows:
            raise ValueError(f"{num_rows} rows were announced, and {start} came")
        for name, array in arrays.items():
            file.seek(len(header) + layout[name]["data_offsets"][0])
            file.write(array.tobytes())
        metadata["largest_id"] = f"{largest:010d}"
        metadata["fingerprint"] = xxhash.xxh3_128_hexdigest(stage.encode() + arrays["row_hashes"].tobytes())
        metadata["checksum"] = _checksum(layout, metadata, arrays)
        file.seek(0)
        file.write(_encode_header(layout, metadata))
    return metadata["fingerprint"]


def stamp_twin(path: Path, pt_path: Path) -> None:
    """Write into the twin at `path` which `.pt` file it belongs to, and give it that file's time of change."""
    layout, metadata, start = _read_header(path)
    with open(path, "r+b") as file:
        arrays = _index_arrays(layout, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), start)
        metadata["pt_size"] = f"{pt_path.stat().st_size:020d}"
        metadata["pt_hash"] = file_hash(pt_path)
        metadata["checksum"] = _checksum(layout, metadata, arrays)
        file.write(_encode_header(layout, metadata))
    adopt_time(path, pt_path)


def adopt_time(path: Path, pt_path: Path) -> None:
    """Give the twin the `.pt` file's time of change: equal times and sizes mean that they belong together."""
    stat = pt_path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def open_twin(path: Path) -> Twin:
    """Map the twin at `path`; only its index is read and verified.

    Raises:
        DamagedTwinError: not a whole twin of this version.
        OSError: no such file.
    """
    layout, metadata, start = _read_header(path)
    stage = metadata.get("stage", "")
    if metadata.get("format") != VERSION or stage not in STAGES:
        raise DamagedTwinError(f"{path} is no packed split of this version")
    with open_file(path) as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    schema = SCHEMAS[stage]
    try:
        end = max(entry["data_offsets"][1] for entry in layout.values())
        if len(data) != start + end:
            raise DamagedTwinError(f"{path} has {len(data)} bytes and should have {start + end}")
        index = _index_arrays(layout, data, start)
        if metadata["checksum"] != _checksum(layout, metadata, index):
            raise DamagedTwinError(f"the index of {path} does not match its checksum")
        rows = PackedRows(
            stage,
            {c: _view(layout[c], data, start) for c in schema.sequences},
            {c: index[f"{c}.offsets"] for c in schema.sequences},
            {name: index[name] for name in schema.scalars},
            maps=(data,),
        )
        _check_index(rows, index["row_hashes"])
        return Twin(rows, index["row_hashes"], metadata)
    except (AttributeError, KeyError, IndexError, OverflowError, TypeError, ValueError) as error:
        raise DamagedTwinError(f"the header of {path} is damaged: {error!r}") from error


def _check_index(rows: PackedRows, row_hashes: np.ndarray) -> None:
    """Raise ValueError unless every row lies within the flat arrays, and its prompt within the row."""
    stage, prompt_lens = rows.stage, rows.scalars["prompt_len"]
    shapes = [values.shape for values in rows.scalars.values()] + [values.shape[:1] for values in (row_hashes,)]
    if row_hashes.shape != (len(rows), 2) or row_hashes.dtype != "<u8" or len(set(shapes)) != 1:
        raise ValueError("it has other numbers of rows in each column")
    if any(rows.scalars[name].dtype != SCALAR_TYPES[name] for name in rows.scalars):
        raise ValueError("a scalar is of another type")
    for column, offsets in rows.offsets.items():
        flat = rows.flat[column]
        if offsets.dtype != "<i8" or flat.dtype != sequence_type(column) or flat.ndim != 1:
            raise ValueError(f"{column} is of another type")
        if offsets.shape != (len(rows) + 1,) or offsets[0] != 0 or offsets[-1] != len(flat):
            raise ValueError(f"the offsets of {column} do not span it")
        lengths = np.diff(offsets)
        room = lengths - prompt_lens
        if (lengths < 0).any():
            raise ValueError(f"the offsets of {column} fall")
        is_bad = (prompt_lens < 1) | ((room != 0) if stage == "prompts" else (room < 1))
        if column in id_columns(stage) and is_bad.any():
            raise ValueError(f"a prompt is longer than its {column}")
    if stage == "finetune" and not np.array_equal(rows.offsets["input_ids"], rows.offsets["targets"]):
        raise ValueError("targets are not as long as input_ids")


def check_row(rows: PackedRows, i: int, largest_id: int) -> None:
    """Raise DamagedTwinError where row `i` holds an id below 0 or above `largest_id`, or a text that is no UTF-8."""
    for column in SCHEMAS[rows.stage].sequences:
        values = rows.sequence(column, i)
        if column == "reference":
            try:
                values.tobytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise DamagedTwinError(f"row {i}, {column!r}: {error}") from None
        elif len(values):
            low = values[values != IGNORE_INDEX].min(initial=0) if column == "targets" else values.min()
            if low < 0 or values.max() > largest_id:
                raise DamagedTwinError(f"row {i}, {column!r}: an id below 0 or above {largest_id}")


def id_columns(stage: str) -> list[str]:
    """The columns of token ids that go through a model."""
    return [column for column in SCHEMAS[stage].sequences if column.endswith("input_ids")]


def file_hash(path: Path) -> str:
    """128-bit hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 18):
            digest.update(block)
    return digest.hexdigest()


def _encode_header(layout: dict, metadata: dict[str, str]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **layout}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # flat arrays start on a cache line
    return struct.pack("<Q", len(text)) + text


def _read_header(path: Path) -> tuple[dict, dict[str, str], int]:
    try:
        file = open_file(path)
    except UnreadableFileError as error:
        raise DamagedTwinError(str(error)) from None
    with file:
        size = file.read(8)
        length = struct.unpack("<Q", size)[0] if len(size) == 8 else 0
        if not 0 < length < 1 << 20:
            raise DamagedTwinError(f"{path} has no safetensors header")
        text = file.read(length)
    try:
        layout = json.loads(text)
        metadata = layout.pop("__metadata__")
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("its metadata are no strings")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedTwinError(f"the header of {path} is damaged: {error!r}") from error
    return layout, metadata, 8 + length


def _view(entry: dict, data: mmap.mmap, start: int) -> np.ndarray:
    first, last = entry["data_offsets"]
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    array = np.frombuffer(data, dtype=dtype, count=(last - first) // dtype.itemsize, offset=start + first)
    return array.reshape(entry["shape"])


def _index_arrays(layout: dict, data: mmap.mmap, start: int) -> dict[str, np.ndarray]:
    names = [name for name in layout if f"{name}.offsets" not in layout]
    return {name: _view(layout[name], data, start) for name in names}


def _checksum(layout: dict, metadata: dict[str, str], index: dict[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    rest = {key: value for key, value in metadata.items() if key != "checksum"}
    digest.update(json.dumps([rest, layout], sort_keys=True).encode())
    for name in sorted(index):
        digest.update(np.ascontiguousarray(index[name]).data)
    return digest.hexdigest()
