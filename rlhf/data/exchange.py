"""The `.pt` files: plain lists of dicts that torch alone reads and writes, the format for exchange."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from rlhf.data.packed import BLOCK_ROWS, IGNORE_INDEX, SCHEMAS, PackedRows, pack
from rlhf.errors import UserError
from rlhf.untrusted import UnreadableFileError, read_pickle

_ALIGNMENT = 64
_LIMIT = 1 << 31
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def write_pt(path: Path, rows: PackedRows, *, ignore_index: int = IGNORE_INDEX) -> None:
    """Write `rows` as the file that `torch.save` would write of their list of dicts, a block at a time.

    All tensors of the file are views of one storage, so it loads with `torch.load(path, weights_only=True)` in one
    read. `torch.save` itself would need every row in memory. Not atomic: give a temporary path.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(_record("data.pkl"), "w", force_zip64=True) as file:
            _write_pickle(file, rows)
        for name, content in ((".format_version", "1"), ("byteorder", "little"), ("version", "3\n")):
            archive.writestr(_record(name), content)
        with archive.open(_record("data/0", start=archive.start_dir), "w", force_zip64=True) as file:
            for block in rows.blocks():
                for values in _int64_columns(block, ignore_index):
                    file.write(values.data)


def _record(name: str, *, start: int | None = None) -> zipfile.ZipInfo:
    """A member of the archive, with a fixed date: equal rows make equal files.

    With `start`, the place where its header will stand, its data are aligned as `torch.save` does it, for mmap.
    """
    record = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    if start is not None:
        headers = 30 + len(record.filename) + 20 + 4  # local header, name, zip64 field, head of the padding
        padding = -(start + headers) % _ALIGNMENT
        record.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    return record


def read_pt(path: Path, stage: str, *, ignore_index: int = IGNORE_INDEX) -> list[dict[str, Any]]:
    """The rows of a `.pt` file, each checked; nothing in the file is ever executed.

    Raises:
        UserError: the file needs code to load, is damaged, is no list of dicts, or has a row that can't be used;
            the message names the file, the row and the key.
    """
    try:
        rows = read_pickle(path, mapped=True)
    except FileNotFoundError:
        raise UnreadableFileError(f"{path} is missing; prepare the data again") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}; it must hold a list of dicts, one for each row")
    for i, row in enumerate(rows):
        _check_types(path, stage, i, row)
    _check_amount(path, stage, rows)
    for start in range(0, len(rows), BLOCK_ROWS):
        _check_range(path, stage, rows[start : start + BLOCK_ROWS], start)
    for start, block in zip(
        range(0, len(rows), BLOCK_ROWS), pt_blocks(rows, stage, ignore_index=ignore_index), strict=True
    ):
        _check_values(path, block, start)
    return rows


def pt_blocks(rows: list[dict[str, Any]], stage: str, *, ignore_index: int) -> Iterator[PackedRows]:
    """Rows of a `.pt` file, packed, some thousand at a time."""
    for start in range(0, len(rows), BLOCK_ROWS):
        block = pack(stage, rows[start : start + BLOCK_ROWS])
        if stage == "finetune" and ignore_index != IGNORE_INDEX:
            targets = block.flat["targets"]
            targets[targets == ignore_index] = IGNORE_INDEX
        yield block


def _check_amount(path: Path, stage: str, rows: list[dict[str, Any]]) -> None:
    """Rows may be views of one storage, over and over: what they hold together must not be more than the file does."""
    total = sum(len(row[column]) for row in rows for column in SCHEMAS[stage].sequences)
    if total > path.stat().st_size:
        raise UnreadableFileError(
            f"{path} declares {total:,} ids, more than its {path.stat().st_size:,} bytes can hold: its rows share "
            f"their memory; write rows of their own"
        )


def _check_types(path: Path, stage: str, i: int, row: Any) -> None:
    schema = SCHEMAS[stage]
    if not isinstance(row, dict):
        raise UserError(f"{path}, row {i}: a {type(row).__name__}; every row must be a dict")
    missing, extra = sorted(schema.keys - set(row)), sorted(map(str, set(row) - schema.keys))
    if missing or extra:
        problem = f"lacks {missing[0]!r}" if missing else f"has the unknown key {extra[0]!r}"
        raise UserError(f"{path}, row {i}: {problem}; the keys of a {stage} row are {sorted(schema.keys)}")
    for key in schema.sequences:
        value = row[key]
        if key == "reference":
            if not isinstance(value, str):
                _refuse(path, i, key, f"a {type(value).__name__}", "a string, which may be empty")
            if not _is_unicode(value):
                _refuse(path, i, key, "a string that UTF-8 can't write", "a string without lone surrogates")
        elif not _is_ids(value):
            found = f"a {type(value).__name__}"
            if isinstance(value, torch.Tensor):
                found = f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
            _refuse(path, i, key, found, "a 1-D int64 tensor")
    if isinstance(row["prompt_len"], bool) or not isinstance(row["prompt_len"], int):
        _refuse(path, i, "prompt_len", f"a {type(row['prompt_len']).__name__}", "an int")
    if abs(row["prompt_len"]) >= _LIMIT:
        _refuse(path, i, "prompt_len", "a number that needs more than 32 bits", "the length of the prompt")
    if "label" in schema.scalars and not isinstance(row["label"], bool):
        _refuse(path, i, "label", f"a {type(row['label']).__name__}", "True (good) or False")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 1
        and value.dtype in _INTEGERS
        and (value.layout, value.device.type) == (torch.strided, "cpu")
    )


