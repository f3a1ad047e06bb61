"""Whole runs of rlhf_grpo.py on a tiny world: what they learn, what is sampled and trained on, resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf import rlhf_grpo
from rlhf.errors import UserError
from rlhf.models import roles
from tests.grpo import World, flags_of, make_world, train
from tests.splits import metrics_of


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


LEARNS = {
    "grpo": {"num_samples": 8},
    "dapo": {"num_samples": 8, "clip_high": 0.28, "dynamic_sampling": True, "max_resamples": 2, "rollout_epochs": 2},
    "dr_grpo": {"num_samples": 8, "advantage": "dr_grpo", "loss_normalization": "constant"},
    "gspo": {"num_samples": 8, "loss_type": "gspo", "rollout_epochs": 2, "clip_low": 0.1, "clip_high": 0.1},
    "cispo": {"num_samples": 8, "loss_type": "cispo", "rollout_epochs": 2},
    "rloo": {"num_samples": 8, "advantage": "rloo", "kl_coef": 1e-3, "kl_in": "reward"},
    "reinforce_pp": {"num_samples": 1, "advantage": "reinforce_pp", "rollout_size": 12, "mini_batch_size": 12},
    "reinforce_pp_baseline": {"num_samples": 8, "advantage": "reinforce_pp_baseline", "kl_coef": 1e-3},
}


@pytest.mark.parametrize("method", LEARNS)
def test_learns_a_planted_reward(method, world, tmp_path):
    """From under a half of the largest reward to nine tenths of it: 8 tokens of even ids, and no EOS."""
    steps = 60 if method == "reinforce_pp" else 40
    settings = {"max_steps": steps, "learning_rate": 1e-2, "on_collapse": "warn", **LEARNS[method]}
    flags = flags_of(world, tmp_path / "run", **settings)  # what the guards call a collapse is what is planted here
    scores = [line["train/score"] for line in train(rlhf_grpo, flags).train_lines()]
    assert scores[0] < 0.5
    assert min(scores[-3:]) >= 0.9, scores


def test_every_step_logs_what_tells_health_from_a_hacked_reward(world, tmp_path):
    flags = flags_of(world, tmp_path / "run", max_steps=3, kl_coef=0.1, rollout_epochs=2, mini_batch_size=2)
    watched = train(rlhf_grpo, flags)
    names = """
        score score_std shaped_score reward_even response_length eos_rate perplexity kl_per_response kl_per_token
        kl_k3_per_token kl_in_loss equal_groups trained_groups policy_loss entropy clip_fraction clip_fraction_low
        clip_fraction_high ratio approx_kl grad_norm learning_rate
    """
    for line, experiences in zip(watched.train_lines(), watched.experiences, strict=True):
        assert {f"train/{name}" for name in names.split()} <= set(line)
        lengths = [len(e.response) for e in experiences]
        assert line["train/response_length"] == pytest.approx(sum(lengths) / 12)
        assert line["train/eos_rate"] == pytest.approx(sum(e.ended for e in experiences) / 12)
        assert line["train/score"] == pytest.approx(sum(e.score for e in experiences) / 12)
    assert abs(watched.train_lines()[0]["train/kl_per_token"]) <= 1e-5
    assert len(watched.gradients) == 3 * 2 * 2


def test_a_group_shares_its_prompt_and_its_responses_differ(world, tmp_path):
    """Twelve experiences of four prompts, three in a row each, in the order of the step's rows."""
    (experiences,) = train(rlhf_grpo, flags_of(world, tmp_path / "run")).experiences
    assert [e.position for e in experiences] == list(range(12))
    for g in range(4):
        members = experiences[3 * g : 3 * g + 3]
        assert all(torch.equal(e.prompt, members[0].prompt) for e in members)
        assert len({tuple(e.response.tolist()) for e in members}) > 1
    assert len({tuple(e.prompt.tolist()) for e in experiences}) == 4


