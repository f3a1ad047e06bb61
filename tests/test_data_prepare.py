"""Whole data preparations: files, splits, seeds, processes, and what happens when something is wrong."""

from __future__ import annotations

import collections
import dataclasses
import gc
import json
import os
import pickle
import re
import sys
import tracemalloc

import datasets
import pytest
import torch

from data_prep.arithmetic import prepare_data as arithmetic
from data_prep.custom import prepare_data as custom
from data_prep.helpful_harmless import prepare_data as dialogues
from data_prep.summarization import prepare_data as summaries
from rlhf.data import packed, prepare, sources
from rlhf.data.custom import CustomParser
from rlhf.data.encode import Limits, RowEncoder
from rlhf.data.packed import SCHEMAS, SPLIT_NAMES
from rlhf.data.rows import UnusableRowError
from rlhf.data.sources import Chunk, Entry
from rlhf.data.splits import data_info, load_split
from rlhf.data.text import encode_pair, encode_prompt, load_tokenizer, tokenizer_fingerprint
from rlhf.errors import UserError
from rlhf.files import WriteError
from rlhf.flags import launch, parse
from tests.data_makers import all_rows, dialogue_rows, files, prompts_of, run, save_tokenizers, write_rows
from tests.tiny_tokenizers import EOS


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return save_tokenizers(tmp_path_factory)


@pytest.mark.parametrize(
    "command",
    [
        "--max_length=256 --max_prompt_length=128 --remove_same_inputs=True --remove_same_responses=True "
        "--shuffle=True --validation_percentage=0.1 --stage=finetune",
        "--max-length=384 --max-prompt-length=256 --remove_same_inputs=False --remove_same_responses=True "
        "--shuffle=True --validation_percentage=0.1 --stage=preference",
    ],
)
def test_the_command_lines_of_the_field_work(tmp_path, tokenizers, monkeypatch, command):
    """C29: the names that users already type, in both spellings."""
    source = write_rows(tmp_path / "rows.jsonl", dialogue_rows(60))
    where = [
        f"--destination_dir={tmp_path / 'a/b'}",
        f"--tokenizer_name={tokenizers[True]}",
        f"--dataset_path={source}",
    ]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *where, *command.split()])
    launch(dialogues.main, dialogues.PrepareFlags)
    stage = command.rpartition("=")[2]
    assert sorted(os.listdir(tmp_path / "a/b")) == files(stage)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *where, "--max_length=10", "--max_prompt_length=10"])
    with pytest.raises(SystemExit) as caught:
        launch(dialogues.main, dialogues.PrepareFlags)
    assert caught.value.code == 2


@pytest.mark.parametrize("module", [arithmetic, dialogues, summaries, custom])
def test_every_flag_has_its_help(module, capsys):
    """C29, C21: each flag is explained."""
    with pytest.raises(SystemExit) as caught:
        parse(module.PrepareFlags, ["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(module.PrepareFlags):
        assert re.search(rf"--{field.name} [A-Z][a-z]+ ", shown), field.name


@pytest.mark.parametrize("module", [dialogues, summaries])
@pytest.mark.parametrize("stage", ["finetune", "preference"])
def test_the_shipped_samples(tmp_path, tokenizers, module, stage):
    """--dataset_path=sample is the file beside the script, in the schema of the hub; every row of it is usable."""
    limits = {"max_length": 3000, "max_prompt_length": 2000}
    folder, entry = run(module, tmp_path, tokenizers, dataset_path="sample", stage=stage, limit=80, **limits)
    assert sum(split["kept"] for split in entry["counts"].values()) == 80
    assert sorted(os.listdir(folder)) == files(stage)


def test_what_goes_to_another_process_survives_the_way(tokenizers):
    """C22: where processes are not forked, the encoder, the rows and the result are sent."""
    tokenizer = load_tokenizer(tokenizers[True])
    broken = UnusableRowError("cut", "mend it")
    chunk = Chunk("a.jsonl", (Entry(1, "Hi"), Entry(2, b'"Ho"'), Entry(3, broken), Entry(4, {"messages": []})), 9)
    encoder = RowEncoder("prompts", tokenizer, CustomParser("prompts", tokenizer), Limits(50, 40, None, False), 0)
    here = encoder(chunk, 0)
    there = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(encoder))(pickle.loads(pickle.dumps(chunk)), 0)))
    assert there.skipped == here.skipped
    assert [row["reason"] for row in there.skipped] == ["cut", "'messages' is no list of messages"]
    assert there.rows.hashes().tolist() == here.rows.hashes().tolist()
    assert len(there.rows) == 2


