"""Whole runs of rlhf_grpo.py against TRL 1.16.0, update by update.

The script samples and trains; TRL's trainer, whose generation and rewards are replaced by what the script sampled and
scored, trains on the same responses from the same weights. Compared are the gradient of every update and the weights
after the last one.

Where they differ, and what these runs do about it:
1. pi_old: TRL computes it anew after sampling, the script takes what the sampling pass said; equal to rounding.
2. Clip of CISPO: TRL's `epsilon_high` is the bound itself, 1 + clip_high here, and nothing is clipped from below.
3. KL in the loss: TRL multiplies it by the ratio unless told otherwise; here `--kl_unbiased` asks for that.
4. RLOO in TRL has one ratio for the whole response, and sums a response's tokens where the script divides by
   `--max_new_tokens`. On the first update all ratios are 1, and the gradients differ by that factor alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import rlhf_grpo
from tests.grpo import Watched, World, flags_of, make_world, train
from tests.peers import require_trl
from tests.splits import tokenizer_for

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

STEPS, PROMPTS, GROUP, LENGTH, RATE = 3, 4, 3, 8, 0.05
SHARED = {
    "max_steps": STEPS,
    "num_samples": GROUP,
    "max_new_tokens": LENGTH,
    "rollout_size": PROMPTS,
    "mini_batch_size": PROMPTS,
    "learning_rate": RATE,
    "optimizer": "sgd",  # Adam would blow up the rounding of gradients near 0
    "lr_schedule": "constant",
    "gradient_clip_val": 0.0,
}
TRL_SHARED = {
    "per_device_train_batch_size": PROMPTS * GROUP,
    "num_generations": GROUP,
    "max_completion_length": LENGTH,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1000,
    "seed": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    require_trl()
    return make_world(tmp_path_factory.mktemp("world"), num_train=PROMPTS * STEPS)


def train_in_trl(
    world: World, ours: Watched, folder: Path, *, rloo: bool = False, updates: int = STEPS, **settings: Any
) -> dict[str, list]:
    """TRL's trainer on the rollouts of `ours`; the gradients of its updates, its advantages, its last weights."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    rollouts = iter(ours.experiences)
    seen: dict[str, list] = {"gradients": [], "advantages": [], "weights": []}
    base = trl.RLOOTrainer if rloo else trl.GRPOTrainer
    config = trl.RLOOConfig if rloo else trl.GRPOConfig

    class Replayed(base):
        """The trainer on responses and scores that are given."""

        def _generate(self, prompts):
            self.replayed = next(rollouts)
            ids = [[getattr(e, name).tolist() for e in self.replayed] for name in ("prompt", "response")]
            texts = [""] * len(self.replayed)
            return (*ids, texts) if rloo else (*ids, None, texts, None, {}, None, None)

        def _calculate_rewards(self, *_):
            return torch.tensor([[e.score] for e in self.replayed])

        def _generate_and_score_completions(self, inputs):
            found = super()._generate_and_score_completions(inputs)
            seen["advantages"].append(found["advantages"].clone())
            return found

        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)

            def before(*_):
                seen["gradients"].append({n: p.grad.clone() for n, p in self.model.named_parameters()})

            optimizer.register_step_pre_hook(before)
            return optimizer

    model = AutoModelForCausalLM.from_pretrained(world.sft, dtype=torch.float32)
    trainer = Replayed(
        model=model,
        reward_funcs=lambda **_: None,
        args=config(output_dir=str(folder), max_steps=updates, **{**TRL_SHARED, **settings}),
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(PROMPTS * STEPS)]),
        processing_class=tokenizer_for(),
    )
    trainer.train()
    seen["weights"] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return seen