def _check_range(path: Path, stage: str, rows: list[dict[str, Any]], start: int) -> None:
    """Ids are packed in 32 bits: larger ones would wrap around."""
    for column in SCHEMAS[stage].sequences:
        if column == "reference":
            continue
        values = [row[column].numpy() for row in rows]
        flat = np.concatenate(values)
        wide = np.flatnonzero((flat >= _LIMIT) | (flat < -_LIMIT))
        if len(wide):
            ends = np.cumsum([len(part) for part in values])
            i = start + int(np.searchsorted(ends, wide[0], side="right"))
            _refuse(path, i, column, f"the id {flat[wide[0]]}", "ids below 2**31")


def _check_values(path: Path, block: PackedRows, start: int) -> None:
    stage = block.stage
    ids = [c for c in SCHEMAS[stage].sequences if c.endswith("input_ids")]
    for column in ids:
        negative = np.flatnonzero(block.flat[column] < 0)
        if len(negative):
            i = int(np.searchsorted(block.offsets[column], negative[0], side="right")) - 1
            _refuse(path, start + i, column, f"the id {block.flat[column][negative[0]]}", "ids from 0 up")
    prompt_lens = block.scalars["prompt_len"]
    for column in ids:
        room = block.lengths(column) - prompt_lens
        bad = (prompt_lens < 1) | ((room != 0) if stage == "prompts" else (room < 1))
        if bad.any():
            i = int(np.argmax(bad))
            need = "the length of input_ids" if stage == "prompts" else f"from 1 to less than the length of {column}"
            found = f"{prompt_lens[i]}, and {column} has {block.lengths(column)[i]} ids"
            _refuse(path, start + i, "prompt_len", found, need)
    for i in range(len(block)):
        if stage == "finetune":
            _check_targets(path, block, start, i)
        elif stage == "preference":
            n = int(prompt_lens[i])
            chosen, rejected = (block.sequence(column, i)[:n] for column in ids)
            if not np.array_equal(chosen, rejected):
                _refuse(path, start + i, "rejected_input_ids", "another prompt than chosen_input_ids", "the same one")


def _check_targets(path: Path, block: PackedRows, start: int, i: int) -> None:
    ids, targets = block.sequence("input_ids", i), block.sequence("targets", i)
    if len(ids) != len(targets):
        _refuse(path, start + i, "targets", f"{len(targets)} values", f"as many as input_ids ({len(ids)})")
    supervised = targets != IGNORE_INDEX
    if not supervised.any():
        _refuse(path, start + i, "targets", "nothing but the ignored index", "at least one token to learn")
    if supervised[: block.scalars["prompt_len"][i]].any():
        _refuse(path, start + i, "targets", "a supervised token in the prompt", "-100 in all of it")
    if not np.array_equal(ids[supervised], targets[supervised]):
        _refuse(path, start + i, "targets", "ids that differ from input_ids", "input_ids (unshifted) or -100")


def _refuse(path: Path, i: int, key: str, found: str, wanted: str) -> None:
    raise UserError(f"{path}, row {i}, {key!r}: found {found}; it must be {wanted}")


def _int64_columns(block: PackedRows, ignore_index: int) -> Iterator[np.ndarray]:
    """The id sequences of a block, in the order in which `_write_pickle` counts their places."""
    for column in SCHEMAS[block.stage].sequences:
        if column != "reference":
            values = block.flat[column].astype("<i8")
            if column == "targets" and ignore_index != IGNORE_INDEX:
                values[values == IGNORE_INDEX] = ignore_index
            yield values


def _write_pickle(file: IO[bytes], rows: PackedRows) -> None:
    """The pickle of the list of dicts, written as it goes: protocol 2 with the few opcodes `weights_only` reads.

    The storage, the function that makes a tensor of it, and the keys are written out where they first occur and
    memoised (`q` n); from then on they are fetched by number (`h` n).
    """
    columns = SCHEMAS[rows.stage].sequences
    tensors = [c for c in columns if c != "reference"]
    num_values = sum(len(rows.flat[c]) for c in tensors)
    storage = b"(" + _text("storage") + b"ctorch\nLongStorage\n" + _text("0") + _text("cpu") + _int(num_values)
    shared = {
        "storage": storage + b"tQ",
        "function": b"ctorch._utils\n_rebuild_tensor_v2\n",
        "hooks": b"ccollections\nOrderedDict\n",
        **{key: _text(key) for key in ("prompt_len", *columns, "label")},
    }
    numbers: dict[str, bytes] = {}

    def use(name: str) -> bytes:
        if name in numbers:
            return b"h" + numbers[name]
        numbers[name] = bytes([len(numbers)])
        return shared[name] + b"q" + numbers[name]

    file.write(b"\x80\x02]")
    place = 0
    for block in rows.blocks():
        starts = {}
        for column in tensors:
            starts[column] = (place + block.offsets[column]).tolist()
            place = starts[column][-1]
        out = bytearray(b"(")
        for i in range(len(block)):
            out += b"}(" + use("prompt_len") + _int(int(block.scalars["prompt_len"][i]))
            for column in columns:
                out += use(column)
                if column == "reference":
                    out += _text(block.sequence(column, i).tobytes())
                    continue
                first, last = starts[column][i : i + 2]
                # _rebuild_tensor_v2(storage, offset, (size,), (stride,), requires_grad, hooks)
                out += use("function") + b"(" + use("storage") + _int(first) + _int(last - first) + b"\x85"
                out += b"K\x01\x85\x89" + use("hooks") + b")RtR"
            if "label" in block.scalars:
                out += use("label") + (b"\x88" if block.scalars["label"][i] else b"\x89")
            out += b"u"
        file.write(bytes(out) + b"e")
    file.write(b".")


def _int(value: int) -> bytes:
    if value < 1 << 8:
        return b"K" + bytes([value])
    if value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(value)) + value
