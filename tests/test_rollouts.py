"""Sampling: against transformers' own `generate`, against the training forward, and independent of the batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from rlhf import rollouts
from rlhf.models.loading import set_dropout_off
from rlhf.models.policy import Policy
from rlhf.models.probe import tree_attention_fault
from rlhf.rollouts import Sampling, choose, generate
from rlhf.trees.forest import Forest, Tree
from tests.plain import eager, padded
from tests.tiny import make_model
from tests.trees import VOCABULARY

LENGTHS = (3, 9, 1, 6)
STOP_IDS = tuple(range(20, 40))
"""A fifth of the vocabulary, so that rows end early, late and never."""


def prompts(lengths=LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def policy_of(architecture: str, **options) -> Policy:
    model = make_model(architecture, **options)
    return Policy(model, uses_trees=tree_attention_fault(model) is None)


def recomputed(policy: Policy, trees: list[Tree], temperature: float) -> list[Tensor]:
    forest = Forest(trees)
    token_logps, _ = policy(forest, temperature=temperature)
    return [row[mask] for row, mask in zip(forest.dense(token_logps), forest.target_mask, strict=True)]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2", "cohere", "gptj"])
def test_c2_p14_log_probabilities_of_the_rollout_are_those_of_training(architecture, temperature):
    """C2, P14: mixed lengths, `train()` mode, dropout in the configuration but off: to 1e-4 in float32."""
    dropout = (
        {"attn_pdrop": 0.2, "resid_pdrop": 0.2} if architecture in ("gpt2", "gptj") else {"attention_dropout": 0.2}
    )
    policy = policy_of(architecture, **dropout).train()
    set_dropout_off(policy)
    samples = generate(policy, prompts(), Sampling(12, temperature, stop_ids=STOP_IDS), num_samples=2)
    assert policy.training
    trees = [Tree.of(prompt, *samples.response_ids[2 * i : 2 * i + 2]) for i, prompt in enumerate(prompts())]
    assert len({len(response) for response in samples.response_ids}) > 2
    for mine, again in zip(samples.token_logps, recomputed(policy, trees, temperature), strict=True):
        torch.testing.assert_close(mine, again, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_c2_a_policy_in_training_mode_samples_without_dropout(architecture):
    """C2: with dropout on, what is sampled and its log-probabilities are those of evaluation mode."""
    dropout = {"attn_pdrop": 0.5, "resid_pdrop": 0.5} if architecture == "gptj" else {"attention_dropout": 0.5}
    policy = policy_of(architecture, **dropout).train()
    samples = generate(policy, prompts(), Sampling(8, stop_ids=STOP_IDS))
    assert policy.training
    policy.eval()
    trees = [Tree.of(prompt, response) for prompt, response in zip(prompts(), samples.response_ids, strict=True)]
    for mine, again in zip(samples.token_logps, recomputed(policy, trees, 1.0), strict=True):
        torch.testing.assert_close(mine, again, rtol=0, atol=1e-4)


def test_c2_p5_temperature_is_not_left_out():
    """P5: at T = 0.6 the log-probabilities are far from those at T = 1: leaving out the division would be seen."""
    policy = policy_of("llama")
    samples = generate(policy, prompts(), Sampling(12, 0.6))
    trees = [Tree.of(prompt, response) for prompt, response in zip(prompts(), samples.response_ids, strict=True)]
    assert (torch.cat(samples.token_logps) - torch.cat(recomputed(policy, trees, 1.0))).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "mistral", "gemma2", "gptj"])
def test_a4_c13_greedy_is_that_of_transformers(architecture):
    """A4, C13: our batch = transformers' row by row = transformers' batch with left pads, token for token."""
    found = generate(policy_of(architecture), prompts(), Sampling(10, do_sample=False)).response_ids
    plain = eager(architecture)
    options = {"max_new_tokens": 10, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    for prompt, response in zip(prompts(), found, strict=True):
        alone = plain.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
        assert torch.equal(response, alone[0, len(prompt) :])
    inputs = padded(prompts(), left=0)
    batch = plain.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(torch.stack(found), batch[:, max(LENGTHS) :])


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_a_sample_depends_on_its_prompt_and_its_stream_alone(architecture):
    """A9, C27: not on the other rows, their order, how many are decoded at once, or how many have ended."""
    policy, sampling = policy_of(architecture), Sampling(12, stop_ids=STOP_IDS, seed=3)
    together = generate(policy, prompts(), sampling, num_samples=3)
    for max_rows in (1, 3, 7):
        cut = generate(policy, prompts(), sampling, num_samples=3, max_rows=max_rows)
        assert all(map(torch.equal, together.response_ids, cut.response_ids))
        assert torch.equal(together.ended, cut.ended)
        torch.testing.assert_close(together.token_logps, cut.token_logps, rtol=0, atol=1e-5)
    order = [2, 0, 3, 1]
    ids = [3 * i + j for i in order for j in range(3)]
    turned = generate(policy, [prompts()[i] for i in order], sampling, num_samples=3, sample_ids=ids)
    assert all(torch.equal(together.response_ids[ids[k]], response) for k, response in enumerate(turned.response_ids))


def test_compaction_changes_nothing(monkeypatch):
    """Rows that have ended leave the batch at once, at a quarter, or never: the same samples."""
    policy, found, widths = policy_of("mistral"), [], []
    policy.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: widths.append(len(given[0])))
    for share in (0.0, 0.25, 2.0):
        monkeypatch.setattr(rollouts, "COMPACT_AT", share)
        widths.clear()
        found.append(generate(policy, prompts(), Sampling(12, stop_ids=STOP_IDS), num_samples=4))
        shrinks = widths[-1] < widths[1]
        assert shrinks == (share < 1)
    for other in found[1:]:
        assert all(map(torch.equal, found[0].response_ids, other.response_ids))
        torch.testing.assert_close(found[0].token_logps, other.token_logps, rtol=0, atol=1e-5)


def test_a_prompt_is_prefilled_once_for_all_its_samples():
    """DESIGN.md section 8: the first forward is the prompts, packed; each further one is a token a row."""
    policy, shapes = policy_of("llama"), []
    policy.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    generate(policy, prompts(), Sampling(3), num_samples=5)
    assert [tuple(shape) for shape in shapes] == [(sum(LENGTHS),), (20,), (20,)]


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_c1_p8_a_response_ends_with_its_first_stop_token(architecture):
    """P8: the stop token is kept and nothing follows it, at the first, a middle or the last place; else no end."""
    samples = generate(policy_of(architecture), prompts(), Sampling(6, 1.5, stop_ids=STOP_IDS, seed=1), num_samples=24)
    ends = set()
    for response, ended in zip(samples.response_ids, samples.ended.tolist(), strict=True):
        stops = [t for t, token in enumerate(response.tolist()) if token in STOP_IDS]
        assert stops == ([len(response) - 1] if ended else [])
        assert ended or len(response) == 6
        ends.add(len(response) - 1 if ended else None)
    assert {0, 2, 5, None} <= ends
    assert all(len(logps) == len(r) for logps, r in zip(samples.token_logps, samples.response_ids, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_seeds_name_the_noise(architecture):
    """C27: one seed, one sample, whatever was drawn before, and nothing else is drawn from; another seed, another."""
    policy, sampling = policy_of(architecture), Sampling(8, seed=1)
    first = generate(policy, prompts(), sampling)
    torch.rand(5)
    state = torch.get_rng_state()
    again = generate(policy, prompts(), sampling)
    assert torch.equal(torch.get_rng_state(), state)
    other = generate(policy, prompts(), dataclasses.replace(sampling, seed=2))
    assert all(map(torch.equal, first.response_ids, again.response_ids))
    assert not all(map(torch.equal, first.response_ids, other.response_ids))


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_p6_settings_of_the_model_itself_do_not_filter(architecture):
    """P6: a repetition penalty or a least length in the model's generation settings would not be in the ratio."""
    policy, sampling = policy_of(architecture), Sampling(8, stop_ids=STOP_IDS)
    expected = generate(policy, prompts(), sampling).response_ids
    settings = policy.model.generation_config
    settings.repetition_penalty, settings.min_new_tokens, settings.top_k = 5.0, 8, 2
    assert all(map(torch.equal, generate(policy, prompts(), sampling).response_ids, expected))
    assert policy.model.generation_config is settings


