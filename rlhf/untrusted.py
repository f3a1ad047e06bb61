"""Files from elsewhere: the one place that opens the JSON, pickles and safetensors that others may have written.

What is looked at before a library reads a file: that it is a file (no pipe, no device, which could be read for ever),
that what it declares lies within its own bytes (so that memory is bounded by the size of the file), and that nothing in
it is compressed or asks for code. Whatever a library raises all the same becomes one sentence that names the file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf.errors import UserError

LARGEST_JSON = 4 << 20
"""Bytes of a settings file; parsed, the worst of that size takes some 60 MB."""

_LARGEST_INDEX = 16 << 20
_LARGEST_TOKENIZER = 256 << 20
_LARGEST_HEADER = 8 << 20
_MOST_LAYERS = 1024
_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_WRITE_AGAIN = "write or copy the file again"


class UnreadableFileError(UserError):
    """A file that is damaged, hostile or of another kind than its name says."""


class TensorEntry(NamedTuple):
    """What the header of a safetensors file says of one tensor: `first` and `last` are bytes of the data part."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


def open_file(path: str | Path) -> IO[bytes]:
    """Open a regular file, or a link to one, for reading.

    Raises:
        FileNotFoundError: there is none.
        UnreadableFileError: a folder, pipe, socket or device, a loop of links, or a file that may not be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableFileError(f"{path} is no file but a folder, a pipe or a device; put a file there")
        return open(path, "rb")
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args) from None
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"{path} can't be opened ({error}); {_WRITE_AGAIN}") from None


def read_json(
    path: str | Path, remedy: str = _WRITE_AGAIN, *, largest: int = LARGEST_JSON, constants: bool = False
) -> dict[str, Any]:
    """The object in a JSON file, UTF-8 with or without a byte order mark.

    Args:
        remedy: what the user can do, the end of the sentence.
        largest: bytes that the file may have.
        constants: take NaN and Infinity, which are no JSON but which Python writes.

    Raises:
        FileNotFoundError: there is none.
        UnreadableFileError: no JSON object; one that nests too deeply, names a key twice or is too large.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
        return found

    with open_file(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise UnreadableFileError(f"{path} has more than {largest >> 20} MB, which no file of its kind has; {remedy}")
    try:
        text = content.decode("utf-8-sig")
        del content
        found = json.loads(text, parse_constant=None if constants else refuse, object_pairs_hook=unique)
    except ValueError as error:
        reason = str(error).partition("\n")[0][:200]
        raise UnreadableFileError(f"{path} cannot be read as JSON ({reason}); {remedy}") from None
    except RecursionError:
        raise UnreadableFileError(f"{path} cannot be read as JSON (it nests too deeply); {remedy}") from None
    if not isinstance(found, dict):
        raise UnreadableFileError(f"{path} holds no JSON object but a {type(found).__name__}; {remedy}")
    return found


def check_pickle(path: str | Path) -> bool:
    """Whether the torch file at `path` is a zip archive (it can be mapped), which then holds no more than its bytes.

    Raises:
        FileNotFoundError: there is none.
        UnreadableFileError: a record is compressed (torch compresses none: it would be a bomb), overlaps another or
            stands there twice, or the pickle asks for memory by its number of bytes.
    """
    with open_file(path) as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        size = file.seek(0, os.SEEK_END)
        if not size:
            raise UnreadableFileError(f"{path} is damaged or no torch file (it ends too early); {_WRITE_AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            # The one function which torch allows that turns a number into as many bytes.
            if re.search(rb"c(?:builtins|__builtin__)\nbytearray\n", mapped):
                raise UnreadableFileError(f"{path} asks for a bytearray, which none of our files hold; remove it")
            ends_whole = mapped[-22:-18] == b"PK\x05\x06"
        if not is_zip:
            return False
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise UnreadableFileError(f"{path} is damaged or no torch file ({error}); {_WRITE_AGAIN}") from None
    if any(record.compress_type or record.file_size != record.compress_size for record in records):
        raise UnreadableFileError(f"{path} holds compressed records, and torch writes none; write it with torch.save")
    names = {record.filename for record in records}
    if not ends_whole or len(names) != len(records) or sum(record.file_size for record in records) > size:
        raise UnreadableFileError(f"{path} is an archive whose records overlap; write it with torch.save")
    return True


def read_pickle(path: str | Path, *, mapped: bool = False) -> Any:
    """What a torch file holds, on the CPU; nothing in it is ever executed (`weights_only`).

    Args:
        mapped: the tensors are views of the mapped file, where it is a zip archive.

    Raises:
        FileNotFoundError: there is none.
        UnreadableFileError: it is damaged, needs code to load, or declares more than it holds.
    """
    is_zip = check_pickle(path)
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mapped and is_zip)
    except Exception as error:  # of a pickle that was tampered with, torch raises anything
        raise UnreadableFileError(why_no_pickle(path, error)) from None


def why_no_pickle(path: str | Path, error: Exception) -> str:
    """One sentence for what torch raised on reading the file (or the weights of the folder) at `path`."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, UnpicklingError):
        return (
            f"{path} needs {code[1] if code else 'code'} to load, and files that need code are not loaded; write it "
            f"again with torch.save, of tensors, integers, booleans and strings"
        )
    return f"{path} is damaged or no torch file ({first_line(error)}); {_WRITE_AGAIN}"


def tensor_header(path: str | Path) -> dict[str, TensorEntry]:
    """The header of a safetensors file, each tensor's bytes checked: within the file, of its shape, its alone.

    Raises:
        FileNotFoundError: there is none.
        UnreadableFileError: it is no whole safetensors file.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise _bad_tensors(path, "its header is longer than the file" if length else "it ends too early")
        if length > _LARGEST_HEADER:
            raise _bad_tensors(path, f"its header has more than {_LARGEST_HEADER >> 20} MB")
        content = file.read(length)
    if content.count(b"{") > content.count(b'"data_offsets"') + 2 or content.count(b"[") > 2 * content.count(b"{"):
        raise _bad_tensors(path, "its header is no table of tensors")
    try:
        header = dict(_unique(json.loads(content, object_pairs_hook=list)))
        metadata = header.pop("__metadata__", [])
        if not all(isinstance(value, str) for _, value in metadata):
            raise ValueError("its metadata are no strings")
        found = {name: _entry(name, dict(_unique(entry))) for name, entry in header.items()}
        end = 0
        for name, entry in sorted(found.items(), key=lambda item: item[1][2:]):
            if entry.first != end:
                raise ValueError(f"the bytes of {name} do not follow those before them")
            end = entry.last
        if end != size - 8 - length:
            raise ValueError(f"it holds {size - 8 - length:,} bytes of tensors, and its header says {end:,}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad_tensors(path, first_line(error)) from None
    return found


def _unique(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("its header names something twice")
    return pairs


def _entry(name: str, given: dict[str, Any]) -> TensorEntry:
    dtype, shape, (first, last) = given["dtype"], given["shape"], given["data_offsets"]
    if dtype not in _DTYPE_BITS:
        raise ValueError(f"{name} is of the unknown type {dtype!r}")
    if any(type(value) is not int or value < 0 for value in (*shape, first, last)) or len(shape) > 64:
        raise ValueError(f"{name} has no shape or place")
    if 8 * (last - first) != math.prod(shape) * _DTYPE_BITS[dtype]:
        raise ValueError(f"{name} does not fill its place")
    return TensorEntry(dtype, tuple(shape), first, last)


def _bad_tensors(path: str | Path, reason: str) -> UnreadableFileError:
    return UnreadableFileError(f"the weights in {path} cannot be read ({reason}); {_WRITE_AGAIN}")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU; raises what `tensor_header` raises."""
    tensor_header(path)
    try:
        return load_file(path)
    except Exception as error:  # of a file that changed meanwhile, safetensors raises several kinds
        raise _bad_tensors(path, first_line(error)) from None


def check_folder(folder: str | Path, *, weights: bool = True) -> dict[str, TensorEntry]:
    """Look at every file of a local model or tokenizer folder that transformers, tokenizers or peft may read.

    Args:
        weights: look at the weights too.

    Returns:
        The tensors of its safetensors files by name.

    Raises:
        UnreadableFileError: a file is none, damaged, too large for its kind, or names another outside the folder.
    """
    tensors: dict[str, TensorEntry] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin"):
            continue
        is_weights = path.suffix in (".safetensors", ".bin")
        if is_weights and not (weights and path.name.startswith(("model", "pytorch_model", "adapter_model"))):
            continue
        try:
            open_file(path).close()
        except FileNotFoundError:
            raise UnreadableFileError(f"{path} is a link to a file that is not there; copy the file itself") from None
        if path.suffix == ".safetensors":
            tensors |= tensor_header(path)
        elif path.suffix == ".bin":
            check_pickle(path)
        elif path.name.endswith(".index.json"):
            if weights:
                _check_index(path)
        elif path.name.endswith("config.json"):
            _check_layers(path, read_json(path, constants=True))
        elif path.stat().st_size > _LARGEST_TOKENIZER:
            raise UnreadableFileError(f"{path} has more than {_LARGEST_TOKENIZER >> 20} MB; {_WRITE_AGAIN}")
    return tensors


def shards(index: str | Path) -> list[str]:
    """The file names in the weight map of an index of weights, all of them in the index' own folder.

    Raises:
        FileNotFoundError: there is no index.
        UnreadableFileError: it can't be read, or names something else than a file of its own folder.
    """
    names = read_json(index, largest=_LARGEST_INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UnreadableFileError(f"{index} has no weight_map of file names; {_WRITE_AGAIN}")
    files = sorted(set(names.values()))
    for name in files:
        if not name or name != Path(name).name or "\\" in name or "\0" in name:
            raise UnreadableFileError(f"{index} names {name!r}, and weights lie in its own folder; {_WRITE_AGAIN}")
    return files


def _check_index(path: Path) -> None:
    for name in shards(path):
        if not (path.parent / name).is_file():
            raise UnreadableFileError(f"{path.parent / name} is missing, and {path.name} names it; copy it too")


def _check_layers(path: Path, settings: dict[str, Any]) -> None:
    """Configurations make lists and modules of these numbers before any weight is looked at."""
    left: list[tuple[str, Any]] = list(settings.items())
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(name, item) for item in value]
        elif isinstance(value, int) and value > _MOST_LAYERS and ("layer" in name or name == "attention_types"):
            raise UnreadableFileError(f"{path} says {name}={value}, and no model has more than {_MOST_LAYERS}; mend it")


def check_inside(folder: Path, experiment: Path) -> None:
    """Refuse a folder of an experiment if links bring it, or a file in it, elsewhere: an experiment holds its own.

    Raises:
        UnreadableFileError: following all links, one of them does not lie in `experiment`.
    """
    root = experiment.resolve()
    for path in (folder, *sorted(folder.rglob("*"))):
        try:
            inside = path.resolve(strict=True).is_relative_to(root)
        except (OSError, RuntimeError):
            inside = False
        if not inside:
            raise UnreadableFileError(f"{path} is a link that leads out of {experiment}; put a copy there")


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuse weights that hold NaN or infinity.

    One pass over the memory: a finite sum has no other terms, and only a sum that is not finite is looked into.

    Raises:
        UserError: naming the first such tensor.
    """
    for name, tensor in tensors:
        floats = tensor.is_floating_point() and tensor.device.type != "meta"
        if floats and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise UserError(
                f"{where}: {name} holds NaN or infinite values, so nothing can be computed with it; take an earlier "
                f"checkpoint, or copy the weights again"
            )


def first_line(error: Exception) -> str:
    """The first line of what an error says, without its final stop; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(" .:")[:300]
