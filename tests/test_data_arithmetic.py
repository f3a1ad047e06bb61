"""The arithmetic task: problems of each level, their answers and how they are worked out, and the files."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest

from data_prep.arithmetic import prepare_data as arithmetic
from data_prep.arithmetic.prepare_data import (
    PrepareFlags,
    problem_of,
    problems_of,
    rows_of,
    steps_of,
    text_of,
    value_of,
)
from rlhf.data.splits import SPLIT_NAMES, check_tokenizer, data_info, load_split
from rlhf.data.text import load_tokenizer
from rlhf.errors import UserError
from rlhf.rewards.rules import numeric_answer
from tests.data_makers import all_rows, files, prompts_of, run, save_tokenizers


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return save_tokenizers(tmp_path_factory)


LEVELS = pytest.mark.parametrize("level", range(1, arithmetic.NUM_LEVELS + 1))
FORMS = {
    1: r"\d \+ \d",
    2: r"\d\d [+-] \d\d",
    3: r"\d \* \d\d|\d\d [+-] \d\d [+-] \d\d",
    4: r"\d\d [+-] \d\d? \* \d\d?|\d\d? \* \d\d? [+-] \d\d",
    5: r".*\([^()]*\).*",
}


@LEVELS
def test_answers_are_pythons(level):
    """What is written is worth what is said, by Python's own rules of precedence; so is every step, and the last one
    gives the answer."""
    draw = random.Random(level)
    for _ in range(300):
        problem = problem_of(level, draw)
        text, answer = text_of(problem), value_of(problem)
        assert re.fullmatch(FORMS[level], text), text
        assert re.fullmatch(r"[\d+\-*() ]+", text)
        assert eval(text) == answer
        steps = steps_of(problem)
        assert len(steps) == len(re.findall(r"[+*-]", text))
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert steps[-1].endswith(f"= {answer}")
    if level <= 2:
        assert answer >= 0
    if level == 5:
        assert 3 <= len(steps) <= 4


@LEVELS
def test_problems_are_distinct_and_seeded(level):
    num = 100 if level == 1 else 400
    found = problems_of(level, num, seed=3)
    assert len({text_of(problem) for problem in found}) == len(found) == num
    assert problems_of(level, num, seed=3) == found
    assert problems_of(level, num, seed=4) != found
    assert problems_of(level, 50, seed=3) == found[:50]


def test_a_level_gives_all_that_it_has(capsys):
    """Level 1 has 10 x 10 sums; the others take nothing of its share."""
    rows = rows_of(PrepareFlags(destination_dir="", tokenizer_name="", levels=[2, 1], num_problems=501))
    assert len(rows) == 251 + 100
    assert "level 1 has 100 problems, fewer than its share of 250; all are taken" in capsys.readouterr().out
    assert [len(re.findall(r"\d+", row["prompt"])[0]) for row in rows[:4]] == [2, 1, 2, 1]


def test_prompts_and_worked_answers(tmp_path, tokenizers):
    """Both stages in one folder: the exact set of files, the same problems in the same splits, no problem in two; the
    reference is what the worked answer ends with, and `args.json` says how it was made."""
    settings = {"levels": [2, 5], "num_problems": 120}
    folder, prompts = run(arithmetic, tmp_path, tokenizers, **settings)
    _, finetune = run(arithmetic, tmp_path, tokenizers, stage="finetune", **settings)
    assert sorted(path.name for path in folder.iterdir()) == files("prompts", "finetune")
    tokenizer = load_tokenizer(tokenizers[True])
    by_split = [prompts_of(folder, stage) for stage in ("prompts", "finetune")]
    assert by_split[0] == by_split[1]
    assert sum(len(found) for found in by_split[0].values()) == len(set().union(*by_split[0].values())) == 120
    assert all(0 < len(by_split[0][name]) < 30 for name in ("validation", "test"))
    answers = {}
    for row in all_rows(folder, "prompts"):
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        asked = re.fullmatch(r"Question: What is (.*)\?\nAnswer:", text)[1]
        assert row["reference"] == str(eval(asked))
        answers[text] = row["reference"]
    for row in all_rows(folder, "finetune"):
        n = row["prompt_len"]
        text = tokenizer.decode(row["input_ids"][:n], skip_special_tokens=True)
        worked = tokenizer.decode(row["input_ids"][n:], skip_special_tokens=True)
        assert worked.startswith(" ")
        assert worked.endswith(f"\nThe answer is {answers[text]}.")
        assert numeric_answer(worked, answers[text]) == 1
        assert row["input_ids"][-1] == tokenizer.eos_token_id
    info = data_info(folder)["stages"]
    for stage, entry in (("prompts", prompts), ("finetune", finetune)):
        flags = PrepareFlags(destination_dir=str(folder), tokenizer_name=str(tokenizers[True]), stage=stage, **settings)
        assert info[stage]["arguments"] == dataclasses.asdict(flags)
        assert info[stage]["format"] == {"kind": "plain", "template": "Question: {prompt}\nAnswer:", "stop": []}
        assert sum(split["kept"] for split in entry["counts"].values()) == 120
        for name in SPLIT_NAMES:
            check_tokenizer(load_split(folder, stage, name), tokenizer)


def test_the_chat_template(tmp_path, tokenizers):
    """Problems as a user's message, worked answers as the assistant's turn, without a space in front."""
    folder, entry = run(
        arithmetic, tmp_path, tokenizers, levels=[1], num_problems=20, stage="finetune", apply_chat_template=True
    )
    tokenizer = load_tokenizer(tokenizers[True])
    assert entry["format"]["kind"] == "chat_template"
    row = load_split(folder, "finetune", "train")[0]
    text = tokenizer.decode(row["input_ids"])
    assert re.search(r"user\nWhat is \d \+ \d\?<\|im_end\|>\n<\|im_start\|>assistant\n\d \+ \d = \d+\nThe answer", text)


def test_the_same_seed_gives_the_same_files(tmp_path, tokenizers):
    one, other, third = (
        run(arithmetic, tmp_path, tokenizers, name=name, seed=seed, levels=[3], num_problems=40)[0]
        for name, seed in (("one", 1), ("other", 1), ("third", 2))
    )
    assert (one / "prompts_train.pt").read_bytes() == (other / "prompts_train.pt").read_bytes()
    assert (one / "prompts_train.pt").read_bytes() != (third / "prompts_train.pt").read_bytes()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"levels": [0, 1]}, r"--levels=0 must be in \[1, 5\]"),
        ({"levels": [2, 2]}, "each once"),
        ({"levels": []}, "--levels"),
        ({"num_problems": 0}, "--num_problems=0 must be above 0"),
        ({"prompt_template": "Question:"}, "has no place for the text"),
    ],
)
def test_wrong_flags_are_named(tmp_path, tokenizers, changes, why):
    with pytest.raises(UserError, match=why):
        run(arithmetic, tmp_path, tokenizers, **{"num_problems": 10, **changes})
    assert not (tmp_path / "data").exists()


def test_a_tokenizer_without_a_template_is_named(tmp_path, tokenizers):
    from tests.tiny_tokenizers import make_tokenizer

    make_tokenizer(bos=False, pad_is_eos=True, chat_template=False).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="has no chat template, which --apply_chat_template needs"):
        run(arithmetic, tmp_path, {True: tmp_path / "tokenizer"}, num_problems=10, apply_chat_template=True)