def test_samples_of_one_prompt_differ():
    responses = generate(policy_of("llama"), prompts((4,)), Sampling(8), num_samples=6).response_ids
    assert len({tuple(response.tolist()) for response in responses}) == 6


def test_mode_is_restored_after_an_error(monkeypatch):
    policy = policy_of("llama").train()
    monkeypatch.setattr(rollouts, "choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(policy, prompts(), Sampling(2))
    assert policy.training


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(policy_of("llama"), [torch.empty(0, dtype=torch.long)], Sampling(2))


def test_mixed_precision_samples():
    """Under autocast too, log-probabilities are those of the training forward, to bf16's rounding."""
    policy = policy_of("llama")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        samples = generate(policy, prompts(), Sampling(8))
        trees = [Tree.of(prompt, response) for prompt, response in zip(prompts(), samples.response_ids, strict=True)]
        again = recomputed(policy, trees, 1.0)
    torch.testing.assert_close(samples.token_logps, again, rtol=0, atol=0.3)


# How one token is chosen, on probabilities 0.5, 0.3, 0.15, 0.05 that stand in the order 2, 0, 3, 1.
LOGITS = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).log()


def shares(sampling: Sampling, num: int = 10_000) -> list[float]:
    """How often each token comes out over evenly spread uniforms: its probability, to 1 / num."""
    uniform = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    chosen, _ = choose(LOGITS.expand(num, -1), sampling, uniform)
    return (torch.bincount(chosen, minlength=4) / num).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.3, 0.05, 0.5, 0.15]),
        # Squares over their sum, 0.365.
        (Sampling(temperature=0.5), [0.2466, 0.0068, 0.6849, 0.0616]),
        (Sampling(top_k=2), [0.375, 0.0, 0.625, 0.0]),
        (Sampling(top_k=9), [0.3, 0.05, 0.5, 0.15]),
        # 0.5 alone holds less than 0.6, 0.5 + 0.3 holds it.
        (Sampling(top_p=0.6), [0.375, 0.0, 0.625, 0.0]),
        (Sampling(top_p=0.1), [0.0, 0.0, 1.0, 0.0]),
        # Among the first three, renormalised to 0.526, 0.316, 0.158, the first two hold 0.8.
        (Sampling(top_k=3, top_p=0.8), [0.375, 0.0, 0.625, 0.0]),
        (Sampling(do_sample=False), [0.0, 0.0, 1.0, 0.0]),
    ],
    ids=["all", "T", "top_k", "top_k > V", "top_p", "small top_p", "both", "greedy"],
)
def test_p6_choice_by_hand(sampling, expected):
    """P6: pure sampling has no filter; a filter keeps the likeliest tokens and renormalises."""
    assert shares(sampling) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.5), Sampling(0, 0.5, 2, 0.6), Sampling(0, 0.5, do_sample=False)]
)
def test_log_probabilities_are_before_any_filter(sampling):
    """Of the tempered distribution, so that they equal the training forward's whatever was filtered."""
    chosen, logps = choose(LOGITS, sampling, torch.tensor([0.1], dtype=torch.float64))
    torch.testing.assert_close(logps, (LOGITS / 0.5).log_softmax(-1)[0, chosen])