def test_all_stages_in_one_folder(tmp_path, tokenizers):
    """DESIGN.md §3: the exact set of files, rows as the schema says, and args.json with an entry for each stage."""
    rows = dialogue_rows(80)
    stages = list(SCHEMAS)
    for number, stage in enumerate(stages, start=1):
        folder, entry = run(dialogues, tmp_path, tokenizers, rows, stage=stage, name="all")
        assert sorted(os.listdir(folder)) == files(*stages[:number])
        assert data_info(folder)["stages"][stage] == json.loads(json.dumps(entry))
    info = data_info(folder)["stages"]
    assert set(info) == set(stages)
    tokenizer = load_tokenizer(tokenizers[True])
    by_prompt = {}
    for row in rows:
        head, found, chosen = row["chosen"].rpartition("\n\nAssistant:")
        by_prompt[head + found] = (chosen, row["rejected"].rpartition("\n\nAssistant:")[2])
    for stage in stages:
        assert info[stage]["arguments"]["stage"] == stage
        assert info[stage]["tokenizer"] == {
            "name": str(tokenizers[True]),
            "fingerprint": tokenizer_fingerprint(tokenizer),
        }
        counts = info[stage]["counts"]
        assert sum(split["kept"] for split in counts.values()) == (160 if stage == "feedback" else 80)
        for name in SPLIT_NAMES:
            loaded = torch.load(folder / f"{stage}_{name}.pt", weights_only=True)
            assert len(loaded) == counts[name]["kept"] > 0
            assert set(loaded[0]) == SCHEMAS[stage].keys
    for row in all_rows(folder, "preference"):
        prompt = tokenizer.decode(row["chosen_input_ids"][: row["prompt_len"]], skip_special_tokens=True)
        chosen, rejected = (encode_pair(tokenizer, prompt, response) for response in by_prompt[prompt])
        assert row["chosen_input_ids"].tolist() == chosen[0] + chosen[1]
        assert row["rejected_input_ids"].tolist() == rejected[0] + rejected[1]
        assert row["prompt_len"] == len(chosen[0])
    for row in all_rows(folder, "prompts"):
        prompt = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert row["input_ids"].tolist() == encode_prompt(tokenizer, prompt)
        assert row["prompt_len"] == len(row["input_ids"])
        assert row["reference"] == by_prompt[prompt][0]
    labelled = collections.defaultdict(set)
    for row in all_rows(folder, "feedback"):
        prompt = tokenizer.decode(row["input_ids"][: row["prompt_len"]], skip_special_tokens=True)
        labelled[prompt].add((tokenizer.decode(row["input_ids"][row["prompt_len"] : -1]), row["label"]))
    assert labelled == {p: {(chosen, True), (rejected, False)} for p, (chosen, rejected) in by_prompt.items()}


def test_a_prompt_is_in_one_split_only_and_in_the_same_for_every_stage(tmp_path, tokenizers):
    """No leakage: duplicates of a prompt stay together, whatever the stage and its order; the seed decides."""
    rows = dialogue_rows(300, num_prompts=100)
    folder, _ = run(dialogues, tmp_path, tokenizers, rows, stage="preference")
    pairs = prompts_of(folder, "preference")
    assert not pairs["train"] & (pairs["validation"] | pairs["test"])
    assert not pairs["validation"] & pairs["test"]
    assert sum(map(len, pairs.values())) == 100
    assert 3 <= len(pairs["validation"]) <= 20
    assert 3 <= len(pairs["test"]) <= 20
    run(dialogues, tmp_path, tokenizers, rows[::-1], stage="finetune", shuffle=False, remove_same_inputs=True)
    assert prompts_of(folder, "finetune") == pairs
    other, _ = run(dialogues, tmp_path, tokenizers, rows, name="other", stage="preference", seed=7)
    assert prompts_of(other, "preference") != pairs


