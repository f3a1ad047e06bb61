"""PPO against TRL 1.12.0, the last release that has it: the same rollouts go through both training loops.

Both run whole, `rlhf_ppo.main` in process and `PPOTrainer.train` in a process of its own (tests/trl_ppo.py), over three
updates of two epochs: from the second update on the policy has left the reference, so that there is a KL, and the
ratio has left 1. Each response is given; its log-probabilities, values and scores are each side's own. Compared to
1e-5: log-probabilities, values, scores, KL, token rewards, advantages, returns, both losses of every optimiser step,
what is clipped, and the means that are logged.

Deviations, and what is done about them here:
1. Whitening: TRL divides by the sample variance (n - 1), this project by the population's, as Huang et al. 2024 do:
   advantages and policy loss differ by the factor sqrt((n - 1) / n), which is checked. For the rest of the
   comparison TRL's `masked_var` gets `unbiased=False`.
2. Cutting: TRL's loss is the mean of its micro-batches' means, and its optimiser steps once in
   `gradient_accumulation_steps` micro-batches, be that within a mini-batch or over several. Here each mini-batch is
   one step, over one mean. TRL is given one micro-batch a mini-batch.
3. Logged `approxkl`, `ratio` and `entropy`: TRL's are means over all columns, padding included, where the first adds
   0, the second 1 and the third what the model says after a padding token. Ours are over real tokens. Compared with
   the columns added (the first two), and on rollouts without padding (all three).
4. Logged means over an update: TRL weighs mini-batches alike, this project tokens alike. Steps are compared one by one.
5. Logged `objective/kl` is of the estimator that the reward uses; `train/kl_per_response` is always k1.
6. Temperature: TRL divides by T + 1e-7.
7. Columns: TRL has as many as the longest response of the rollout, so a longest response that ended has no end state;
   this project has `--max_new_tokens`. The rollouts here are that long in both.
8. Missing EOS: TRL subtracts a penalty; the default here replaces the score. Compared with `--missing_eos=subtract`.
9. Scores: TRL's are raw; ours are normalised by the moments in the reward model's configuration (none here).
10. Critic: the head here has a bias. TRL's value model is given one with a bias, too.
11. Optimisers: TRL has one for policy and critic, and never clips a gradient; here there are two, and they are not
    clipped (`--gradient_clip_val=0`), so Adam makes the same steps.
12. The log-ratio is clamped to +-20 here, which no ratio comes near.
13. Order: TRL shuffles prompts and rows, and leaves out rows that don't fill a rollout. Both take them in file order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import experience, rlhf_ppo
from rlhf.data.prompts import load_prompts
from rlhf.experience import Rollout, Targets
from rlhf.rollouts import Samples
from rlhf.trees.forest import Forest, Tree
from tests.peers import ROOT, TRL_WITH_PPO, require_trl_with_ppo
from tests.splits import make_data, make_model_dir, tokenizer_for

TOLERANCE = 1e-5
WIDTH = 8
UPDATES = 3

pytestmark = pytest.mark.peer


@dataclass
class Ours:
    """What a run here computed: a dict an update, and one an optimiser step."""

    updates: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)


def draw_responses(num: int, seed: int, *, full: bool = False) -> list[list[int]]:
    """Responses with EOS at their first place, in the middle, at the end, or nowhere; `full`: none is short."""
    tokenizer = tokenizer_for()
    eos, low = tokenizer.eos_token_id, len(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    lengths = [WIDTH] * num if full else [1, 4, WIDTH, WIDTH - 1, 2, WIDTH, 6, WIDTH, WIDTH - 1, 3, WIDTH, 5][:num]
    responses = []
    for i, length in enumerate(lengths):
        ids = torch.randint(low, len(tokenizer), (length,), generator=generator).tolist()
        if length < WIDTH or i % 3 == 0:
            ids[-1] = eos
        responses.append(ids)
    return responses


def train_here(flags: dict[str, Any], responses: list[list[list[int]]], monkeypatch) -> Ours:
    """Run `rlhf_ppo.main` on given responses, noting what passes through its functions."""
    ours, rollouts = Ours(), iter(responses)

    def generate(policy, prompts, sampling, **_):
        ids = [torch.tensor(response) for response in next(rollouts)]
        forest = Forest([Tree.of(p, r) for p, r in zip(prompts, ids, strict=True)])
        with torch.no_grad():
            logps, _ = policy(forest, temperature=sampling.temperature)
        ended = torch.tensor([int(i[-1]) in sampling.stop_ids for i in ids])
        return Samples(ids, list(logps.split([len(i) for i in ids])), ended)

    def watch(module, name, note):
        function = getattr(module, name)

        def watched(*args, **kwargs):
            out = function(*args, **kwargs)
            note(args, out)
            return out

        monkeypatch.setattr(module, name, watched)

    def note_gae(args, out):
        ours.updates.append({"rewards": args[0], "raw_advantages": out[0] * 1.0})

    def note_targets(args, targets: Targets):
        rollout: Rollout = args[0]
        ours.updates[-1].update(
            mask=rollout.response_mask,
            value_mask=targets.value_mask,
            scores=args[1],
            logprobs=rollout.old_logps,
            ref_logprobs=rollout.ref_logps,
            values=rollout.values,
            kl=targets.token_kl,
            advantages=targets.advantages,
            returns=targets.returns,
        )

    def note_policy_loss(args, losses):
        new, old = args[0].detach(), args[1]
        ratio = (new - old).exp().mean().item()
        ours.steps[-1].update(tokens=len(new), pg_loss=losses.mean().item(), ratio=ratio)

    monkeypatch.setattr(experience, "generate", generate)
    watch(rlhf_ppo, "gae", note_gae)
    watch(rlhf_ppo, "targets_of", note_targets)
    watch(rlhf_ppo, "ppo_policy_loss", note_policy_loss)
    watch(rlhf_ppo, "kl_k2", lambda _, x: ours.steps[-1].update(approxkl=x.mean().item()))
    watch(rlhf_ppo, "policy_clipped", lambda _, x: ours.steps[-1].update(pg_clipfrac=x.mean().item()))
    watch(rlhf_ppo, "ppo_value_loss", lambda _, x: ours.steps.append({"vf_loss": x.mean().item()}))  # comes first
    watch(rlhf_ppo, "value_clipped", lambda _, x: ours.steps[-1].update(vf_clipfrac=x.mean().item()))
    rlhf_ppo.main(rlhf_ppo.PPOFlags(**flags))
    lines = (Path(flags["experiment_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [line for line in map(json.loads, lines) if "train/score" in line]
    for update, line in zip(ours.updates, logged, strict=True):
        update["metrics"] = line
    return ours


def train_in_trl(folder: Path, request: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Run TRL's trainer in its own process on the same responses."""
    torch.save(request, folder / "request.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.trl_ppo", str(folder / "request.pt"), str(folder / "answer.pt")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(TRL_WITH_PPO), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "answer.pt", weights_only=True)


