"""Reading rows: every kind of file, every kind of broken row, each with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.dialogue import DialogueParser
from rlhf.data.rows import UnusableRowError
from rlhf.data.sources import choose_splits, decode, open_sources
from rlhf.errors import UserError

ROWS = [{"prompt": f"Q {i}: ünï, \"x\"\n'y'", "completion": f" a{i}"} for i in range(1300)]
AUTO = {"train": "auto", "validation": "auto", "test": "auto"}


def as_bytes(suffix: str) -> bytes:
    if suffix == ".json":
        return json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
        return text.getvalue().encode()
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


def entries(path, limit=None):
    return [entry for chunk in open_sources(str(path), "")["train"].chunks(limit) for entry in chunk.entries]


def values(path, limit=None) -> list:
    return [decode(entry) for entry in entries(path, limit)]


def reasons(path) -> list[tuple[int, str]]:
    """Line and reason of each unusable row."""
    found = []
    for entry in entries(path):
        try:
            decode(entry)
        except UnusableRowError as why:
            found.append((entry.line, why.reason))
    return found


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file(tmp_path, suffix, zipped):
    """JSON lists and lines, CSV and Parquet, each also gzipped, hold the same rows; progress adds up to the size."""
    path = tmp_path / f"data{suffix}{'.gz' if zipped else ''}"
    content = as_bytes(suffix)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert values(path) == ROWS
    assert values(path, limit=700) == ROWS[:700]
    source = open_sources(str(path), "")["train"]
    chunks = list(source.chunks())
    assert sum(chunk.progress for chunk in chunks) == source.total == path.stat().st_size
    assert max(len(chunk.entries) for chunk in chunks) <= 512


def test_json_lines_may_be_called_json_and_start_with_a_mark(tmp_path):
    """A .json file of lines, a byte-order mark, blank lines, bare strings."""
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n"text"\n[2]\n')
    assert [(entry.line, decode(entry)) for entry in entries(path)] == [(1, {"a": 1}), (3, "text"), (4, [2])]
    path.write_bytes(b'\xef\xbb\xbf [\n{"a":\n 1},\n "text"\n]\n')
    assert [(entry.line, decode(entry)) for entry in entries(path)] == [(2, {"a": 1}), (4, "text")]


def test_lines_of_csv_rows_count_line_feeds_inside_cells(tmp_path):
    """C40: file:line points at the first line of the row."""
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,e\nf\n')
    assert [(entry.line, decode(entry)) for entry in entries(path)] == [
        (2, {"prompt": "a\nb", "completion": "c"}),
        (4, {"prompt": "d", "completion": "e"}),
        (5, {"prompt": "f"}),
    ]


def test_a_csv_index_column_without_a_name_is_no_error(tmp_path):
    """pandas writes one."""
    path = tmp_path / "a.csv"
    path.write_text(",prompt\n0,a\n1,b\n")
    assert [row["prompt"] for row in values(path)] == ["a", "b"]


BAD_LINES = [
    (b"null", "the row is null, not an object"),
    (b"[1, 2]", "the row is a list, not an object"),
    (b'"text"', "the row is a text, not an object"),
    (b"17", "the row is a number, not an object"),
    (b'{"rejected": "x"}', "missing key 'chosen'"),
    (b'{"chosen": null}', "'chosen' is null"),
    (b'{"chosen": 5}', "'chosen' is a number, not a text"),
    (b'{"chosen": {"a": 1}}', "'chosen' is an object, not a text"),
    (b'{"chosen": ""}', "'chosen' is empty"),
    (b'{"chosen": "\\n\\nHuman: a\\n\\nAssistant: "}', "the response of 'chosen' is empty"),
    (b'{"chosen": "\\n\\nHuman: a"}', "'chosen' has no Assistant turn"),
    (b'{"chosen": "a\\ud800"}', "'chosen' is not valid Unicode"),
    (b'{"chosen": "\xff\xfe"}', "the line is not valid UTF-8"),
    (b'{"chosen": "abc', "the JSON object is cut short"),
    (b'{"chosen": "abc"', "the JSON object is cut short"),
    (b"{'chosen': 'abc'}", "the line is not valid JSON"),
    (b"hello", "the line is not valid JSON"),
    (b"[" * 100_000, "the line is not valid JSON"),
]


def test_every_kind_of_bad_line_has_its_place_and_reason(tmp_path):
    """C40: none of them stops the reading of the good rows between them."""
    good = json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b"}).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(line + b"\n" + good + b"\n" for line, _ in BAD_LINES))
    parse = DialogueParser("finetune")
    found, num_good = [], 0
    for entry in entries(path):
        try:
            parse(decode(entry))
            num_good += 1
        except UnusableRowError as why:
            found.append((entry.line, why.reason, bool(why.fix), why.bad))
    assert found == [(2 * i + 1, reason, True, True) for i, (_, reason) in enumerate(BAD_LINES)]
    assert num_good == len(BAD_LINES)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_compressed_file_that_breaks_off_keeps_its_rows(tmp_path, suffix):
    """C40: what could be read is read; the break is one broken row."""
    path = tmp_path / f"a{suffix}.gz"
    path.write_bytes(gzip.compress(as_bytes(suffix))[:-2000])
    (line, reason), *more = reasons(path)
    assert not more
    assert "compressed file breaks off" in reason
    assert line > 100
    num_rows = len(entries(path)) - 1
    assert num_rows > 100


def test_a_json_list_that_breaks_off_keeps_its_rows(tmp_path):
    """C40: cut inside an item, after an item, or with a fault in the middle."""
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n{"a": 2},\n{"a"')
    assert reasons(path) == [(4, "the JSON list breaks off here")]
    assert len(entries(path)) == 3
    path.write_text('[\n{"a": 1},\n{"a": 2}\n')
    assert reasons(path) == [(4, "the JSON list is not closed")]
    path.write_text('[\n{"a": 1},\n{"a": oops},\n{"a": 3}]')
    assert reasons(path) == [(3, "the JSON list breaks off here")]


def test_bad_text_in_other_files(tmp_path):
    """C40: bad UTF-8 in CSV and Parquet, too many cells in a CSV row."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"chosen\n\xff\n")
    with pytest.raises(UnusableRowError, match="'chosen' is not valid Unicode"):
        DialogueParser("finetune")(values(path)[0])
    path.write_text("chosen\na,b\nc\n")
    assert reasons(path) == [(2, "more cells than the header has columns")]
    array = pyarrow.Array.from_buffers(
        pyarrow.utf8(), 2, [None, pyarrow.array([0, 1, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xffa")]
    )
    path = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"chosen": array}), path)
    assert reasons(path) == [(1, "a text is not valid UTF-8")]
    assert decode(entries(path)[1]) == {"chosen": "a"}
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"b\.parquet: no readable Parquet file"):
        entries(path)