def test_the_cut_of_a_step_changes_nothing(world, tmp_path):
    """C3: micro-batches of one group, of few tokens, and decoding two responses at a time."""
    given = {"max_steps": 2, "rollout_epochs": 2, "kl_coef": 0.1, "learning_rate": 1e-2}
    whole = train(rlhf_grpo, flags_of(world, tmp_path / "whole", **given))
    for i, cut in enumerate(({"micro_batch_size": 1}, {"micro_batch_tokens": 40, "rollout_mini_batch_size": 2})):
        parts = train(rlhf_grpo, flags_of(world, tmp_path / str(i), **given, **cut))
        for one, other in zip(whole.gradients, parts.gradients, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5 * one.abs().max().item())


def test_no_reference_is_loaded_for_nothing(world, tmp_path, monkeypatch):
    """kl_coef 0: one model in memory, no KL in the log; else two, and the first step's KL is 0."""
    loaded = []
    load = roles.load_policy
    monkeypatch.setattr(roles, "load_policy", lambda *a, **k: loaded.append(a) or load(*a, **k))
    without = train(rlhf_grpo, flags_of(world, tmp_path / "without"))
    assert len(loaded) == 1
    assert not any("kl_per" in name or "val/kl" in name for line in without.metrics for name in line)
    train(rlhf_grpo, flags_of(world, tmp_path / "with", kl_coef=0.1))
    assert len(loaded) == 3


def test_lora_keeps_one_copy_and_a_reference(world, tmp_path):
    given = {"finetune_mode": "lora", "lora_rank": 2, "kl_coef": 0.1, "max_steps": 3, "learning_rate": 0.05}
    lines = train(rlhf_grpo, flags_of(world, tmp_path / "run", **given)).train_lines()
    assert abs(lines[0]["train/kl_k3_per_token"]) <= 1e-5
    assert lines[2]["train/kl_k3_per_token"] > 1e-4