def test_shuffling_is_seeded_and_file_order_is_kept_without(tmp_path, tokenizers):
    """C27: --shuffle=False gives file order; the same seed the same files, bit for bit."""
    rows = dialogue_rows(60)
    share = {"validation_percentage": 0.0, "test_percentage": 0.0}
    tokenizer = load_tokenizer(tokenizers[True])

    def order(folder):
        return [
            tokenizer.decode(row["input_ids"]).removesuffix(EOS).split()[-1] for row in all_rows(folder, "finetune")
        ]

    plain, _ = run(dialogues, tmp_path, tokenizers, rows, name="plain", shuffle=False, **share)
    in_file = [f"{i}." for i in range(60)]
    assert order(plain) == in_file
    first, _ = run(dialogues, tmp_path, tokenizers, rows, name="first", **share)
    second, _ = run(dialogues, tmp_path, tokenizers, rows, name="second", **share)
    third, _ = run(dialogues, tmp_path, tokenizers, rows, name="third", seed=1, **share)
    assert sorted(order(first)) == sorted(in_file)
    assert order(first) not in (in_file, order(third))
    assert (first / "finetune_train.pt").read_bytes() == (second / "finetune_train.pt").read_bytes()
    assert sorted(os.listdir(plain)) == files("finetune", splits=["train"])


@pytest.mark.parametrize("stage", ["preference", "prompts"])
def test_one_process_and_two_give_the_same_files(tmp_path, tokenizers, stage):
    """C22, C27: the number of processes changes nothing but the time."""
    rows = dialogue_rows(1500, num_prompts=1400)
    rows[5] = {"chosen": 1}
    rows[1200]["rejected"] = rows[1200]["chosen"]
    results = []
    for num_workers in (1, 2):
        folder, entry = run(dialogues, tmp_path, tokenizers, rows, stage=stage, num_workers=num_workers)
        entry["arguments"].pop("num_workers")
        content = {name: (folder / name).read_bytes() for name in os.listdir(folder) if name != "args.json"}
        content = {name: value for name, value in content.items() if not name.endswith(".safetensors")}
        results.append((entry, content))
    assert results[0] == results[1]


def test_broken_rows_are_reported_with_their_place(tmp_path, tokenizers, capsys):
    """C40: file:line, reason and fix of each, in a file and on the screen; up to the given part of the rows."""
    rows = [*dialogue_rows(60), {"chosen": 5}, {"chosen": ""}, [1]]
    folder, entry = run(dialogues, tmp_path, tokenizers, rows)
    source = str(tmp_path / "source" / "data.jsonl")
    skipped = [json.loads(line) for line in (folder / "skipped_finetune.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in skipped] == [
        (source, 61, "'chosen' is a number, not a text"),
        (source, 62, "'chosen' is empty"),
        (source, 63, "the row is a list, not an object"),
    ]
    assert all(row["fix"] for row in skipped)
    assert entry["bad_rows"] == 3
    assert f"{source}:61: 'chosen' is a number" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"3 of the first 63 rows are broken.*max_bad_fraction=0\.01.*data\.jsonl:61"):
        run(dialogues, tmp_path, tokenizers, rows, max_bad_fraction=0.01)
    with pytest.raises(
        UserError, match=r"data\.jsonl:61: 'chosen' is a number, not a text; put it in quotes.*--on_bad_row=skip"
    ):
        run(dialogues, tmp_path, tokenizers, rows, on_bad_row="error")
    run(dialogues, tmp_path, tokenizers, rows[:60])
    assert sorted(os.listdir(folder)) == files("finetune")


