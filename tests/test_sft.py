"""Supervised fine-tuning: what is learnt, and that a model learns to stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.prompts import example_prompt
from rlhf.data.splits import IGNORE_INDEX, load_split
from rlhf.evaluation import sampling_of, stop_ids
from rlhf.flags import ModelFlags
from rlhf.models.loading import load_policy, tokenizer_of
from rlhf.rlhf_sft import SFTFlags, main
from rlhf.rollouts import generate
from rlhf.trees.forest import Forest
from rlhf.trees.rows import finetune_tree
from tests.splits import make_data, make_model_dir, quick_flags, tokenizer_for

CAP = 60


@pytest.fixture(scope="module")
def overfit(tmp_path_factory) -> tuple[Path, str]:
    """A model that has seen six rows a hundred times, with a tokenizer whose padding token is its EOS."""
    root, tokenizer = tmp_path_factory.mktemp("overfit"), tokenizer_for(pad_is_eos=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = make_data(root / "data", tokenizer, num_train=6, num_validation=0)
    model = make_model_dir(root / "model", tokenizer=tokenizer)
    main(
        quick_flags(
            SFTFlags, data, root / "run", model_name=model, max_steps=100, mini_batch_size=6, learning_rate=2e-2,
            lr_warmup_steps=5,
        )
    )  # fmt: skip
    return root / "run" / "final", data


def test_c1_an_overfit_model_ends_every_answer(overfit):
    """C1: pad = EOS; every greedy answer ends before the length cap, with the EOS that the data has there."""
    final, data = overfit
    policy = load_policy(str(final), ModelFlags(), trainable=False)
    tokenizer = tokenizer_of(str(final), ModelFlags())
    rows = list(load_split(data, "finetune", "train"))
    flags = SFTFlags(data_dir=data, max_new_tokens=CAP, do_sample=False)
    prompts = [row["input_ids"][: row["prompt_len"]] for row in rows]
    samples = generate(policy, prompts, sampling_of(flags, tokenizer, policy))
    assert samples.ended.all()
    for row, response in zip(rows, samples.response_ids, strict=True):
        assert torch.equal(response, row["input_ids"][row["prompt_len"] :])
        assert response.tolist().count(tokenizer.eos_token_id) == 1


def test_c1_a4_and_in_transformers_too(overfit):
    """C1, A4: `generate` of a plain model on a left-padded batch, padded with the EOS, stops at the same place."""
    final, data = overfit
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    rows = list(load_split(data, "finetune", "train"))
    tokenizer.padding_side = "left"
    batch = tokenizer.pad(
        {"input_ids": [row["input_ids"][: row["prompt_len"]].tolist() for row in rows]}, return_tensors="pt"
    )
    out = model.generate(**batch, max_new_tokens=CAP, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, response in zip(rows, out, strict=True):
        expected = row["input_ids"][row["prompt_len"] :]
        assert torch.equal(response[: len(expected)], expected)
        assert (response[len(expected) :] == tokenizer.eos_token_id).all()


def test_c1_the_eos_is_learnt_once_a_response(overfit):
    """C1, A8: with `targets`, the response and its one EOS count, and nothing of the prompt; without, every token but
    the first, which nothing predicts."""
    _, data = overfit
    eos = tokenizer_for(pad_is_eos=True).eos_token_id
    for row in load_split(data, "finetune", "train"):
        n, size = row["prompt_len"], len(row["input_ids"])
        assert (row["targets"] == eos).sum() == 1
        counted = Forest([finetune_tree(row)])
        assert counted.target_index.tolist() == list(range(n, size))
        assert counted.num_targets == int((row["targets"] != IGNORE_INDEX).sum())
        assert Forest([finetune_tree(row, use_targets=False)]).target_index.tolist() == list(range(1, size))


def test_stop_tokens_are_the_tokenizers_and_the_models(tmp_path):
    """Models may list several EOS tokens in their generation settings; one of them is enough to stop."""
    policy = load_policy(make_model_dir(tmp_path), ModelFlags(), trainable=False)
    tokenizer = tokenizer_for()
    policy.model.generation_config.eos_token_id = [7, tokenizer.eos_token_id, 9]
    assert stop_ids(tokenizer, policy) == (tokenizer.eos_token_id, 7, 9)
    policy.model.generation_config.eos_token_id = None
    assert stop_ids(tokenizer, policy) == (tokenizer.eos_token_id,)


def test_the_example_prompt_is_the_datas(tmp_path):
    data = make_data(tmp_path / "data", num_train=2, num_validation=1)
    saved = torch.load(tmp_path / "data" / "example_prompt.pt", weights_only=True)
    assert torch.equal(example_prompt(data), saved["input_ids"][0])
    assert example_prompt(str(tmp_path)) is None
