"""A corpus of hostile files, made where a test wants them, and a child process that runs an entry point on one.

Each maker takes the file or folder it spoils, and the canary: a path that only executed code would create.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.data import twin
from rlhf.files import write_json

GIGA = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit status, what it printed, and by how many MB its peak memory grew."""

    status: int
    printed: str
    grown: float


def in_child(call: Callable[[], Any], log: Path, *, seconds: int = 60, room: int = 64 * GIGA) -> Outcome:
    """Run `call` in a forked child whose address space may grow by `room` bytes, and end it after `seconds`.

    Status 0 is a return, 2 the exit of a script on a user's mistake, 1 any other exception, -14 the time limit.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with (
            open(log, "w", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                signal.alarm(seconds)
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (taken + room, taken + room))
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                call()
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            os.write(write, struct.pack("<d", grown))
        os._exit(status)
    os.close(write)
    with open(read, "rb") as answer:
        grown = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome(code, log.read_text(encoding="utf-8"), struct.unpack("<d", grown)[0] if grown else float("nan"))


@contextlib.contextmanager
def command_line(*argv: str) -> Iterator[None]:
    """Let a script's `launch` read these arguments."""
    before, sys.argv = sys.argv, ["script", *argv]
    try:
        yield
    finally:
        sys.argv = before


# Pickles that would execute.


class _Call:
    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def calls(canary: Path) -> dict[str, Any]:
    """Objects whose unpickling would create the canary, by what they would call."""
    return {
        "os.system": _Call(os.system, f"touch {canary}"),
        "eval": _Call(eval, f"open({str(canary)!r}, 'w')"),
        "exec": _Call(exec, f"open({str(canary)!r}, 'w')"),
        "nested": [{"prompt_len": 1, "input_ids": {"deep": [(_Call(os.mkdir, str(canary)),)]}}],
        "getattr": _Call(getattr, _Call(__import__, "os"), "getcwd"),
    }


def save(path: Path, content: Any, *, zipped: bool = True) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def plain_pickle(path: Path, content: Any) -> None:
    """What pickle writes, with no torch around it."""
    path.write_bytes(pickle.dumps(content))


def tar(path: Path, content: Any) -> None:
    """The oldest format of torch, which is unpickled piece by piece."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


# Torch archives whose pickles lie about their storages.


class _Storage:
    def __init__(self, num: int) -> None:
        self.num = num


class _Tensor:
    """Unpickles as a view of a storage, whatever that holds."""

    def __init__(self, storage: _Storage, offset: int, size: int, stride: int) -> None:
        self.place = storage, offset, (size,), (stride,), False, collections.OrderedDict()

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.place


class _Pickler(pickle.Pickler):
    def persistent_id(self, item: Any) -> tuple | None:
        return ("storage", torch.LongStorage, "0", "cpu", item.num) if isinstance(item, _Storage) else None


def archive(path: Path, content: Any, data: bytes = bytes(800)) -> None:
    """A torch archive of one storage with the bytes `data`."""
    pickled = io.BytesIO()
    _Pickler(pickled, 2).dump(content)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled.getvalue())
        for name, text in (("byteorder", "little"), ("version", "3\n")):
            file.writestr(f"archive/{name}", text)
        file.writestr("archive/data/0", data)


def rows_of(*views: tuple[int, int, int], num: int) -> list[dict[str, Any]]:
    """Rows for SFT that are views (offset, size, stride) of one storage that says it has `num` values."""
    storage = _Storage(num)
    return [
        {"prompt_len": 1, "input_ids": _Tensor(storage, *view), "targets": _Tensor(storage, *view)} for view in views
    ]


LYING_ARCHIVES = {
    "a storage of 2**40 values": rows_of((0, 1 << 40, 1), num=1 << 40),
    "a view beyond its storage": rows_of((90, 20, 1), num=100),
    "strides beyond the storage": rows_of((0, 10, 1000), num=100),
    "one value as 2**40": rows_of((0, 1 << 40, 0), num=100),
    "views over and over": rows_of(*[(0, 100, 1)] * 5000, num=100),
    "a negative size": rows_of((0, -5, 1), num=100),
    "a bytearray of 10 GB": [_Call(bytearray, 10 * GIGA)],
}


def _zeros(num_bytes: int, *, gzip: bool = False, first: bytes = b"") -> Iterator[bytes]:
    """A deflated stream of zeros, about a thousandth of the size, without deflating them all; no valid checksum."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    if gzip:
        yield b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"
    yield squeeze.compress(first) + squeeze.flush(zlib.Z_FULL_FLUSH)
    block = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    for _ in range(num_bytes >> 20):
        yield block
    yield squeeze.flush() + (bytes(8) if gzip else b"")