def test_a_file_without_a_usable_row_is_an_error(tmp_path, tokenizers):
    """DESIGN.md §11: with the most common reasons, and the first broken row."""
    rows = [{"chosen": "\n\nHuman: a\n\nAssistant:"}] * 5
    with pytest.raises(UserError, match=r"5 of the first 5 rows are broken.*data\.jsonl:1: the response"):
        run(dialogues, tmp_path, tokenizers, rows)
    with pytest.raises(UserError, match=r"none of the 5 rows is left .*5 x the response.*data\.jsonl:1"):
        run(dialogues, tmp_path, tokenizers, rows, max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"none of the 9 rows is left to train on .*9 x prompt over"):
        run(dialogues, tmp_path, tokenizers, dialogue_rows(9), max_prompt_length=3)
    with pytest.raises(UserError, match="holds no rows"):
        run(dialogues, tmp_path, tokenizers, [])
    write_rows(tmp_path / "source" / "train" / "a.jsonl", dialogue_rows(50))
    write_rows(tmp_path / "source" / "train" / "b.jsonl", rows[:2])
    with pytest.raises(UserError, match=r"none of the 2 rows of .*b\.jsonl can be used"):
        run(dialogues, tmp_path, tokenizers, dataset_path=str(tmp_path / "source" / "train"))
    assert sorted(os.listdir(tmp_path)) == ["source"]


@pytest.mark.parametrize("failing", ["write_pt", "write_json", "stamp_twin", "select", "put_in"])
def test_a_run_that_fails_leaves_nothing_behind(tmp_path, tokenizers, monkeypatch, failing):
    """DESIGN.md §11: never a half-written folder, wherever it fails; what was there stays as it was."""
    run(dialogues, tmp_path, tokenizers, dialogue_rows(30), stage="prompts")
    before = {name: (tmp_path / "data" / name).read_bytes() for name in os.listdir(tmp_path / "data")}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, failing, fail)
    for name in ("data", "new"):
        with pytest.raises(WriteError, match="No space"):
            run(dialogues, tmp_path, tokenizers, dialogue_rows(30), name=name)
    assert {name: (tmp_path / "data" / name).read_bytes() for name in os.listdir(tmp_path / "data")} == before
    assert sorted(os.listdir(tmp_path)) == ["data", "source"]


def test_splits_of_an_earlier_run_do_not_stay(tmp_path, tokenizers):
    """No leakage: the validation split of an earlier run must not outlive a run without one."""
    run(dialogues, tmp_path, tokenizers, dialogue_rows(30))
    folder, _ = run(dialogues, tmp_path, tokenizers, dialogue_rows(30), validation_percentage=0.0, test_percentage=0.0)
    assert sorted(os.listdir(folder)) == files("finetune", splits=["train"])


def test_small_data_still_has_each_split(tmp_path, tokenizers):
    """A share that rounds to nothing still holds out one prompt."""
    folder, _ = run(dialogues, tmp_path, tokenizers, dialogue_rows(5), stage="prompts")
    assert sorted(os.listdir(folder)) == files("prompts")


def test_own_test_split_of_the_hub_is_kept_apart(tmp_path, tokenizers, monkeypatch):
    """No leakage: the hub's test split is the test split, and its prompts leave the training rows."""
    rows, test = dialogue_rows(60), dialogue_rows(20)[10:] + dialogue_rows(5, seed=3)
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(test)}
    seen = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, data_dir=None: seen.append(name) or datasets.DatasetDict(splits)
    )
    folder, entry = run(dialogues, tmp_path, tokenizers, stage="preference")
    assert seen == ["Anthropic/hh-rlhf"]
    assert entry["counts"]["test"]["kept"] == 15
    leaks = [split["dropped"].get("prompt is in the test split", 0) for split in entry["counts"].values()]
    assert sum(leaks) == 10
    assert not set.intersection(*(prompts_of(folder, "preference")[name] for name in ("train", "test")))
    assert entry["counts"]["train"]["kept"] + entry["counts"]["validation"]["kept"] == 50
    for stage, name in summaries.HUB_NAMES.items():
        with pytest.raises(UserError):  # these rows are no summaries
            run(summaries, tmp_path, tokenizers, stage=stage)
        assert seen[-1] == name


