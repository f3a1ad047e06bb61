"""Whole data preparations: which rows and tokens come out, and how what was left out is counted."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch

from data_prep.custom import prepare_data as custom
from data_prep.helpful_harmless import prepare_data as dialogues
from data_prep.summarization import prepare_data as summaries
from rlhf.data.packed import SCHEMAS
from rlhf.data.prompts import load_prompts
from rlhf.data.splits import IGNORE_INDEX, load_split
from rlhf.data.text import encode_pair, encode_prompt, load_tokenizer
from rlhf.errors import UserError
from tests.data_makers import all_rows, dialogue_rows, run, save_tokenizers, some_words
from tests.tiny_tokenizers import EOS, make_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return save_tokenizers(tmp_path_factory)


@pytest.mark.parametrize("bos", [False, True])
def test_every_kept_response_has_exactly_one_supervised_eos(tmp_path, tokenizers, bos):
    """C1: with pad = EOS; a response that spells EOS at its end gets no second, one in its middle is dropped."""
    rows = dialogue_rows(50)
    rows[3]["chosen"] += EOS
    rows[4]["chosen"] += f"{EOS} and on"
    folder, entry = run(dialogues, tmp_path, tokenizers, rows, bos=bos, stage="finetune")
    tokenizer = load_tokenizer(tokenizers[bos])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    kept = all_rows(folder, "finetune")
    assert len(kept) == 49
    for row in kept:
        learnt = row["targets"] != IGNORE_INDEX
        assert (row["targets"] == tokenizer.eos_token_id).sum() == 1
        assert row["targets"][-1] == tokenizer.eos_token_id
        assert not learnt[: row["prompt_len"]].any()
        assert learnt[row["prompt_len"] :].all()
        assert torch.equal(row["targets"][learnt], row["input_ids"][learnt])
    dropped = sum((collections.Counter(split["dropped"]) for split in entry["counts"].values()), collections.Counter())
    assert dropped == {"EOS token inside the response": 1}


def test_a_conversation_has_the_same_ids_in_every_stage(tmp_path, tokenizers):
    """C8, C38: what is sampled from, scored, learnt and evaluated on: one prompt behind one BOS, one answer."""
    rows, tokenizer = dialogue_rows(6), load_tokenizer(tokenizers[True])
    found = {}
    for stage in ("prompts", "finetune", "preference"):
        options = {"stage": stage, "shuffle": False, "validation_percentage": 0.0, "test_percentage": 0.0}
        folder, _ = run(dialogues, tmp_path, tokenizers, rows, name=stage, **options)
        prompts = load_prompts(str(folder), "train", tokenizer)
        found[stage] = [(prompts.prompt(i).tolist(), prompts.answer(i).tolist()) for i in range(len(prompts))]
    assert found["prompts"] == found["finetune"] == found["preference"]
    for prompt, answer in found["prompts"]:
        assert prompt[0] == tokenizer.bos_token_id
        assert (prompt + answer).count(tokenizer.bos_token_id) == 1
        assert (answer[-1], answer.count(tokenizer.eos_token_id)) == (tokenizer.eos_token_id, 1)


def test_removing_same_inputs_keeps_the_first(tmp_path, tokenizers):
    """--remove_same_inputs counts what it drops; a pair's two labelled responses belong to one input."""
    rows = dialogue_rows(90, num_prompts=30)
    tokenizer = load_tokenizer(tokenizers[True])
    for stage, factor in (("finetune", 1), ("feedback", 2)):
        folder, entry = run(dialogues, tmp_path, tokenizers, rows, stage=stage, remove_same_inputs=True)
        kept = all_rows(folder, stage)
        assert len(kept) == 30 * factor
        counts = entry["counts"].values()
        assert sum(c["dropped"]["prompt seen before (--remove_same_inputs)"] for c in counts) == 60 * factor
        ends = {tokenizer.decode(row["input_ids"]).removesuffix(EOS).split()[-1] for row in kept}
        assert ends <= {f"{i}{mark}" for i in range(30) for mark in ".!"}