def flat(parameters: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([parameters[name].flatten() for name in names])


def names_of(world: World) -> list[str]:
    """The parameters in the order in which the script's optimiser has them: matrices, then what is never decayed."""
    from rlhf.experiment.optimizers import make_optimizer
    from rlhf.models.loading import load_policy

    flags = flags_of(world, "")
    policy = load_policy(world.sft, flags)
    by_id = {id(p): name for name, p in policy.model.named_parameters()}
    return [by_id[id(p)] for group in make_optimizer(policy, flags, 1.0).param_groups for p in group["params"]]


def assert_equal_runs(world: World, ours: Watched, theirs: dict[str, list]) -> None:
    names = names_of(world)
    assert len(ours.gradients) == len(theirs["gradients"])
    for step, (one, other) in enumerate(zip(ours.gradients, theirs["gradients"], strict=True)):
        gap = (one - flat(other, names)).norm() / one.norm()
        assert gap <= (1e-5 if step == 0 else 1e-4), f"update {step} differs by {gap:.1e} of the gradient"
    moved = (ours.weights[-1] - ours.weights[0]).norm()
    assert (ours.weights[-1] - flat(theirs["weights"], names)).norm() <= 1e-4 * moved


CASES = {
    "grpo": (
        {"loss_normalization": "sequence", "kl_coef": 0.04},
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    ),
    "dapo": (
        {"clip_high": 0.28},
        {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0},
    ),
    "bnpo": ({"kl_coef": 0.1}, {"loss_type": "bnpo", "beta": 0.1, "use_bias_correction_kl": False}),
    "unbiased_kl": ({"kl_coef": 1.0, "kl_unbiased": True}, {"loss_type": "dapo", "beta": 1.0}),
    "dr_grpo": (
        {"advantage": "dr_grpo", "loss_normalization": "constant"},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
    ),
    "gspo": (
        {"loss_type": "gspo", "clip_low": 0.02, "clip_high": 0.03},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.02,
            "epsilon_high": 0.03,
            "beta": 0.0,
        },
    ),
    "cispo": (
        {"loss_type": "cispo", "clip_high": 0.05},
        {"loss_type": "cispo", "epsilon_high": 1.05, "beta": 0.0},
    ),
    "truncated": (
        {"mask_truncated": True, "loss_normalization": "sequence"},
        {"mask_truncated_completions": True, "loss_type": "grpo", "beta": 0.0},
    ),
    "entropy": ({"entropy_coef": 0.1}, {"loss_type": "bnpo", "beta": 0.0, "entropy_coef": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_updates_a_rollout_in_trl(case, world, tmp_path):
    """Gradients of six updates, two on each rollout so that ratios leave 1 and clips bite, and the last weights."""
    given, theirs = CASES[case]
    ours = train(rlhf_grpo, flags_of(world, tmp_path / "run", **SHARED, **given, rollout_epochs=2))
    seen = train_in_trl(world, ours, tmp_path / "trl", updates=2 * STEPS, num_iterations=2, **theirs)
    assert_equal_runs(world, ours, seen)
    if case in ("gspo", "cispo"):
        assert max(line["train/clip_fraction"] for line in ours.train_lines()) > 0.05


def test_the_advantages_of_grpo_in_trl(world, tmp_path):
    """A_i to 1e-5, deviations of the group with TRL's divisor and epsilon."""
    ours = train(rlhf_grpo, flags_of(world, tmp_path / "run", **SHARED))
    theirs = train_in_trl(world, ours, tmp_path / "trl", beta=0.0)
    for experiences, advantages in zip(ours.experiences, theirs["advantages"], strict=True):
        scores = torch.tensor([e.score for e in experiences]).view(-1, GROUP)
        torch.testing.assert_close(rlhf_grpo.grpo_advantages(scores).flatten(), advantages, rtol=1e-5, atol=1e-5)


def test_rloo_in_trl(world, tmp_path):
    """Advantages with the KL in the reward, to 1e-5; the first update's gradient, up to the constant divisor."""
    given = {"advantage": "rloo", "loss_normalization": "constant", "kl_coef": 0.05, "kl_in": "reward"}
    found = []
    before = rlhf_grpo.advantages_of

    def watch(rollout, scores, flags):
        found.append((before(rollout, scores, flags), rollout.response_mask))
        return found[-1][0]

    rlhf_grpo.advantages_of = watch
    try:
        ours = train(rlhf_grpo, flags_of(world, tmp_path / "run", **{**SHARED, **given, "max_steps": 1}))
    finally:
        rlhf_grpo.advantages_of = before
    theirs = train_in_trl(world, ours, tmp_path / "trl", rloo=True, updates=1, beta=0.05, normalize_advantages=False)
    (((advantages, _), mask),) = found
    of_responses = torch.where(mask.any(1), advantages[:, 0], 0.0)
    torch.testing.assert_close(of_responses, theirs["advantages"][0], rtol=1e-5, atol=1e-5)
    gradient = flat(theirs["gradients"][0], names_of(world))
    torch.testing.assert_close(ours.gradients[0] * LENGTH, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