def test_the_example_prompt_is_one_of_the_test_split(tmp_path, tokenizers):
    """DESIGN.md §3: text, ids and mask, 1 x T."""
    folder, _ = run(dialogues, tmp_path, tokenizers, dialogue_rows(60), stage="prompts")
    example = torch.load(folder / "example_prompt.pt", weights_only=True)
    assert set(example) == {"prompt", "input_ids", "attention_mask"}
    assert example["input_ids"].shape == example["attention_mask"].shape
    assert example["attention_mask"].all()
    tokenizer = load_tokenizer(tokenizers[True])
    assert example["input_ids"].tolist() == [encode_prompt(tokenizer, example["prompt"])]
    assert example["input_ids"][0].tolist() in [
        row["input_ids"].tolist() for row in load_split(folder, "prompts", "test")
    ]


def test_wrong_flags_are_named(tmp_path, tokenizers):
    """DESIGN.md §11: the flag, its value, and what would be right; nothing is written."""
    rows = dialogue_rows(5)
    source = write_rows(tmp_path / "source" / "data.jsonl", rows)
    for flags, message in [
        ({"validation_percentage": 10}, r"--validation_percentage=10 must be in \[0, 1\]"),
        ({"validation_percentage": 0.6, "test_percentage": 0.4}, "leave nothing to train on"),
        ({"max_length": 0}, "--max_length=0 must be above 0"),
        ({"max_length": 100, "max_prompt_length": 100}, "leaves no room for a response"),
        ({"num_workers": -1}, "--num_workers=-1"),
        ({"tokenizer_name": str(tmp_path / "none")}, "no such folder"),
        ({"dataset_path": str(tmp_path / "none.jsonl")}, "--dataset_path .* no such file"),
        ({"destination_dir": str(tmp_path / "source" / "data.jsonl")}, "is a file; give a folder"),
        ({"test_split": "held_out"}, "--test_split=held_out"),
    ]:
        with pytest.raises(UserError, match=message):
            run(dialogues, tmp_path, tokenizers, **{"dataset_path": source, **flags})
    with pytest.raises(UserError, match="no data given"):
        run(custom, tmp_path, tokenizers)
    with pytest.raises(UserError, match="comes with no sample"):
        run(custom, tmp_path, tokenizers, dataset_path="sample")
    with pytest.raises(UserError, match="has no place for the text"):
        run(custom, tmp_path, tokenizers, rows, prompt_template="Q:")
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_the_histogram_is_a_picture(tmp_path, tokenizers):
    """The lengths are also saved as numbers."""
    folder, entry = run(dialogues, tmp_path, tokenizers, dialogue_rows(40), stage="preference", max_prompt_length=40)
    assert (folder / "lengths_preference.png").read_bytes().startswith(b"\x89PNG")
    rows = all_rows(folder, "preference")
    assert set(entry["lengths"]) == {"prompt", "response"}
    assert entry["lengths"]["prompt"]["max"] >= max(row["prompt_len"] for row in rows)
    assert (
        entry["lengths"]["response"]["p50"]
        <= entry["lengths"]["response"]["p95"]
        <= entry["lengths"]["response"]["max"]
    )


def test_memory_does_not_grow_with_the_rows(tmp_path, tokenizers, monkeypatch):
    """C22: twice the rows, and the peak grows by less than a fifth of what the new tokens take on disk."""
    monkeypatch.setattr(sources, "CHUNK_ROWS", 32)
    monkeypatch.setattr(packed, "BLOCK_ROWS", 32)
    peaks, sizes = [], []
    gc.collect()
    gc.freeze()  # else the collector's pace, and with it the peak, depends on the tests that ran before
    for num_rows in (20, 250, 500):  # the first one for what is imported and cached once
        path = write_rows(
            tmp_path / f"{num_rows}.jsonl",
            ({"prompt": f"{i}" + " one" * 60, "completion": " six" * 30} for i in range(num_rows)),
        )
        tracemalloc.start()
        folder, _ = run(custom, tmp_path, tokenizers, dataset_path=path, num_workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append((folder / "finetune_train.pt").stat().st_size)
    gc.unfreeze()
    assert peaks[2] - peaks[1] < 0.2 * (sizes[2] - sizes[1])
