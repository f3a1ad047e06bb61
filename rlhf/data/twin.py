"""The packed twin of a split: one safetensors file that opens in milliseconds at any size.

Layout: for each sequence column `c` the flat array `c` and its N + 1 `c.offsets`, each scalar column, and
`row_hashes` (N, 2), the 128-bit hash of each row's content. The metadata holds the size and the hash of the `.pt`
file beside it, the fingerprint of the whole (a hash of the row hashes), and a checksum of everything but the flat
arrays, verified on opening. The flat arrays are verified row by row as they are read, by the row hashes: so damage
is found however large the file, and a file is usable before it was read.
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

from rlhf.data.packed import SCALAR_TYPES, SCHEMAS, PackedRows, offsets_of, sequence_type

VERSION = "rlhf-split-1"
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
        "fingerprint": _UNKNOWN_HASH,
        "checksum": _UNKNOWN_HASH,
    }
    header = _encode_header(layout, metadata)
    with open(path, "wb") as file:
        file.truncate(len(header) + position)
        cursors = {c: len(header) + layout[c]["data_offsets"][0] for c in schema.sequences}
        start = 0
        for block in blocks:
            stop = start + len(block)
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
    if metadata.get("format") != VERSION or stage not in SCHEMAS:
        raise DamagedTwinError(f"{path} is no packed split of this version")
    with open(path, "rb") as file:
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
        return Twin(rows, index["row_hashes"], metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedTwinError(f"the header of {path} is damaged: {error!r}") from error


def file_hash(path: Path) -> str:
    """128-bit hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 18):
            digest.update(block)
    return digest.hexdigest()


def lengths_of(rows: PackedRows, index: np.ndarray) -> dict[str, np.ndarray]:
    """The lengths of the rows `index`, by column, as `write_twin` wants them."""
    return {c: rows.offsets[c][index + 1] - rows.offsets[c][index] for c in rows.offsets}


def _encode_header(layout: dict, metadata: dict[str, str]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **layout}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # flat arrays start on a cache line
    return struct.pack("<Q", len(text)) + text


def _read_header(path: Path) -> tuple[dict, dict[str, str], int]:
    with open(path, "rb") as file:
        size = file.read(8)
        length = struct.unpack("<Q", size)[0] if len(size) == 8 else 0
        if not 0 < length < 1 << 20:
            raise DamagedTwinError(f"{path} has no safetensors header")
        text = file.read(length)
    try:
        layout = json.loads(text)
        metadata = layout.pop("__metadata__")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
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
