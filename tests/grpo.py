"""A tiny world for GRPO and online DPO: prompts, a policy, a planted reward, and a watch on what runs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.experience import Experience
from rlhf.experiment.steps import Step
from rlhf.rlhf_grpo import GRPOFlags
from tests.splits import make_data, metrics_of, quick_flags, tokenizer_for
from tests.tiny import make_model

REWARDS = '''
def even(prompts, responses, rows):
    """Even ids among the response's, ids below 10 (EOS and the like) left out, over the longest response's 8."""
    return [sum(i % 2 == 0 and i >= 10 for i in row["response_ids"]) / 8 for row in rows]


def same(prompts, responses, rows):
    return [0.1] * len(rows)


def often_same(prompts, responses, rows):
    """`even`, but 0 for the prompts of two rows of three."""
    return [score * (row["row"] % 3 == 0) for row, score in zip(rows, even(prompts, responses, rows))]


def by_token(prompts, responses, rows):
    """The same, an eighth at each such token."""
    return [[float(i % 2 == 0 and i >= 10) / 8 for i in row["response_ids"]] for row in rows]


def distinct(prompts, responses, rows):
    """`even`, and a millionth of the sum of the ids, so that no two responses score the same."""
    return [score + 1e-6 * sum(row["response_ids"]) for row, score in zip(rows, even(prompts, responses, rows))]


def judge(prompts, first, second, rows):
    """The response with more spaces is better; with as many, neither."""
    return [-1 if a.count(" ") == b.count(" ") else int(b.count(" ") > a.count(" ")) for a, b in zip(first, second)]


def broken_judge(prompts, first, second, rows):
    raise KeyError("no verdict")


def undecided_judge(prompts, first, second, rows):
    return [0.5] * len(rows)
'''


@dataclass
class World:
    """Paths of the data, of a policy that ends some of its answers, and of the file with the rewards."""

    data: str
    sft: str
    rewards: str

    def reward(self, name: str) -> list[str]:
        return [f"function:{self.rewards}:{name}"]


def make_world(folder: Path, *, num_train: int = 12) -> World:
    """A Phi with two layers, which ends about half of its answers, and data of `num_train` prompts."""
    tokenizer = tokenizer_for()
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    policy = make_model("phi", **ids)
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.5)
        policy.lm_head.bias[tokenizer.eos_token_id] = 3.0
    policy.save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    (folder / "my_rewards.py").write_text(REWARDS, encoding="utf-8")
    return World(make_data(folder / "data", num_train=num_train), str(folder / "sft"), str(folder / "my_rewards.py"))


def flags_of(world: World, folder: Path | str, **changes: Any) -> GRPOFlags:
    """Small flags: a step of 4 prompts with 3 responses of at most 8 tokens; no evaluation, no saving."""
    settings = {
        "sft_experiment_dir": world.sft,
        "reward": world.reward("even"),
        "num_samples": 3,
        "rollout_size": 4,
        "max_new_tokens": 8,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "eval_iters": 1,
    }
    return quick_flags(GRPOFlags, world.data, Path(folder), **{**settings, **changes})


@dataclass
class Watched:
    """What a run did: its metrics, all that it sampled, and the gradient and weights around each optimiser step."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    experiences: list[list[Experience]] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def train_lines(self) -> list[dict[str, float]]:
        return [line for line in self.metrics if "train/score" in line]


@contextmanager
def _patched(owner: Any, name: str, value: Any):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def train(script: Any, flags: Any) -> Watched:
    """Run `script.main(flags)`, watching what it collects for training and every optimiser step."""
    watched = Watched()
    collect, update = script.collect, Step.update

    def watch_collect(*args, **options):
        watched.experiences.append(collect(*args, **options))
        return watched.experiences[-1]

    def watch_update(self, optimizer, **options):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        watched.gradients.append(torch.cat([g.flatten() for g in gradients]))
        done = update(self, optimizer, **options)
        watched.weights.append(torch.cat([p.detach().flatten().clone() for p in parameters]))
        return done

    with _patched(script, "collect", watch_collect), _patched(Step, "update", watch_update):
        script.main(flags)
    watched.metrics = metrics_of(flags.experiment_dir)
    return watched