def test_a_folder_of_files_named_for_their_splits(tmp_path):
    """train…, valid…, test… in any spelling, in folders too; several files make one split."""
    for name in ("train-00000.jsonl", "train-00001.jsonl.gz", "valid.csv", "test/0.json", ".hidden.jsonl", "note.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = {"valid.csv": b"prompt\nv\n", "test/0.json": b'["t"]'}.get(name, json.dumps(name).encode())
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    sources = choose_splits(open_sources(str(tmp_path), ""), AUTO)
    found = {
        name: [decode(entry) for chunk in source.chunks() for entry in chunk.entries]
        for name, source in sources.items()
    }
    assert found == {
        "train": ["train-00000.jsonl", "train-00001.jsonl.gz"],
        "validation": [{"prompt": "v"}],
        "test": ["t"],
    }
    assert set(choose_splits(open_sources(str(tmp_path), ""), AUTO | {"test": "none"})) == {"train", "validation"}


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    """DESIGN.md §11: a path, a file, a split and a data set of the hub, each named with what would be right."""
    with pytest.raises(UserError, match=r"--dataset_path .*nowhere: no such file"):
        open_sources(str(tmp_path / "nowhere"), "")
    with pytest.raises(UserError, match=r"no \.json, \.jsonl"):
        open_sources(str(tmp_path), "")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt is none of \.json"):
        open_sources(str(tmp_path / "a.txt"), "")
    (tmp_path / "train.jsonl").write_text("1\n")
    (tmp_path / "other.jsonl").write_text("1\n")
    with pytest.raises(UserError, match=r"other\.jsonl stands beside files named for their split"):
        open_sources(str(tmp_path), "")
    (tmp_path / "other.jsonl").unlink()
    with pytest.raises(UserError, match=r"--test_split=held_out: the data set has no such split; it has train"):
        choose_splits(open_sources(str(tmp_path), ""), AUTO | {"test": "held_out"})

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"'a/b' can't be fetched .*--dataset_path"):
        open_sources(None, "a/b")


def test_a_data_set_of_the_hub(monkeypatch):
    """Its own splits, by their usual or by given names; rows as dicts, numbered from 1."""
    called = {}

    def load_dataset(name, data_dir=None):
        called.update(name=name, data_dir=data_dir)
        splits = {"train": ROWS, "valid1": ROWS[:3], "test": ROWS[:2]}
        return datasets.DatasetDict({key: datasets.Dataset.from_list(rows) for key, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = open_sources(None, "a/b", "harmless-base")
    assert called == {"name": "a/b", "data_dir": "harmless-base"}
    assert set(choose_splits(sources, AUTO)) == {"train", "test"}
    chosen = choose_splits(sources, AUTO | {"validation": "valid1"})
    assert chosen["validation"].total == 3
    chunks = list(chosen["train"].chunks())
    assert [decode(entry) for chunk in chunks for entry in chunk.entries] == ROWS
    assert [entry.line for chunk in chunks for entry in chunk.entries] == list(range(1, len(ROWS) + 1))
    assert sum(chunk.progress for chunk in chunks) == chosen["train"].total == len(ROWS)