def zip_bomb(path: Path, record: str) -> None:
    """A torch archive of which one record unpacks to 10 GB of zeros."""
    archive(path, rows_of((0, 5, 1), num=100))
    with zipfile.ZipFile(path) as file:
        others = {info.filename: file.read(info) for info in file.infolist() if info.filename != record}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in others.items():
            file.writestr(name, data)
        with file.open(record, "w", force_zip64=True) as member:
            for block in _zeros(10 * GIGA):
                member.write(block)
        file.filelist[-1].compress_type, file.filelist[-1].file_size = zipfile.ZIP_DEFLATED, 10 * GIGA


def gzip_bomb(path: Path, first: bytes, num_bytes: int = 10 * GIGA) -> None:
    """A gzip file that goes on with zeros after `first`."""
    with open(path, "wb") as file:
        for block in _zeros(num_bytes, gzip=True, first=first):
            file.write(block)


# Safetensors.


def safetensors(path: Path, header: dict | bytes, data: bytes = b"", *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _entry(shape: list, first: int, last: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def bad_safetensors() -> dict[str, tuple]:
    """Arguments of `safetensors` for every kind of header that lies."""
    a, twice = _entry([2], 0, 8), json.dumps(_entry([2], 0, 8))
    return {
        "a header of 2**62 bytes": ({"a": a}, bytes(8), 1 << 62),
        "a header of no bytes": (b"", bytes(8)),
        "a nested header": (b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}",),
        "a header of 90 MB": (b'{"a":[' + b"[]," * (30 << 20) + b"[]]}",),
        "a shape that overflows": ({"a": _entry([1 << 33, 1 << 33], 0, 8)}, bytes(8)),
        "offsets beyond the file": ({"a": _entry([1 << 38], 0, 1 << 40)}, bytes(8)),
        "offsets that overlap": ({"a": a, "b": _entry([2], 4, 12)}, bytes(12)),
        "a negative shape": ({"a": _entry([-2], 0, 8)}, bytes(8)),
        "a negative offset": ({"a": _entry([2], -8, 0)}, bytes(8)),
        "a name that is there twice": (f'{{"a":{twice},"a":{twice}}}'.encode(), bytes(8)),
        "another dtype": ({"a": _entry([2], 0, 8, "F128")}, bytes(8)),
        "a dtype of another size": ({"a": _entry([2], 0, 8, "F16")}, bytes(8)),
        "a shape that is no list": ({"a": {**a, "shape": 2}}, bytes(8)),
        "bytes that belong to nobody": ({"a": a}, bytes(80)),
    }


# JSON.

BAD_JSON = {
    "nested": b"[" * 1_000_000,
    "nested objects": b'{"a":' * 1_000_000,
    "a million digits": b'{"a": 1' + b"0" * 1_000_000 + b"}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a list": b"[1]",
    "a key twice": b'{"model_type": "llama", "model_type": "gpt2"}',
    "8 MB of lists": b'{"a": [' + b"[]," * (8 << 20) + b"[]]}",
}


def change_json(path: Path, **values: Any) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})


# What is no file.


def no_file(path: Path, kind: str) -> None:
    """Put a pipe, a device or a link in the place of a file or folder."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}-before"))
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to({"zeros": "/dev/zero", "dangling": path.parent / "nowhere", "folder": path.parent}[kind])


# Twins that were written to be believed: whole, with a right checksum, and of the age of their `.pt`.


def change_twin(pt: Path, change: Callable[[dict, dict[str, np.ndarray], dict[str, str]], None]) -> None:
    """Let `change(layout, arrays, metadata)` spoil the twin of `pt`, and make all its checksums right again."""
    path = pt.with_suffix(".safetensors")
    layout, metadata, start = twin._read_header(path)
    content = path.read_bytes()
    codes = twin._DTYPES
    arrays = {
        name: np.frombuffer(content[start + first : start + last], codes[entry["dtype"]]).reshape(entry["shape"]).copy()
        for name, entry in layout.items()
        for first, last in [entry["data_offsets"]]
    }
    places = {name: entry["data_offsets"] for name, entry in layout.items()}
    change(layout, arrays, metadata)
    data = bytearray(len(content) - start)
    arrays["row_hashes"] = _hashes(pt, arrays)
    for name, values in arrays.items():
        first, last = places[name]
        data[first:last] = values.tobytes()
    sequences = [name for name in arrays if f"{name}.offsets" in arrays]
    index = {name: values for name, values in arrays.items() if name not in sequences}
    metadata["checksum"] = twin._checksum(layout, metadata, index)
    path.write_bytes(twin._encode_header(layout, metadata) + bytes(data))
    twin.adopt_time(path, pt)


def _hashes(pt: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    stage = pt.stem.partition("_")[0]
    sequences = twin.SCHEMAS[stage].sequences
    rows = twin.PackedRows(
        stage,
        {name: arrays[name] for name in sequences},
        {name: arrays[f"{name}.offsets"] for name in sequences},
        {name: arrays[name] for name in twin.SCHEMAS[stage].scalars},
    )
    try:
        return rows.hashes()
    except (ValueError, IndexError):
        return arrays["row_hashes"]
