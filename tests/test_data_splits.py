"""Splits on disk: the exchange files, their packed twins, and what may go wrong with either."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rlhf.data import exchange, splits
from rlhf.data.packed import pack
from rlhf.data.splits import (
    IGNORE_INDEX,
    STAGES,
    check_tokenizer,
    data_info,
    has_split,
    load_split,
    write_split,
)
from rlhf.data.text import template_fingerprint, tokenizer_fingerprint
from rlhf.data.twin import file_hash
from rlhf.errors import UserError
from tests.tiny_tokenizers import make_tokenizer


def rows_of(stage: str, num_rows: int = 40, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, 70_000, (length,), generator=generator)

    rows = []
    for i in range(num_rows):
        prompt = ids(1, 300)
        row = {"prompt_len": len(prompt)}
        if stage == "finetune":
            row["input_ids"] = torch.cat([prompt, ids(2, 90)])
            row["targets"] = row["input_ids"].clone()
            row["targets"][: len(prompt)] = IGNORE_INDEX
            row["targets"][len(prompt) + 1 : len(prompt) + 1 + i % 2] = IGNORE_INDEX
        elif stage == "preference":
            row["chosen_input_ids"] = torch.cat([prompt, ids(1, 90)])
            row["rejected_input_ids"] = torch.cat([prompt, ids(1, 90)])
        elif stage == "feedback":
            row |= {"input_ids": torch.cat([prompt, ids(1, 90)]), "label": i % 3 == 0}
        else:
            row |= {"input_ids": prompt, "reference": "Paris, ça va 🙂"[: i % 15]}
        rows.append(row)
    return rows


def assert_same_rows(found, expected) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert set(a) == set(b)
        for key, value in b.items():
            assert type(a[key]) is type(value)
            if isinstance(value, torch.Tensor):
                assert a[key].dtype == torch.int64
                assert torch.equal(a[key], value)
            else:
                assert a[key] == value


@pytest.mark.parametrize("stage", STAGES)
def test_pt_is_a_plain_list_of_dicts_and_the_split_reads_the_same(tmp_path, stage):
    """DESIGN.md §3: torch alone reads the `.pt`, with weights_only; the twin gives the same rows."""
    rows = rows_of(stage, 1100)
    path = write_split(tmp_path, stage, "train", rows)
    assert_same_rows(torch.load(path, weights_only=True), rows)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert_same_rows(mapped, rows)
    tensor = next(value for value in mapped[0].values() if isinstance(value, torch.Tensor))
    assert tensor.untyped_storage().data_ptr() % 64 == 0
    split = load_split(tmp_path, stage, "train")
    assert_same_rows(list(split), rows)
    assert_same_rows([split[-1]], rows[-1:])
    assert split.prompt_lens.tolist() == [row["prompt_len"] for row in rows]
    column = next(key for key in rows[0] if key.endswith("input_ids"))
    assert split.lengths(column).tolist() == [len(row[column]) for row in rows]
    with pytest.raises(IndexError):
        split[len(rows)]
    assert sorted(os.listdir(tmp_path)) == [f"{stage}_train.pt", f"{stage}_train.safetensors"]
    assert write_split(tmp_path / "again", stage, "train", rows).read_bytes() == path.read_bytes()
    assert_same_rows(list(pickle.loads(pickle.dumps(split))), rows)


def test_the_twin_is_a_safetensors_file(tmp_path):
    """Anyone's safetensors reads the twin: flat ids and offsets."""
    rows = rows_of("preference")
    path = write_split(tmp_path, "preference", "test", rows)
    with safe_open(path.with_suffix(".safetensors"), "pt") as file:
        offsets = file.get_tensor("chosen_input_ids.offsets")
        flat = file.get_tensor("chosen_input_ids")
    for i, row in enumerate(rows):
        assert torch.equal(flat[offsets[i] : offsets[i + 1]].long(), row["chosen_input_ids"])


def test_a_user_made_pt_gets_a_twin(tmp_path):
    """A missing twin is built from a file that torch.save wrote, with the fingerprint of equal rows."""
    rows = rows_of("finetune")
    write_split(tmp_path / "a", "finetune", "train", rows)
    (tmp_path / "b").mkdir()
    torch.save(rows, tmp_path / "b" / "finetune_train.pt")
    split = load_split(tmp_path / "b", "finetune", "train")
    assert_same_rows(list(split), rows)
    assert split.fingerprint == load_split(tmp_path / "a", "finetune", "train").fingerprint
    assert split.tokenizer is None
    assert (tmp_path / "b" / "finetune_train.safetensors").exists()
    old = tmp_path / "b" / "finetune_test.pt"
    torch.save(rows, old, _use_new_zipfile_serialization=False)
    assert_same_rows(list(load_split(tmp_path / "b", "finetune", "test")), rows)


