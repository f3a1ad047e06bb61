"""Where rows come from: local files of any usual kind, or a data set of the hub; read as a stream, each row placed."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from rlhf.data.rows import UnusableRowError
from rlhf.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
CHUNK_ROWS = 512
_CHUNK_BYTES = 1 << 20
_READ = 1 << 16
_LARGEST_ITEM = 1 << 24
_MOST_FOLD = 50
_BETWEEN = re.compile(r"[\s,]*")
_SPLIT_WORDS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}


@dataclass(frozen=True)
class Entry:
    """One row as read: `line` (or row number) counts from 1; `content` is a JSON line as bytes, a value, or why not."""

    line: int
    content: Any


@dataclass(frozen=True)
class Chunk:
    """Some hundred rows of one file, and how far they bring the reader (`progress`, in the source's own unit)."""

    file: str
    entries: tuple[Entry, ...]
    progress: int


class Source:
    """The rows of one split of a data set."""

    def __init__(self, files: list[Path] | None = None, dataset: Any = None, name: str = "") -> None:
        self.files, self.dataset, self.name = files or [], dataset, name
        self.total = sum(path.stat().st_size for path in self.files) if dataset is None else len(dataset)

    def chunks(self, limit: int | None = None) -> Iterator[Chunk]:
        """All rows, at most `limit`, some hundred at a time."""
        left = sys.maxsize if limit is None else limit
        for stream in self._streams():
            batch: list[Entry] = []
            size, before = 0, 0
            for entry in stream.entries:
                if left <= 0:
                    break
                left -= 1
                batch.append(entry)
                size += len(entry.content) if isinstance(entry.content, bytes) else 1000
                if len(batch) >= CHUNK_ROWS or size >= _CHUNK_BYTES:
                    here = max(before, min(stream.position(), stream.total))
                    yield Chunk(stream.name, tuple(batch), here - before)
                    batch, size, before = [], 0, here
            yield Chunk(stream.name, tuple(batch), stream.total - before)

    def _streams(self) -> Iterator[_Stream]:
        if self.dataset is not None:
            done = [0]
            yield _Stream(self.name, _hub_entries(self.dataset, done), lambda: done[0], self.total)
        for path in self.files:
            size = path.stat().st_size
            with open(path, "rb") as raw:
                yield _Stream(str(path), _file_entries(path, raw), partial(_position, raw, size), size)


@dataclass(frozen=True)
class _Stream:
    """The rows of one file or hub split, and how far of its `total` they have been read."""

    name: str
    entries: Iterator[Entry]
    position: Callable[[], int]
    total: int


def open_sources(path: str | None, hub_name: str, hub_folder: str | None = None) -> dict[str, Source]:
    """The splits of a data set by the names that its owner gave them; a single file is the split `train`.

    `path` is a file or a folder of files (.json, .jsonl, .csv, .parquet, each also .gz), told apart by their names
    (train…, validation…, valid…, val…, dev…, test…); without it `hub_name` is fetched from the hub.

    Raises:
        UserError: no such path, no data file in it, or a data set that can't be fetched.
    """
    if path is None:
        return _open_hub(hub_name, hub_folder)
    root = Path(path).expanduser()
    if root.is_file():
        if not is_data_file(root):
            raise UserError(
                f"--dataset_path {path} is none of {', '.join(SUFFIXES)}, or those with .gz; give one of these"
            )
        return {"train": Source([root])}
    if not root.is_dir():
        raise UserError(f"--dataset_path {path}: no such file or folder; give one with {', '.join(SUFFIXES)} data")
    files = sorted(file for file in root.rglob("*") if file.is_file() and is_data_file(file))
    if not files:
        raise UserError(
            f"--dataset_path {path}: no {', '.join(SUFFIXES)} file (or .gz of one) in this folder; give one with data"
        )
    named: dict[str, list[Path]] = {}
    for file in files:
        named.setdefault(_split_of(file.relative_to(root)), []).append(file)
    if "train" not in named:
        if "" not in named:
            raise UserError(f"--dataset_path {path}: no training file; give one the name train{files[0].suffix}")
        named["train"] = named.pop("")
    elif "" in named:
        raise UserError(
            f"--dataset_path {path}: {named[''][0].name} stands beside files named for their split; name it "
            "train…, validation… or test…, or move it away"
        )
    return {name: Source(group) for name, group in named.items()}


def choose_splits(sources: dict[str, Source], wanted: dict[str, str]) -> dict[str, Source]:
    """The sources of train, validation and test, where the data set has them.

    `wanted` gives for each the name in the data set, `auto` (its usual names) or `none` (cut from train).

    Raises:
        UserError: a name that the data set does not have.
    """
    chosen = {}
    for split, name in wanted.items():
        if name == "none":
            continue
        names = _SPLIT_WORDS[split] if name == "auto" else (name,)
        found = [candidate for candidate in names if candidate in sources]
        if found:
            chosen[split] = sources[found[0]]
        elif name != "auto" or split == "train":
            raise UserError(
                f"--{split}_split={name}: the data set has no such split; it has {', '.join(sorted(sources))}"
            )
    return chosen


def is_data_file(path: Path) -> bool:
    """Whether the name says that this module can read it."""
    return path.name.lower().removesuffix(".gz").endswith(SUFFIXES) and not path.name.startswith(".")


def _split_of(path: Path) -> str:
    for part in (path.name, *(folder.name for folder in path.parents)):
        word = re.match(r"[a-z]*", part.lower())[0]
        for split, words in _SPLIT_WORDS.items():
            if word in words:
                return split
    return ""


def _open_hub(name: str, folder: str | None) -> dict[str, Source]:
    import datasets
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        splits = datasets.load_dataset(name, data_dir=folder)
    except (OSError, ValueError, HfHubHTTPError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"the data set {name!r} can't be fetched from the hub ({reason}); check the name and the network, or "
            "give local files with --dataset_path"
        ) from error
    return {split: Source(dataset=splits[split], name=f"{name}/{split}") for split in splits}


def _hub_entries(dataset: Any, done: list[int]) -> Iterator[Entry]:
    for batch in dataset.iter(batch_size=CHUNK_ROWS):
        for values in zip(*batch.values(), strict=True):
            done[0] += 1
            yield Entry(done[0], dict(zip(batch, values, strict=True)))


def _file_entries(path: Path, raw: IO[bytes]) -> Iterator[Entry]:
    """The rows of one file. What breaks the file off becomes its last entry."""
    name = path.name.lower()
    file = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
    name = name.removesuffix(".gz")
    line = 0
    try:
        if name.endswith(".parquet"):
            entries = _parquet_entries(path, file)
        elif name.endswith(".csv"):
            entries = _csv_entries(file)
        else:
            entries = _json_entries(file, may_be_list=name.endswith(".json"))
        for entry in entries:
            line = entry.line
            yield entry
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Entry(line + 1, _broken(f"the compressed file breaks off ({error})", "copy or download it again"))


def _json_entries(file: IO[bytes], *, may_be_list: bool) -> Iterator[Entry]:
    start = file.peek(_READ)  # type: ignore[attr-defined]
    if may_be_list and start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from _list_entries(file)
        return
    for number, line in enumerate(iter(lambda: file.readline(_LARGEST_ITEM), b""), start=1):
        if len(line) == _LARGEST_ITEM and not line.endswith(b"\n"):
            yield Entry(number, _too_long("line"))
            return
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield Entry(number, line)


def _list_entries(file: IO[bytes]) -> Iterator[Entry]:
    """The items of a JSON list, one at a time; a syntax error ends the list, since what follows can't be placed."""
    decoder, text, line = json.JSONDecoder(), "", 1
    characters = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    opened, enough = False, 0
    while True:
        read = file.read1(_READ)  # type: ignore[attr-defined]
        text += characters.decode(read, final=not read)
        if read and len(text) < enough:
            continue
        position = 0
        while True:
            rest = _BETWEEN.match(text, position).end()
            line += text.count("\n", position, rest)
            position = rest
            if position < len(text) and not opened:
                opened, position = True, position + 1
                continue
            if position >= len(text):
                break
            if text[position] == "]":
                return
            try:
                item, end = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                if len(text) - position > _LARGEST_ITEM:
                    yield Entry(line, _too_long("row"))
                    return
                if not read or not isinstance(error, json.JSONDecodeError):
                    fix = "the rest of the file is lost with it; mend it there, or write one object a line"
                    yield Entry(line, _broken("the JSON list breaks off here", fix))
                    return
                break
            yield Entry(line, item)
            line += text.count("\n", position, end)
            position = end
        text = text[position:]
        # An item is parsed from its start each time: a long one not before there is twice as much of it.
        enough = 2 * len(text) if len(text) > 4 * _READ else 0
        if not read:
            yield Entry(line, _broken("the JSON list is not closed", "the file was cut; copy it again"))
            return


def _csv_entries(file: IO[bytes]) -> Iterator[Entry]:
    csv.field_size_limit(_LARGEST_ITEM)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[arg-type]
    reader = csv.DictReader(_short_lines(text))
    try:
        header = reader.fieldnames  # reads it, so that the next line is the first row
    except csv.Error as error:
        yield Entry(1, _broken(f"no valid CSV ({error})", "write a header line with the names of the columns"))
        return
    while header:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield Entry(line, _broken(f"no valid CSV ({error})", "put the text in quotes, and double those inside"))
            continue
        except _TooLongError:
            yield Entry(line, _too_long("line"))
            return
        if row is None:
            return
        if None in row:
            fix = "put texts with commas in quotes"
            yield Entry(line, _broken("more cells than the header has columns", fix))
        else:
            yield Entry(line, {key: value for key, value in row.items() if value is not None})


class _TooLongError(Exception):
    pass


def _short_lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(_LARGEST_ITEM):
        if len(line) == _LARGEST_ITEM and not line.endswith("\n"):
            raise _TooLongError
        yield line


def _parquet_entries(path: Path, file: IO[bytes]) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as seekable:
        if isinstance(file, gzip.GzipFile):
            most = _LARGEST_ITEM + _MOST_FOLD * path.stat().st_size
            while block := file.read(_READ):
                seekable.write(block)
                if seekable.tell() > most:
                    raise UserError(
                        f"{path} unpacks to more than {_MOST_FOLD} times its size, as no Parquet file does (it is "
                        f"compressed in itself); write it without gzip"
                    )
            seekable.seek(0)
            file = seekable  # type: ignore[assignment]
        number = 0
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=CHUNK_ROWS):
                for content in _parquet_rows(batch):
                    number += 1
                    yield Entry(number, content)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path}: no readable Parquet file after row {number} ({reason}); write it again"
            ) from error