def test_limits_drop_and_count_by_reason(tmp_path, tokenizers):
    """C12: dropping is the default; counts and reasons are saved, and add up to the rows that were read."""
    rows = dialogue_rows(120)
    tokenizer = load_tokenizer(tokenizers[True])
    limits = {"max_length": 60, "max_prompt_length": 40, "max_response_length": 30}
    folder, entry = run(dialogues, tmp_path, tokenizers, rows, stage="preference", **limits)
    expected = collections.Counter()
    for row in rows:
        head, found, chosen = row["chosen"].rpartition("\n\nAssistant:")
        rejected = row["rejected"].rpartition("\n\nAssistant:")[2]
        prompt_ids, chosen_ids = encode_pair(tokenizer, head + found, chosen)
        lengths = [len(chosen_ids), len(encode_pair(tokenizer, head + found, rejected)[1])]
        if len(prompt_ids) > 40:
            expected["prompt over --max_prompt_length=40"] += 1
        elif max(lengths) > 30 and (lengths[0] > 30 or len(prompt_ids) + lengths[0] <= 60):
            expected["response over --max_response_length=30"] += 1
        elif len(prompt_ids) + max(lengths) > 60:
            expected["prompt and response over --max_length=60"] += 1
        else:
            expected["kept"] += 1
    found = collections.Counter()
    for counts in entry["counts"].values():
        found.update(counts["dropped"])
        found["kept"] += counts["kept"]
        assert counts["cut"] == {}
    assert found == expected
    assert min(expected.values()) > 3
    for row in all_rows(folder, "preference"):
        for column in ("chosen_input_ids", "rejected_input_ids"):
            assert 40 + 30 > len(row[column]) > row["prompt_len"]
            assert len(row[column]) <= 60
            assert row[column][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("stage", ["finetune", "preference", "feedback"])
def test_truncation_keeps_the_prompts_tail_and_adds_no_eos(tmp_path, tokenizers, stage):
    """C12, A6: with --truncate nothing is dropped for its length, no response is empty, cut ones have no EOS."""
    rows = dialogue_rows(80)
    tokenizer = load_tokenizer(tokenizers[True])
    limits = {"max_length": 45, "max_prompt_length": 30, "max_response_length": 20, "truncate": True}
    folder, entry = run(dialogues, tmp_path, tokenizers, rows, stage=stage, **limits)
    kept = all_rows(folder, stage)
    assert len(kept) >= 75 * (2 if stage == "feedback" else 1)
    tail = tokenizer("\n\nAssistant:", add_special_tokens=False).input_ids
    num_cut = 0
    for row in kept:
        assert row["prompt_len"] <= 30
        for column in (c for c in SCHEMAS[stage].sequences if c.endswith("input_ids")):
            prompt, response = row[column][: row["prompt_len"]].tolist(), row[column][row["prompt_len"] :].tolist()
            assert prompt[0] == tokenizer.bos_token_id
            assert prompt.count(tokenizer.bos_token_id) == 1
            assert prompt[-len(tail) :] == tail
            assert 1 <= len(response) <= 20
            assert len(prompt) + len(response) <= 45
            whole = response[-1] == tokenizer.eos_token_id
            assert whole or len(response) == 20 or len(prompt + response) == 45
            num_cut += not whole
    assert num_cut > 20
    cuts = sum((collections.Counter(split["cut"]) for split in entry["counts"].values()), collections.Counter())
    assert cuts["prompt cut"] > 10
    assert cuts["response cut"] > 10


def test_a_plain_prompt_is_cut_at_its_start(tmp_path, tokenizers):
    """C12, C8: of a text without turns, --truncate keeps the last tokens, behind one BOS."""
    rows = [{"prompt": f"{i}" + " one two" * 30 + f" {i}?", "completion": " six"} for i in range(12)]
    tokenizer = load_tokenizer(tokenizers[True])
    limits = {"max_length": 30, "max_prompt_length": 20, "truncate": True}
    folder, _ = run(custom, tmp_path, tokenizers, rows, **limits)
    found = sorted(row["input_ids"][: row["prompt_len"]].tolist() for row in all_rows(folder, "finetune"))
    whole = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    assert found == sorted(ids[:1] + ids[-19:] for ids in whole)
    assert {len(ids) for ids in found} == {20}


def test_pairs_that_become_equal_when_cut_are_dropped(tmp_path, tokenizers):
    """C12: a pair without a difference left teaches nothing."""
    rows = dialogue_rows(20)
    rows[0]["chosen"] = rows[0]["rejected"].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:" + " one" * 60 + " a"
    rows[0]["rejected"] = rows[0]["chosen"][:-1] + "b"
    _, entry = run(
        dialogues, tmp_path, tokenizers, rows, stage="preference", truncate=True, max_length=60, max_prompt_length=50
    )
    dropped = sum((collections.Counter(split["dropped"]) for split in entry["counts"].values()), collections.Counter())
    assert dropped == {"chosen equals rejected once both are cut": 1}


def test_long_posts_are_cut_and_counted(tmp_path, tokenizers):
    """A5: without --truncate too, and the prompt still ends in its tail."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"SUBREDDIT: r/a\nTITLE: {i}\nPOST: " + "\n".join(some_words(rng, 3, 9) for _ in range(8)),
            "chosen": some_words(rng, 2, 6),
            "rejected": some_words(rng, 7, 9),
        }
        for i in range(40)
    ]
    folder, entry = run(summaries, tmp_path, tokenizers, rows, stage="preference", max_prompt_length=100)
    tokenizer = load_tokenizer(tokenizers[True])
    texts = {row["prompt"] for row in rows}
    kept = all_rows(folder, "preference")
    assert len(kept) == 40
    num_cut = 0
    for row in kept:
        prompt = tokenizer.decode(row["chosen_input_ids"][: row["prompt_len"]], skip_special_tokens=True)
        assert prompt.endswith("\nTL;DR:")
        assert row["prompt_len"] <= 100
        post = prompt.removesuffix("\nTL;DR:")
        assert post in texts or any(text.startswith(post + "\n") for text in texts)
        num_cut += post not in texts
    assert num_cut > 5
    assert sum(split["cut"].get("prompt cut", 0) for split in entry["counts"].values()) == num_cut
    assert entry["format"]["kind"] == "summary"


def test_texts_that_merge_at_the_border_are_counted(tmp_path, tokenizers):
    """C38, A6: prompts that end where a token would go on."""
    rows = [{"prompt": "Q: a", "completion": " b"}] * 7 + [
        {"prompt": "What is the cap", "completion": "ital of France?"}
    ] * 3
    tokenizer = load_tokenizer(tokenizers[True])
    for row in (rows[0], rows[-1]):
        prompt_ids, response_ids = encode_pair(tokenizer, row["prompt"], row["completion"], ended=False)
        assert (prompt_ids + response_ids == tokenizer(row["prompt"] + row["completion"]).input_ids) == (row is rows[0])
    share = {"validation_percentage": 0.0, "test_percentage": 0.0}
    _, entry = run(custom, tmp_path, tokenizers, rows, **share)
    assert entry["boundary"] == {"checked": 10, "differ": 3}
    assert entry["format"] == {"kind": "plain", "template": "{prompt}", "stop": []}


def test_conversations_learn_every_assistants_turn(tmp_path, tokenizers):
    """C10, C1: decoding what is supervised gives the assistants' turns with their ends, and nothing else."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        turns = [{"role": "system", "content": f"Be {i}."}] if i % 3 == 0 else []
        for _ in range(rng.integers(1, 4)):
            turns.append({"role": "user", "content": f"{i} {some_words(rng, 1, 6)} assistant\n"})
            turns.append({"role": "assistant", "content": f"{i} {some_words(rng, 1, 6)}"})
        rows.append({"messages": turns})
    tokenizer = load_tokenizer(tokenizers[True])
    expected = sorted("".join(m["content"] + EOS for m in r["messages"] if m["role"] == "assistant") for r in rows)
    folder, entry = run(custom, tmp_path, tokenizers, rows, stage="finetune")
    kept = all_rows(folder, "finetune")
    assert sorted(tokenizer.decode(row["targets"][row["targets"] != IGNORE_INDEX]) for row in kept) == expected
    whole = {tokenizer.decode(row["input_ids"]) for row in kept}
    assert whole == {tokenizer.apply_chat_template(r["messages"], tokenize=False).removesuffix("\n") for r in rows}
    for row in kept:
        assert row["targets"][row["prompt_len"]] != IGNORE_INDEX
        assert (row["targets"][: row["prompt_len"]] == IGNORE_INDEX).all()
        assert row["input_ids"].tolist().count(tokenizer.bos_token_id) == 1
    assert entry["format"]["kind"] == "chat_template"
    assert entry["format"]["stop"] == [EOS]
    last, _ = run(custom, tmp_path, tokenizers, rows, stage="finetune", name="last", assistant_turns="last")
    learnt = sorted(tokenizer.decode(r["targets"][r["targets"] != IGNORE_INDEX]) for r in all_rows(last, "finetune"))
    assert learnt == sorted(row["messages"][-1]["content"] + EOS for row in rows)


def test_chat_needs_a_template(tmp_path, tokenizers):
    """DESIGN.md §11: --apply_chat_template with a tokenizer that has none."""
    make_tokenizer(bos=True, pad_is_eos=True, chat_template=False).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="has no chat template"):
        run(
            custom, tmp_path, tokenizers, [{"prompt": "a", "completion": "b"}], apply_chat_template=True,
            tokenizer_name=str(tmp_path / "plain"),
        )  # fmt: skip


def test_another_ignore_index(tmp_path, tokenizers):
    """--ignore_index marks the prompt in the `.pt`; training reads its own mark."""
    folder, _ = run(dialogues, tmp_path, tokenizers, dialogue_rows(20), ignore_index=-1)
    row = torch.load(folder / "finetune_train.pt", weights_only=True)[0]
    assert set(row["targets"][: row["prompt_len"]].tolist()) == {-1}
    assert set(load_split(folder, "finetune", "train")[0]["targets"][: row["prompt_len"]].tolist()) == {IGNORE_INDEX}