def test_the_end_of_the_line_is_a_token_with_probability():
    """A uniform just under 1 never leads past the last token that can be drawn."""
    logits = torch.tensor([[0.0, 1.0, float("-inf"), float("-inf")]])
    chosen, logps = choose(logits, Sampling(), torch.tensor([1 - 1e-16], dtype=torch.float64))
    assert chosen.item() == 1
    assert torch.isfinite(logps).all()


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_looks_among_the_likeliest_first(top_p, monkeypatch):
    """Whether they hold enough or the vocabulary has to be sorted after all: the same tokens."""
    logits = 3 * torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for likeliest in (2, 40, 500):
        monkeypatch.setattr(rollouts, "LIKELIEST", likeliest)
        found.append(choose(logits, Sampling(top_p=top_p), uniform))
    for ids, logps in found[1:]:
        assert torch.equal(ids, found[0][0])
        assert torch.equal(logps, found[0][1])


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_of_the_vocabulary_change_nothing(block, monkeypatch):
    """The token is where the cumulative distribution passes the uniform, whatever the blocks it is looked for in."""
    logits = 3 * torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(rollouts, "BLOCK", block)
    ids, logps = choose(logits, Sampling(), uniform)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1).clamp(max=499)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(logps, logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1), rtol=0, atol=1e-5)