def test_a_stale_twin_is_rebuilt(tmp_path):
    """C16: a `.pt` that changed since, also one of the same size."""
    rows = rows_of("feedback")
    path = write_split(tmp_path, "feedback", "train", rows)
    first = load_split(tmp_path, "feedback", "train").fingerprint
    torch.save(rows[:-1], path)
    assert len(load_split(tmp_path, "feedback", "train")) == len(rows) - 1

    changed = [dict(row) for row in rows]
    changed[7]["input_ids"] = changed[7]["input_ids"].flip(0)
    write_split(tmp_path, "feedback", "train", rows)
    size = path.stat().st_size
    exchange.write_pt(path, pack("feedback", changed))
    assert path.stat().st_size == size
    split = load_split(tmp_path, "feedback", "train")
    assert_same_rows(list(split), changed)
    assert split.fingerprint != first


def test_a_copy_keeps_its_twin(tmp_path, monkeypatch):
    """C16: copies lose the dates; the twin is recognised by the content of its `.pt`, once, and not rebuilt."""
    rows = rows_of("prompts")
    write_split(tmp_path / "a", "prompts", "train", rows)
    (tmp_path / "b").mkdir()
    for number, name in enumerate(sorted(os.listdir(tmp_path / "a"))):
        shutil.copyfile(tmp_path / "a" / name, tmp_path / "b" / name)
        os.utime(tmp_path / "b" / name, (1_000_000 + number, 1_000_000 + number))
    inode = (tmp_path / "b" / "prompts_train.safetensors").stat().st_ino
    hashed = []
    monkeypatch.setattr(splits, "file_hash", lambda path: hashed.append(path) or file_hash(path))
    for _ in range(2):
        assert_same_rows(list(load_split(tmp_path / "b", "prompts", "train")), rows)
    assert len(hashed) == 1
    assert (tmp_path / "b" / "prompts_train.safetensors").stat().st_ino == inode