def start(world: World) -> dict[str, torch.Tensor]:
    return load_file(Path(world.sft) / "model.safetensors")


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.parametrize("changes", [{"dynamic_sampling": True}, {"dynamic_sampling": True, "max_resamples": 2}, {}])
def test_equal_rewards_teach_nothing(world, tmp_path, changes):
    """All rewards 0.1: the weights stay what they were, whether the groups are left out or have advantage 0; the
    rounds of sampling are bounded; every number is finite."""
    flags = flags_of(world, tmp_path / "run", reward=world.reward("same"), max_steps=2, **changes)
    watched = train(rlhf_grpo, flags)
    before, after = start(world), final(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(watched.experiences) == 2 * (1 + changes.get("max_resamples", 0))
    for line in watched.train_lines():
        assert line["train/equal_groups"] == 1
        assert line["train/trained_groups"] == (0 if changes else 4)
        assert all(v == v and abs(v) < float("inf") for v in line.values())


def test_dynamic_sampling_fills_the_places_with_other_prompts(world, tmp_path):
    """Two of three prompts have no spread: the groups left out are replaced by prompts not tried in this step, until
    four groups stay or the prompts are used up; each round has positions, and so noise, of its own."""
    flags = flags_of(
        world, tmp_path / "run", reward=world.reward("often_same"), dynamic_sampling=True, max_resamples=12,
        max_steps=3, num_samples=4,
    )  # fmt: skip
    watched = train(rlhf_grpo, flags)
    rounds = iter(watched.experiences)
    resampled = False
    for line in watched.train_lines():
        first = next(rounds)
        groups, sampled = [first[i : i + 4] for i in range(0, len(first), 4)], list(first)
        assert len(groups) == 4
        while sum(len({e.score for e in g}) > 1 for g in groups) < 4 and len(groups) < 12:
            missing = 4 - sum(len({e.score for e in g}) > 1 for g in groups)
            more = next(rounds)
            resampled = True
            assert len(more) == 4 * min(missing, 12 - len(groups))
            sampled += more
            groups += [more[i : i + 4] for i in range(0, len(more), 4)]
        assert [e.position for e in sampled] == list(range(len(sampled)))
        assert len({tuple(g[0].prompt.tolist()) for g in groups}) == len(groups)
        spread = sum(len({e.score for e in g}) > 1 for g in groups)
        assert line["train/trained_groups"] == spread <= 4
        assert line["train/equal_groups"] == pytest.approx(1 - spread / len(groups))
        assert line["train/score"] == pytest.approx(sum(e.score for e in sampled) / len(sampled))
    assert next(rounds, None) is None
    assert resampled


def test_masked_truncated_responses_teach_nothing(world, tmp_path):
    """One token a response, never EOS: all are cut, and with --mask_truncated none is learnt from."""
    sft = tmp_path / "endless"
    shutil.copytree(world.sft, sft)
    weights = start(world)
    weights["lm_head.bias"] = torch.full_like(weights["lm_head.bias"], 0.0)
    weights["lm_head.bias"][2] = -50.0
    save_file(weights, sft / "model.safetensors", metadata={"format": "pt"})
    for masked in (True, False):
        folder = tmp_path / str(masked)
        flags = flags_of(world, folder, sft_experiment_dir=str(sft), max_new_tokens=1, mask_truncated=masked)
        (line,) = train(rlhf_grpo, flags).train_lines()
        assert line["train/eos_rate"] == 0
        same = all(torch.equal(weights[name], value) for name, value in final(folder).items())
        assert same == masked


def test_overlong_penalty_is_a_reward_of_its_own(world, tmp_path):
    """DAPO's soft punishment, `overlong:4:8`, beside the planted reward: -1 for the longest, 0 up to 4 tokens."""
    flags = flags_of(world, tmp_path / "run", reward=[*world.reward("same"), "overlong:4:8"])
    (experiences,) = train(rlhf_grpo, flags).experiences
    for e in experiences:
        assert e.score == pytest.approx(0.1 - max(0, len(e.response) - 4) / 4)
    assert len({len(e.response) for e in experiences}) > 2


def test_process_rewards_count_as_their_sum(world, tmp_path):
    """A reward spread over tokens trains a group advantage exactly as its sum does."""
    one = train(rlhf_grpo, flags_of(world, tmp_path / "one"))
    other = train(rlhf_grpo, flags_of(world, tmp_path / "other", reward=world.reward("by_token")))
    torch.testing.assert_close(other.gradients[0], one.gradients[0], rtol=1e-4, atol=1e-7)


LONG = {
    "max_steps": 6,
    "rollout_epochs": 2,
    "mini_batch_size": 2,
    "kl_coef": 0.1,
    "learning_rate": 5e-3,
    "lr_schedule": "linear",
    "dynamic_sampling": True,
    "max_resamples": 1,
    "eval_interval": 2,
    "save_interval": 1,
    "keep_checkpoints": 0,
}


def test_resume_is_the_unbroken_run(world, tmp_path):
    """C4: killed after two of six steps, in the middle of a pass over the prompts, and resumed: bit-equal."""
    flags = flags_of(world, tmp_path / "run", reward=world.reward("often_same"), **LONG)
    train(rlhf_grpo, flags)
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run", folder, symlinks=True)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > 2:
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "final")
    (folder / "summary.json").unlink()
    train(rlhf_grpo, dataclasses.replace(flags, experiment_dir=str(folder), resume=True))
    one, other = final(tmp_path / "run"), final(folder)
    assert all(torch.equal(one[name], other[name]) for name in one)
    states = [
        torch.load(f / "checkpoints/step-00000005/optimizer.pt", weights_only=True)["state"]
        for f in (tmp_path / "run", folder)
    ]
    assert all(torch.equal(states[0][k][n], states[1][k][n]) for k in states[0] for n in states[0][k])
    lines = [
        [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in metrics_of(f)]
        for f in (tmp_path / "run", folder)
    ]
    assert lines[0] == lines[1]
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (folder / "samples.jsonl").read_text()


def test_samples_and_evaluations_are_kept(world, tmp_path):
    train(rlhf_grpo, flags_of(world, tmp_path / "run", eval_interval=1, max_steps=1))
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples if "score" in s} == {0, 1}
    lines = [line for line in metrics_of(tmp_path / "run") if "val/score" in line]
    assert [line["step"] for line in lines] == [0, 1]


def test_without_any_reward_it_says_so(world, tmp_path):
    with pytest.raises(UserError, match="--reward"):
        rlhf_grpo.main(flags_of(world, tmp_path / "run", reward=[]))
