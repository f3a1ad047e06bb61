"""A large split costs what is asked of it, not what it holds; and the benchmarks that measure it run."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from experiments.benchmarks import data_scale, data_speed
from rlhf.data.encode import Encoded
from rlhf.data.packed import PackedRows, pack
from rlhf.data.splits import load_split, write_split
from rlhf.data.spool import Spool
from rlhf.trees.batches import cut, largest_micro_batch, num_steps, rows_of_step
from tests.tiny_tokenizers import make_tokenizer

NUM_ROWS = 100_000


@contextmanager
def traced() -> Iterator[list[int]]:
    """Bytes of Python objects and NumPy arrays: at the end those left, and the most at a time."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found += tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs of one prompt token and one response token each."""
    ids = np.arange(2 * NUM_ROWS, dtype=np.int32)
    flat = {"chosen_input_ids": ids, "rejected_input_ids": ids}
    offsets = dict.fromkeys(flat, np.arange(0, 2 * NUM_ROWS + 1, 2))
    path = tmp_path_factory.mktemp("data")
    rows = PackedRows("preference", flat, offsets, {"prompt_len": np.ones(NUM_ROWS, np.int64)})
    write_split(path, "preference", "train", rows)
    return path


def test_opening_holds_nothing_for_each_row(folder):
    """What stays is under a byte a row; on the way three arrays of 8 bytes a row are compared."""
    with traced() as found:
        split = load_split(folder, "preference", "train")
    left, most = found
    assert left < NUM_ROWS
    assert most < 32 * NUM_ROWS
    assert split[NUM_ROWS - 1]["chosen_input_ids"].tolist() == [2 * NUM_ROWS - 2, 2 * NUM_ROWS - 1]


def test_planning_an_epoch_makes_no_list_of_all_rows():
    """Python objects of steps, cuts and the largest micro-batch are those of some rows, whatever the split holds."""
    tokens = torch.arange(NUM_ROWS) % 97 + 1
    order = {"seed": 0, "shuffle": True}
    with traced() as found:
        total = num_steps(NUM_ROWS, 8, 1.0)
        for budget in (None, 200):
            largest_micro_batch(
                tokens, total_steps=total, mini_batch=8, world_size=1, micro_batch_size=4, micro_batch_tokens=budget,
                **order,
            )  # fmt: skip
        for step in (0, 1, total - 1):
            cut(rows_of_step(step, NUM_ROWS, 8, **order), micro_batch_size=4, micro_batch_tokens=200, tokens=tokens)
    assert found[1] < NUM_ROWS


def encoded(rows: PackedRows) -> Encoded:
    count = np.arange(len(rows))
    return Encoded(rows, count, count.astype("u8"), count.astype("u1"), {}, [], {}, {}, (0, 0), None, "", 0, 0, 0)


def test_the_spool_gives_back_any_rows_in_any_order(tmp_path):
    """Tokens and texts, empty ones among them, from two chunks; a row twice is there twice."""
    rows = [{"input_ids": range(n, 2 * n + 1), "reference": "é" * n, "prompt_len": n + 1} for n in range(7)]
    spool = Spool(tmp_path, "prompts", "train")
    for part in (rows[:4], rows[4:]):
        spool.add(encoded(pack("prompts", part)))
    found = spool.finish().rows
    index = np.array([6, 0, 3, 3, 5])
    (block,) = found.blocks(index)
    wanted = [{**rows[i], "input_ids": list(rows[i]["input_ids"])} for i in index]
    assert [{**block.row(i), "input_ids": block.row(i)["input_ids"].tolist()} for i in range(5)] == wanted
    assert {name: values.tolist() for name, values in found.lengths(index).items()} == {
        "input_ids": [7, 1, 4, 4, 6],
        "reference": [12, 0, 6, 6, 10],
    }
    assert list(found.blocks(index[:0])) == []
    (tmp_path / "train.input_ids").write_bytes(b"\0" * 8)
    with pytest.raises(EOFError, match=r"train\.input_ids"):
        list(found.blocks(index))


def test_the_scale_benchmark(tmp_path):
    """In this process: the pairs share their prompts, have the announced lengths, and every stage is noted."""
    flags = data_scale.ScaleFlags(num_pairs=300, num_steps=5, micro_batch_tokens=600)
    made = data_scale.make(tmp_path, flags.num_pairs, flags.seed)
    assert made["pt_gb"] > made["twin_gb"] > 0
    lengths = data_scale.lengths_of_pairs(300, 0)
    split = load_split(tmp_path, "preference", "train")
    assert split.prompt_lens.tolist() == lengths["prompt"].tolist()
    assert (split.lengths("rejected_input_ids") - split.prompt_lens).tolist() == lengths["rejected"].tolist()
    for row in split:
        assert row["chosen_input_ids"][: row["prompt_len"]].equal(row["rejected_input_ids"][: row["prompt_len"]])
    for name, mean in data_scale.MEANS.items():
        assert data_scale.lengths_of_pairs(20_000, 1)[name].mean() == pytest.approx(mean, rel=0.08)
    stages = data_scale.train(flags, tmp_path, threading.Barrier(1))
    assert [found["stage"].split(" (")[0] for found in stages] == [
        "open", "fit the model", "plan", "first micro-batch", "a step's rows", "a micro-batch",
        "cut the rest of the epoch",
    ]  # fmt: skip
    assert "open" in data_scale.table(stages)


def test_the_speed_benchmark_gives_both_sides_the_same_strings(tmp_path):
    """Every string of the bare side is a prompt or response of the file that `prepare_data.py` reads."""
    make_tokenizer(bos=False, pad_is_eos=False).save_pretrained(tmp_path / "tokenizer")
    flags = data_speed.SpeedFlags(tokenizer_name=str(tmp_path / "tokenizer"), num_rows=40)
    data_speed.write_text(flags, tmp_path)
    strings = json.loads((tmp_path / "strings.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert [row["chosen"] for row in rows] == [a + b for a, b in zip(strings[::3], strings[1::3], strict=True)]
    assert [row["rejected"] for row in rows] == [a + b for a, b in zip(strings[::3], strings[2::3], strict=True)]
    request = {"folder": str(tmp_path), "tokenizer_name": flags.tokenizer_name, "num_workers": 1}
    tokenizer = make_tokenizer(bos=False, pad_is_eos=False)
    assert data_speed.bare(request)["tokens"] == sum(
        len(ids) for ids in tokenizer(strings, add_special_tokens=False)["input_ids"]
    )
    assert 0 < data_speed.prepared(request)["kept"] <= 40