@pytest.mark.parametrize("place", ["length", "header", "index", "tokens", "cut", "empty", "longer"])
def test_a_damaged_twin_is_found_by_checksum_and_rebuilt(tmp_path, place):
    """C16: one flipped bit anywhere, or a cut; the rows read are the right ones, and so is the file afterwards."""
    rows = rows_of("preference")
    path = write_split(tmp_path, "preference", "train", rows)
    twin = path.with_suffix(".safetensors")
    whole = twin.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    layout = json.loads(whole[8 : 8 + length])
    position = {
        "length": 1,
        "header": 8 + whole[8:].index(b'"fingerprint":"') + 20,
        "index": 8 + length + layout["prompt_len"]["data_offsets"][0],
        "tokens": 8 + length + layout["rejected_input_ids"]["data_offsets"][1] - 3,
    }.get(place, 0)
    damaged = bytearray(whole)
    damaged[position] ^= 1
    damaged = {"cut": whole[:-100], "empty": b"", "longer": whole + b"x"}.get(place, bytes(damaged))
    stat = twin.stat()
    twin.write_bytes(damaged)
    os.utime(twin, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    split = load_split(tmp_path, "preference", "train")
    assert_same_rows(list(split), rows)
    assert twin.read_bytes() == whole


def test_damage_under_an_open_split_is_found(tmp_path):
    """C16: rows are verified as they are read, so a file that rots during training is caught too."""
    rows = rows_of("feedback")
    path = write_split(tmp_path, "feedback", "train", rows)
    split = load_split(tmp_path, "feedback", "train")
    with open(path.with_suffix(".safetensors"), "r+b") as file:
        file.seek(-8 * len(rows) - 400, os.SEEK_END)
        file.write(b"\xff\x00\xff\x00")
    assert_same_rows(list(split), rows)


def _load(folder, results):
    split = load_split(folder, "preference", "train")
    results.put((split.fingerprint, sum(len(row["chosen_input_ids"]) for row in split)))


def test_several_processes_may_build_the_same_twin(tmp_path):
    """C17: all ranks of a node open a split without a twin at once; all read the same, nothing is left over."""
    rows = rows_of("preference", 300)
    torch.save(rows, tmp_path / "preference_train.pt")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_load, args=(tmp_path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert {process.exitcode for process in processes} == {0}
    tokens = sum(len(row["chosen_input_ids"]) for row in rows)
    assert found == {(load_split(tmp_path, "preference", "train").fingerprint, tokens)}
    assert sorted(os.listdir(tmp_path)) == ["preference_train.pt", "preference_train.safetensors"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """A read-only folder of `.pt` files is read all the same; nothing is left in it."""
    rows = rows_of("finetune")
    torch.save(rows, tmp_path / "finetune_train.pt")

    def refuse(path):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(splits, "atomic_write", refuse)
    assert_same_rows(list(load_split(tmp_path, "finetune", "train")), rows)
    assert os.listdir(tmp_path) == ["finetune_train.pt"]


def test_row_hashes_follow_the_content(tmp_path):
    """C16, C19: equal rows have equal hashes in any file and place; any change of a row changes its hash alone."""
    rows = rows_of("feedback", 20)
    write_split(tmp_path, "feedback", "train", rows)
    write_split(tmp_path, "feedback", "test", rows[::-1])
    hashes = load_split(tmp_path, "feedback", "train").row_hashes()
    assert hashes.shape == (20, 2)
    assert len({tuple(pair) for pair in hashes.tolist()}) == 20
    assert np.array_equal(load_split(tmp_path, "feedback", "test").row_hashes(), hashes[::-1])
    for change in ("input_ids", "label", "prompt_len"):
        changed = [dict(row) for row in rows]
        if change == "input_ids":
            changed[3]["input_ids"] = torch.cat([changed[3]["input_ids"][:-1], torch.tensor([1])])
        elif change == "label":
            changed[3]["label"] = not changed[3]["label"]
        else:
            changed[3]["prompt_len"] += 1
            changed[3]["input_ids"] = torch.cat([changed[3]["input_ids"], torch.tensor([5])])[:-1]
        write_split(tmp_path, "feedback", "validation", changed)
        other = load_split(tmp_path, "feedback", "validation").row_hashes()
        assert np.flatnonzero((other != hashes).any(axis=1)).tolist() == [3]


def test_a_pt_that_needs_code_is_refused_by_name_and_not_run(tmp_path):
    """DESIGN.md §3: pickles are never loaded any other way than weights_only."""
    witness = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(witness),)

    torch.save([{"prompt_len": 1, "input_ids": Hostile()}], tmp_path / "prompts_train.pt")
    with pytest.raises(UserError, match=r"prompts_train\.pt needs (posix|nt)\.mkdir to load"):
        load_split(tmp_path, "prompts", "train")
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more"])
def test_a_pt_that_is_none_is_refused(tmp_path, content):
    """A damaged `.pt` ends in one sentence that names it."""
    (tmp_path / "prompts_train.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"prompts_train\.pt (is damaged|needs)"):
        load_split(tmp_path, "prompts", "train")


def _with(row: dict, **changes) -> dict:
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


BAD_ROWS = [
    ("finetune", {"input_ids": [1, 2, 3]}, "'input_ids': found a list"),
    ("finetune", {"input_ids": torch.ones(2, 3, dtype=torch.int64)}, r"'input_ids': found a int64 tensor of shape"),
    ("finetune", {"targets": torch.ones(6)}, "'targets': found a float32 tensor"),
    ("finetune", {"prompt_len": True}, "'prompt_len': found a bool"),
    ("finetune", {"prompt_len": 0}, "'prompt_len': found 0"),
    ("finetune", {"prompt_len": 6}, "'prompt_len': found 6"),
    ("finetune", {"prompt_len": ...}, "lacks 'prompt_len'"),
    ("finetune", {"extra": 1}, "unknown key 'extra'"),
    ("finetune", {"targets": torch.full((6,), -100)}, "nothing but the ignored index"),
    ("finetune", {"targets": torch.arange(6)}, "a supervised token in the prompt"),
    ("finetune", {"targets": torch.tensor([-100, -100, 3, 4, 5, -100])}, "ids that differ from input_ids"),
    ("finetune", {"targets": torch.tensor([-100, -100, 2])}, "3 values"),
    ("preference", {"chosen_input_ids": torch.tensor([0, 9, 2])}, "another prompt"),
    ("preference", {"rejected_input_ids": torch.tensor([0, 1])}, "'prompt_len': found 2, and rejected"),
    ("preference", {"chosen_input_ids": torch.tensor([0, 1, -1])}, "the id -1"),
    ("feedback", {"label": 1}, "'label': found a int"),
    ("prompts", {"reference": None}, "'reference': found a NoneType"),
    ("prompts", {"prompt_len": 3}, "'prompt_len': found 3"),
]


@pytest.mark.parametrize(("stage", "change", "message"), BAD_ROWS)
def test_every_row_of_a_user_made_pt_is_checked(tmp_path, stage, change, message):
    """C10, C12, C40: the error names file, row and key; C38: chosen and rejected share their prompt."""
    base = {"prompt_len": 2, "input_ids": torch.arange(6)}
    good = {
        "finetune": base | {"targets": torch.tensor([-100, -100, 2, 3, 4, 5])},
        "preference": {
            "prompt_len": 2,
            "chosen_input_ids": torch.arange(4),
            "rejected_input_ids": torch.tensor([0, 1, 7]),
        },
        "feedback": base | {"label": False},
        "prompts": {"prompt_len": 6, "input_ids": torch.arange(6), "reference": ""},
    }[stage]
    path = tmp_path / f"{stage}_train.pt"
    torch.save([good, good], path)
    assert_same_rows(list(load_split(tmp_path, stage, "train")), [good, good])
    torch.save([good, good, _with(good, **change)], path)
    with pytest.raises(UserError, match=rf"{stage}_train\.pt, row 2.*{message}"):
        load_split(tmp_path, stage, "train")


def test_what_is_not_a_list_or_a_dict_is_refused(tmp_path):
    """C40: the shape of the file itself."""
    torch.save({"a": 1}, tmp_path / "prompts_train.pt")
    with pytest.raises(UserError, match="holds a dict; it must hold a list"):
        load_split(tmp_path, "prompts", "train")
    torch.save([torch.ones(1)], tmp_path / "prompts_train.pt")
    with pytest.raises(UserError, match="row 0: a Tensor"):
        load_split(tmp_path, "prompts", "train")


def test_a_missing_split_is_named_with_what_is_there_and_the_command(tmp_path):
    """DESIGN.md §11."""
    write_split(tmp_path, "finetune", "train", rows_of("finetune", 3))
    assert has_split(tmp_path, "finetune", "train")
    assert not has_split(tmp_path, "finetune", "test")
    with pytest.raises(UserError, match=r"preference_train\.pt is missing \(it holds finetune_train\.pt\).*--stage"):
        load_split(tmp_path, "preference", "train")
    with pytest.raises(UserError, match="no such folder"):
        load_split(tmp_path / "nowhere", "preference", "train")
    with pytest.raises(UserError, match="there is no finetune_training"):
        load_split(tmp_path, "finetune", "training")


def test_a_model_with_another_tokenizer_is_refused(tmp_path):
    """C7, C16: the fingerprints differ, or the chat templates, and the sentence names both tokenizers."""
    tokenizer = make_tokenizer(bos=True, pad_is_eos=True)
    other = make_tokenizer(bos=False, pad_is_eos=True)
    tokenizer.name_or_path, other.name_or_path = "tiny/one", "tiny/other"
    write_split(tmp_path, "finetune", "train", rows_of("finetune", 3))
    check_tokenizer(load_split(tmp_path, "finetune", "train"), other)
    entry = {
        "tokenizer": {"name": "tiny/one", "fingerprint": tokenizer_fingerprint(tokenizer)},
        "format": {"kind": "chat_template", "template_fingerprint": template_fingerprint(tokenizer)},
    }
    (tmp_path / "args.json").write_text(json.dumps({"stages": {"finetune": entry}}))
    split = load_split(tmp_path, "finetune", "train")
    check_tokenizer(split, tokenizer)
    other.chat_template = tokenizer.chat_template
    with pytest.raises(UserError, match=r"tokenised by 'tiny/one'.*'tiny/other'.*prepare the data again"):
        check_tokenizer(split, other)
    tokenizer.chat_template = "another"
    with pytest.raises(UserError, match=r"chat template of 'tiny/one'"):
        check_tokenizer(split, tokenizer)


def test_data_info_of_a_broken_args_json(tmp_path):
    """DESIGN.md §11: a file that can't be read is named."""
    assert data_info(tmp_path) == {"stages": {}}
    for content in ("{", "[]", '{"a": 1}'):
        (tmp_path / "args.json").write_text(content)
        with pytest.raises(UserError, match=r"args\.json.*prepare the data again"):
            data_info(tmp_path)


def test_another_ignore_index_reads_as_ours(tmp_path):
    """C10: whatever marks the ignored positions in the `.pt`, the split says IGNORE_INDEX."""
    rows = rows_of("finetune", 5)
    packed = pack("finetune", rows)
    exchange.write_pt(tmp_path / "finetune_train.pt", packed, ignore_index=-1)
    assert min(row["targets"].min() for row in torch.load(tmp_path / "finetune_train.pt", weights_only=True)) == -1
    entry = {"arguments": {"ignore_index": -1}}
    (tmp_path / "args.json").write_text(json.dumps({"stages": {"finetune": entry}}))
    assert_same_rows(list(load_split(tmp_path, "finetune", "train")), rows)


def test_large_numbers_in_the_pickle(tmp_path):
    """Offsets beyond one, two and four bytes are written as torch reads them."""
    for value in (0, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**40):
        assert pickle.loads(b"\x80\x02" + exchange._int(value) + b".") == value
    rows = rows_of("prompts", 3000)
    path = write_split(tmp_path, "prompts", "train", rows)
    assert sum(len(row["input_ids"]) for row in rows) > 65_536
    assert_same_rows(torch.load(path, weights_only=True), rows)