def same(name: str, ours: Tensor | float, theirs: Tensor | float, mask: Tensor | None = None) -> None:
    """Equal to `TOLERANCE`, where the mask counts."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    gap = (ours.double() - theirs.double()).abs().max().item()
    assert gap <= TOLERANCE, f"{name}: {gap:.1e} apart"


def compare(tmp_path: Path, monkeypatch, architecture: str, responses: list, ours: dict, theirs: dict) -> tuple:
    """Run both, and compare all that the two define alike; what they computed."""
    num = len(responses[0])
    data = make_data(tmp_path / "data", num_train=num, num_validation=0)
    policy = make_model_dir(tmp_path / "policy", architecture)
    reward = make_model_dir(tmp_path / "reward", architecture, scorer=True, seed=1)
    prompts = load_prompts(data, "train", tokenizer_for())
    mine = train_here(
        {
            "data_dir": data,
            "sft_experiment_dir": policy,
            "rm_experiment_dir": reward,
            "experiment_dir": str(tmp_path / "run"),
            "shuffle": False,
            "rollout_size": num,
            "rollout_mini_batch_size": num,
            "micro_batch_size": num,
            "epochs": UPDATES,
            "ppo_epochs": 2,
            "max_new_tokens": WIDTH,
            "missing_eos": "subtract",
            "gradient_clip_val": 0.0,
            "eval_interval": 0,
            "save_interval": 0,
            "logger": "none",
            "accelerator": "cpu",
            "devices": "1",
            "precision": "32-true",
            **ours,
        },
        responses,
        monkeypatch,
    )
    other = train_in_trl(
        tmp_path,
        {
            "policy": policy,
            "reward": reward,
            "prompts": [prompts.prompt(i).tolist() for i in range(num)],
            "responses": responses,
            "settings": {"num_ppo_epochs": 2, "response_length": WIDTH, "adam_epsilon": 1e-5, **theirs},
        },
    )
    assert len(mine.updates) == len(other["updates"]) == UPDATES
    for a, b in zip(mine.updates, other["updates"], strict=True):
        compare_rollouts(a, b)
    assert len(mine.steps) == len(other["steps"])
    for a, b in zip(mine.steps, other["steps"], strict=True):
        columns = len(b["micro_batch_inds"]) * WIDTH
        for name in ("pg_loss", "vf_loss", "pg_clipfrac", "vf_clipfrac"):
            same(name, a[name], b[name])
        same("approxkl", a["approxkl"] * a["tokens"] / columns, b["approxkl"])
        same("ratio", (a["ratio"] - 1) * a["tokens"] / columns, b["ratio"] - 1)
    return mine, other


def compare_rollouts(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """One update's rollout and what is made of it, then the means that both log of it."""
    mask, value_mask = ours["mask"], ours["value_mask"]
    assert mask.equal(~theirs["padding_mask"])
    assert value_mask.equal(~theirs["padding_mask_p1"])
    same("scores", ours["scores"], theirs["scores"])
    for name in ("logprobs", "ref_logprobs", "kl", "raw_advantages", "advantages"):
        same(name, ours[name], theirs[name], mask)
    for name in ("values", "rewards", "returns"):
        same(name, ours[name], theirs[name], value_mask)
    mine, other = ours["metrics"], theirs["metrics"]
    same("logged score", mine["train/shaped_score"], other["objective/scores"])
    same("logged penalty", -mine["train/kl_penalty"], other["objective/non_score_reward"])
    same("logged reward", mine["train/reward"], other["objective/rlhf_reward"])
    same("rate", mine["train/actor_learning_rate"], other["lr"])