def _parquet_rows(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [_broken("a text is not valid UTF-8", "save the file as UTF-8")]
        return [row for i in range(len(batch)) for row in _parquet_rows(batch.slice(i, 1))]


def _position(raw: IO[bytes], size: int) -> int:
    return size if raw.closed else raw.tell()  # a text wrapper closes its file at the end


def _too_long(what: str) -> UnusableRowError:
    return _broken(
        f"the {what} is longer than {_LARGEST_ITEM >> 20} MB",
        "the rest of the file is lost with it; write one row a line",
    )


def _broken(reason: str, fix: str) -> UnusableRowError:
    return UnusableRowError(reason, fix)


def decode(entry: Entry) -> Any:
    """The value of an entry; raises what makes it unusable."""
    content = entry.content
    if isinstance(content, UnusableRowError):
        raise content
    if not isinstance(content, bytes):
        return content
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UnusableRowError("the line is not valid UTF-8", f"byte {error.start}: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        cut = error.pos >= len(content.decode("utf-8").rstrip()) or "Unterminated" in error.msg
        what = "the JSON object is cut short" if cut else "the line is not valid JSON"
        raise UnusableRowError(what, f"character {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise UnusableRowError("the line is not valid JSON", "it nests too deeply") from None
    except ValueError:
        raise UnusableRowError("the line is not valid JSON", "it holds a number of thousands of digits") from None