def test_ppo_in_trl(tmp_path, monkeypatch):
    """Rotary positions, unequal responses, k1, two mini-batches.

    K1, K2, K7; G1, G2, G3; L1, L2, L4, L6, L8; P5, P10, P11, P12.
    """
    require_trl_with_ppo()
    responses = [draw_responses(10, seed) for seed in range(UPDATES)]
    learning_rate, coef = 5e-4, 0.2

    ours, theirs = compare(
        tmp_path,
        monkeypatch,
        "llama",
        responses,
        {
            "mini_batch_size": 5,
            "actor_learning_rate": learning_rate,
            "critic_learning_rate": learning_rate,
            "temperature": 0.7,
            "init_kl_coeff": coef,
            "missing_eos_value": 1.5,
        },
        {
            "num_mini_batches": 2,
            "learning_rate": learning_rate,
            "temperature": 0.7,
            "kl_coef": coef,
            "missing_eos_penalty": 1.5,
        },
    )

    for mine, other in zip(ours.updates, theirs["updates"], strict=True):
        same("logged KL", mine["metrics"]["train/kl_per_response"], other["metrics"]["objective/kl"])
        num = int(mine["mask"].sum())
        factor = ((num - 1) / num) ** 0.5
        same("TRL's whitening", mine["advantages"] * factor, other["as_trl_whitens"], mine["mask"])
    assert ours.updates[-1]["metrics"]["train/kl_k3_per_token"] > 0.01, "the policy hardly moved"
    assert max(step["pg_clipfrac"] for step in ours.steps) > 0.1
    assert max(step["vf_clipfrac"] for step in ours.steps) > 0.1


def test_ppo_in_trl_with_whitened_rewards(tmp_path, monkeypatch):
    """K4, K6, W2: absolute positions, k3, a discount; the last rollout has no padding, so that all means agree."""
    require_trl_with_ppo()
    responses = [draw_responses(9, seed, full=seed == UPDATES - 1) for seed in range(UPDATES)]
    shared = {"whiten_rewards": True, "kl_estimator": "k3", "temperature": 1.0}
    learning_rate = 1e-3

    ours, theirs = compare(
        tmp_path,
        monkeypatch,
        "gpt2",
        responses,
        {
            **shared,
            "mini_batch_size": 9,
            "actor_learning_rate": learning_rate,
            "critic_learning_rate": learning_rate,
            "init_kl_coeff": 0.3,
            "missing_eos_value": 0.5,
            "gae_gamma": 0.97,
            "gae_lambd": 0.9,
            "clip_coeff": 0.02,
            "value_clip_coeff": 0.05,
        },
        {
            **shared,
            "learning_rate": learning_rate,
            "kl_coef": 0.3,
            "missing_eos_penalty": 0.5,
            "gamma": 0.97,
            "lam": 0.9,
            "cliprange": 0.02,
            "cliprange_value": 0.05,
        },
    )

    mine, other = ours.updates[-1]["metrics"], theirs["updates"][-1]["metrics"]
    for name, peer_name in (
        ("policy_loss", "loss/policy_avg"),
        ("value_loss", "loss/value_avg"),
        ("clip_fraction", "policy/clipfrac_avg"),
        ("value_clip_fraction", "val/clipfrac_avg"),
        ("approx_kl", "policy/approxkl_avg"),
        ("entropy", "policy/entropy_avg"),
        ("ratio", "val/ratio"),
    ):
        same(f"logged {name}", mine[f"train/{name}"], other[peer_name])
    same("logged KL", mine["train/kl_k3_per_token"] * WIDTH, other["objective/kl"])
    assert mine["train/kl_k3_per_token"] > 0.01, "the policy hardly moved"
    assert mine["train/clip_fraction"] > 0.1
