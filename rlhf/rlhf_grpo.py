"""GRPO and its relatives: sample a group of responses to each prompt, and learn from what sets them apart.

    A_i  = (r_i - mean(r)) / std(r)                                         (--advantage)
    loss = sum_i w_i * sum_t [max(-A_i * ratio_it, -A_i * clip(ratio_it, 1 - low, 1 + high)) + beta * kl_it]
    ratio_it = pi(y_it) / pi_old(y_it)                                      (--loss_type, --loss_normalization)

No critic: the group is the baseline. The group's prompt is one trunk, its responses are the branches, so a prompt goes
through the model once.

| method | flags |
|---|---|
| GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3) | `--loss_normalization=sequence --kl_coef=0.04` |
| Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) | `--advantage=dr_grpo --loss_normalization=constant` |
| DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 8) | `--clip_high=0.28 --dynamic_sampling=True --max_resamples=3`, and |
| | `--mask_truncated=True` or `--reward ... overlong:FROM:TO` |
| GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 5) | `--loss_type=gspo` |
| CISPO (MiniMax 2025, arXiv 2506.13585, eq. 4) | `--loss_type=cispo` |
| RLOO (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8) | `--advantage=rloo --loss_normalization=constant` |
| | `--kl_coef=0.05 --kl_in=reward` |
| REINFORCE++ (Hu et al. 2025, arXiv 2501.03262) | `--advantage=reinforce_pp --num_samples=1`, or |
| | `--advantage=reinforce_pp_baseline` in groups |

Deviations: (1) the weights are those of the whole optimiser step on all devices (`response_weights`), whatever the
micro-batches. (2) pi_old is what the sampling pass said. (3) The log-ratio is clamped to +-20 before the exponential.
(4) RLOO's ratio and KL are per token, and its sum over a response is divided by `--max_new_tokens`, a constant.
(5) A response without EOS is judged like any other unless `--missing_eos_penalty` or `--mask_truncated` is set.
(6) Where rewards are given to tokens, the group advantages compare the sums of whole responses; REINFORCE++ takes each
token's own.

CPU: python rlhf/rlhf_grpo.py --data_dir=data/arithmetic --sft_experiment_dir=experiments/runs/sft --reward numeric \
     --num_samples=8 --rollout_size=8 --max_new_tokens=32 --max_steps=50
GPU: fabric run --accelerator=cuda --devices=8 --strategy=ddp rlhf/rlhf_grpo.py --data_dir=data/arithmetic \
     --sft_experiment_dir=experiments/runs/sft --reward numeric --rollout_size=32 --mini_batch_size=32
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rlhf.advantages import token_rewards
from rlhf.data.prompts import Prompts
from rlhf.errors import NonFiniteError, UserError
from rlhf.experience import Experience, Rollout, check_finite, collect, penalised_scores, stack
from rlhf.experiment.optimizers import make_optimizer
from rlhf.experiment.preflight import Pass, check_memory, rollout_bytes, trial_forest
from rlhf.experiment.run import Run
from rlhf.experiment.start import start_experiment
from rlhf.experiment.steps import Step
from rlhf.flags import (
    BatchFlags,
    DataFlags,
    DeviceFlags,
    GenerationFlags,
    ModelFlags,
    OptimizerFlags,
    RewardFlags,
    RunFlags,
    check_on_policy,
    launch,
)
from rlhf.group_advantages import (
    Normalization,
    dr_grpo_advantages,
    group_means,
    grpo_advantages,
    reinforce_pp_advantages,
    response_weights,
    rloo_advantages,
    without_spread,
)
from rlhf.guards import GuardFlags, Guards
from rlhf.kl import KL_ESTIMATORS, kl_k2
from rlhf.losses.policy_gradient import cispo_loss, grpo_loss, gspo_loss, policy_clipped, response_log_ratios
from rlhf.models.loading import check_kind, resolve, tokenizer_of
from rlhf.models.roles import Roles, load_actor
from rlhf.monitoring import assess_policy, check_first_rollout, measure_samples
from rlhf.rewards.mix import Rewards, check_rewards, load_rewards
from rlhf.seeds import seed_of_step
from rlhf.trees.batches import epoch_order, rollout_sizes
from rlhf.trees.forest import Forest, Tree

MAX_LOG_RATIO = 20.0
GROUP_ADVANTAGES = {"grpo": grpo_advantages, "dr_grpo": dr_grpo_advantages, "rloo": rloo_advantages}
CLIPS = {"grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
"""Low and high of each `--loss_type` where `--clip_low` and `--clip_high` are not set."""


@dataclass(kw_only=True)
class GRPOFlags(
    DataFlags,
    ModelFlags,
    RewardFlags,
    BatchFlags,
    OptimizerFlags,
    GenerationFlags,
    GuardFlags,
    RunFlags,
    DeviceFlags,
):
    """GRPO and its relatives."""

    sft_experiment_dir: str | None = None
    """Experiment (or model) that the policy starts from, and that the reference stays at; else --model_name."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    num_samples: int = 8
    """G: responses to each prompt."""
    rollout_size: int = 8
    """Prompts of one step on one device, each with --num_samples responses; a multiple of --mini_batch_size, which
    counts prompts too, as --micro_batch_size does."""
    rollout_mini_batch_size: int = 64
    """Responses that are decoded at once."""
    rollout_epochs: int = 1
    """Passes over the rollout in one step, each in a new order."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "grpo"
    """What a response is compared with: its group's mean, in deviations (grpo) or not (dr_grpo), the others of its
    group (rloo), or all tokens of the rollout, with its group's mean taken off (reinforce_pp_baseline) or not."""
    loss_type: Literal["grpo", "gspo", "cispo"] = "grpo"
    """Clipped ratio of each token (GRPO), of the whole response (GSPO), or as a detached weight (CISPO)."""
    loss_normalization: Literal["token", "sequence", "constant"] | None = None
    """Every token counts alike (DAPO), or every response (GRPO), or a constant divides (Dr. GRPO); token unless set,
    sequence with --loss_type=gspo."""
    clip_low: float | None = None
    """The ratio's room below 1; 0.2 unless set (gspo: 3e-4; cispo: 1, no bound)."""
    clip_high: float | None = None
    """The ratio's room above 1; 0.2 unless set (gspo: 4e-4; cispo: 4). DAPO: 0.28."""
    kl_coef: float = 0.0
    """beta: weight of the KL to the reference; 0: no reference is loaded."""
    kl_in: Literal["loss", "reward"] | None = None
    """Where the KL stands: in the loss of each token, or in the reward. loss unless set."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of each token's KL; k3 in the loss and k1 in the reward unless set."""
    kl_unbiased: bool = False
    """Multiply the loss's KL by the token's ratio: its gradient is then that of the KL (DeepSeek-V3.2, 2512.02556)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    missing_eos_penalty: float = 0.0
    """Taken off the reward of a response without EOS."""
    mask_truncated: bool = False
    """Leave responses without EOS out of the loss (DAPO's overlong filtering); the group still counts their rewards."""
    dynamic_sampling: bool = False
    """Leave out groups whose rewards, before any KL, are all equal (DAPO)."""
    max_resamples: int = 0
    """With --dynamic_sampling: times in a step that other prompts are sampled in the place of the groups left out."""
    eval_temperature: float = 0.01
    """Temperature at evaluations: near-greedy."""
    on_collapse: Literal["stop", "warn"] = "warn"
    """Once a guard has fired --guard_patience times in a row: warn, and go on, the last checkpoint from before being
    kept besides; or end the run with status 3 (take that with a reward model, which can be hacked)."""
    disable_dropout: bool = True
    """GRPO needs one distribution for sampling and training: dropout stays off."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls: not at all, or to 0 along a line or a cosine, a step at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_on_policy(self, "GRPO")
        if self.num_samples == 1 and self.advantage != "reinforce_pp":
            raise UserError(
                f"--advantage={self.advantage} compares the responses to one prompt: --num_samples must be 2 or more "
                f"(or take --advantage=reinforce_pp)"
            )
        if not self.kl_coef and (self.kl_in or self.kl_estimator):
            raise UserError("--kl_in and --kl_estimator have no meaning without --kl_coef; set it above 0")
        if self.kl_unbiased and (self.kl_in == "reward" or not self.kl_coef):
            raise UserError("--kl_unbiased has no meaning without a KL in the loss; set --kl_coef and --kl_in=loss")
        if self.kl_in != "reward" and self.kl_estimator == "k1" and not self.kl_unbiased:
            raise UserError(
                "--kl_estimator=k1 in the loss has a gradient of 0 on average; take k2 or k3, --kl_unbiased=True or "
                "--kl_in=reward"
            )
        if self.loss_type == "gspo" and self.normalization != "sequence":
            raise UserError(
                f"--loss_normalization={self.normalization} would weight GSPO's responses by their lengths; leave it "
                f"out, or take sequence"
            )
        if self.max_resamples and not self.dynamic_sampling:
            raise UserError("--max_resamples has no meaning without --dynamic_sampling=True; set that too")
        if self.dynamic_sampling and self.advantage == "reinforce_pp":
            raise UserError(
                "--advantage=reinforce_pp learns from groups of equal rewards too; leave --dynamic_sampling=False, or "
                "take reinforce_pp_baseline"
            )

    @property
    def normalization(self) -> Normalization:
        return self.loss_normalization or ("sequence" if self.loss_type == "gspo" else "token")

    @property
    def clips(self) -> dict[str, float]:
        low, high = CLIPS[self.loss_type]
        low = low if self.clip_low is None else self.clip_low
        return {"clip_low": low, "clip_high": high if self.clip_high is None else self.clip_high}


@dataclass
class Batch:
    """A packed micro-batch of B responses, each of at most T tokens; (B, T) tensors but for `weights`, (B,)."""

    forest: Forest
    old_logps: Tensor
    ref_logps: Tensor | None
    advantages: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> None:
        for name, value in vars(self).items():
            if value is not None:
                setattr(self, name, value.to(device))


def sample_groups(
    run: Run, flags: GRPOFlags, roles: Roles, rewards: Rewards, prompts: Prompts, step: Step
) -> tuple[list[Experience], list[int]]:
    """Groups of the step's prompts, and which of them to train on.

    Returns:
        The experiences of all groups, `num_samples` a group; and the numbers of the groups that stay: all, or with
        `--dynamic_sampling` those whose rewards differ. With `--max_resamples` the places of the others go to prompts
        that the step has not tried, in an order of the seed and the step alone, until all places are taken, the
        rounds or the prompts are used up.
    """
    num, wanted, rows = flags.num_samples, len(step.global_rows), step.global_rows
    others: list[int] = []
    if flags.max_resamples:
        seed, tried = seed_of_step(flags.seed, run.step_index, "prompts in the place of others"), set(rows)
        order = epoch_order(len(prompts), seed=seed, epoch=0, shuffle=True)
        others = [i for i in order.tolist() if i not in tried]
    experiences: list[Experience] = []
    kept: list[int] = []
    for _ in range(1 + flags.max_resamples):
        first = len(experiences) // num
        found = collect(run, flags, roles, rewards, prompts, rows, flags.temperature, num_samples=num, first=first)
        equal = without_spread(penalised_scores(found, flags.missing_eos_penalty).view(-1, num))
        experiences += found
        kept += [first + g for g in range(len(rows)) if not (flags.dynamic_sampling and equal[g])]
        missing = wanted - len(kept)
        rows, others = others[:missing], others[missing:]
        if not rows:
            break
    return experiences, kept


def advantages_of(rollout: Rollout, scores: Tensor, flags: GRPOFlags) -> tuple[Tensor, Tensor]:
    """The (N, L) advantages of a rollout's tokens, 0 behind their ends, and the (N, L) KL that their reward is charged.

    Args:
        rollout: N responses, those of a group together; scores: (N,) `penalised_scores`.
    """
    mask, by_group = rollout.response_mask, (-1, flags.num_samples)
    token_kl = torch.zeros_like(rollout.old_logps)
    if flags.kl_coef and flags.kl_in == "reward":
        token_kl = KL_ESTIMATORS[flags.kl_estimator or "k1"](rollout.old_logps, rollout.ref_logps)
    if flags.advantage in GROUP_ADVANTAGES:
        rewards = scores - flags.kl_coef * (token_kl * mask).sum(1)
        of_responses = GROUP_ADVANTAGES[flags.advantage](rewards.view(by_group)).flatten()
        return of_responses[:, None] * mask, token_kl
    if flags.advantage == "reinforce_pp_baseline":
        scores = (scores.view(by_group) - group_means(scores.view(by_group))).flatten().float()
    rewards = token_rewards(scores, token_kl, mask, flags.kl_coef, process_rewards=rollout.process_rewards)
    return reinforce_pp_advantages(rewards, mask), token_kl


def weights_of(rollout: Rollout, responses: list[int], flags: GRPOFlags) -> Tensor:
    """(N,) weights of the responses of one optimiser step in its loss; 0 for those that are not among them."""
    mask = rollout.response_mask[responses]
    counted = rollout.ended[responses] | (not flags.mask_truncated)
    weights = torch.zeros(len(rollout.ended))
    weights[responses] = response_weights(
        mask.sum(1), counted, normalization=flags.normalization, max_length=flags.max_new_tokens
    )
    return weights


def responses_of(groups: list[int], num_samples: int) -> list[int]:
    """The places of the responses of these groups.

    >>> responses_of([2, 0], 3)
    [6, 7, 8, 0, 1, 2]
    """
    return [g * num_samples + j for g in groups for j in range(num_samples)]


def pack(
    experiences: list[Experience], rollout: Rollout, advantages: Tensor, weights: Tensor, num_samples: int,
    groups: list[int],
) -> Batch:  # fmt: skip
    """The micro-batch of these groups of the rollout: a tree each."""
    chosen = responses_of(groups, num_samples)
    trees = []
    for g in groups:
        members = experiences[g * num_samples : (g + 1) * num_samples]
        trees.append(Tree.of(members[0].prompt, *(e.response for e in members)))
    forest = Forest(trees)
    width = forest.target_mask.shape[1]
    ref_logps = None if rollout.ref_logps is None else rollout.ref_logps[chosen, :width]
    return Batch(forest, rollout.old_logps[chosen, :width], ref_logps, advantages[chosen, :width], weights[chosen])


def policy_loss(actor: torch.nn.Module, batch: Batch, flags: GRPOFlags, step: Step) -> Tensor:
    """The weighted sum of a micro-batch's token losses; what it shows goes into the metrics."""
    forest, mask, old_logps = batch.forest, batch.forest.target_mask, batch.old_logps
    token_logps, entropies = actor(forest, temperature=flags.temperature, entropy=True)
    step.watch("log-probabilities", token_logps, forest)
    log_ratios = (forest.dense(token_logps) - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    logps, entropies = old_logps + log_ratios, forest.dense(entropies)
    if flags.loss_type == "gspo":
        losses = gspo_loss(logps, old_logps, batch.advantages, mask, **flags.clips)
        held = policy_clipped(response_log_ratios(logps, old_logps, mask), batch.advantages, **flags.clips)
    else:
        token_loss = cispo_loss if flags.loss_type == "cispo" else grpo_loss
        losses = token_loss(logps, old_logps, batch.advantages, **flags.clips)
        held = policy_clipped(log_ratios, batch.advantages, **flags.clips)
    shown = {
        "train/policy_loss": losses,
        "train/entropy": entropies,
        "train/clip_fraction": held,
        "train/clip_fraction_low": held * (batch.advantages < 0),
        "train/clip_fraction_high": held * (batch.advantages > 0),
        "train/ratio": log_ratios.exp(),
        "train/approx_kl": kl_k2(logps, old_logps),
    }
    if flags.kl_coef and flags.kl_in != "reward":
        token_kl = KL_ESTIMATORS[flags.kl_estimator or "k3"](logps, batch.ref_logps)
        shown["train/kl_in_loss"] = token_kl
        losses = losses + flags.kl_coef * (token_kl * log_ratios.exp() if flags.kl_unbiased else token_kl)
    if flags.entropy_coef:
        losses = losses - flags.entropy_coef * entropies
    for name, values in shown.items():
        step.metrics.mean(name, values[mask], step.weight)
    return (losses * mask * batch.weights[:, None]).sum()


def main(flags: GRPOFlags) -> dict:
    """Train; returns the last evaluation and the experiment folder."""
    run = start_experiment(flags, "rlhf_grpo")
    name = "sft_experiment_dir" if flags.sft_experiment_dir else "model_name"
    sft = resolve(getattr(flags, name), name)
    check_kind(sft, flags)
    judges = check_rewards(flags)
    tokenizer = tokenizer_of(sft, flags)
    prompts = run.load_prompts("train", tokenizer)
    validation = run.load_prompts("validation", tokenizer)
    roles = load_actor(sft, flags, with_reference=flags.kl_coef > 0)
    rewards = load_rewards(
        flags,
        prompts,
        tokenizer,
        device=run.device,
        gather=run.gather,
        batch_size=flags.rollout_mini_batch_size,
        judges=judges,
    )
    run.check_rewards(rewards)
    actor = run.setup(roles.actor)
    if roles.reference is not None:
        run.fabric.to_device(roles.reference)
    optimizer = make_optimizer(roles.actor, flags, flags.learning_rate)
    run.plan(len(prompts), what="prompts")
    mini_batch = flags.mini_batch_size * run.world_size
    sizes = rollout_sizes(len(prompts), run.global_batch, run.total_steps)
    updates = flags.rollout_epochs * sum(n * math.ceil(size / mini_batch) for size, n in sizes.items())
    run.say(
        f"rlhf_grpo: {flags.num_samples} responses to each prompt, {run.global_batch * flags.num_samples} a rollout; "
        f"{mini_batch} prompts an optimiser step, {updates:,} optimiser steps in all at most; {flags.loss_type}, "
        f"advantages {flags.advantage}, {flags.normalization} normalisation, ratios in "
        f"[{1 - flags.clips['clip_low']:g}, {1 + flags.clips['clip_high']:g}]; {roles.sharing}"
    )
    models, optimizers = {"model": roles.actor}, {"optimizer": optimizer}
    guards = Guards(run, flags)
    states = {"guards": guards}
    run.restore(models, optimizers, states)

    def trial_loss(rows: list[int]) -> Tensor:
        forest = trial_forest(run, prompts, rows, flags.num_samples, flags.max_new_tokens)
        token_logps, entropies = roles.actor(forest, temperature=flags.temperature, entropy=True)
        return (token_logps + entropies).sum()

    tokens = prompts.split.prompt_lens + flags.num_samples * flags.max_new_tokens
    sampling = rollout_bytes(run, roles.actor, prompts, flags.rollout_size * flags.num_samples)
    check_memory(run, [Pass(roles.actor, trial_loss)], optimizers, tokens, rollout=sampling)
    run.open()

    assess = partial(assess_policy, run, flags, roles, rewards, validation, guards)

    def assess_and_save() -> None:
        run.evaluate_if_due(assess)
        if guards.may_save:
            run.save_if_due(models, optimizers, tokenizer, states)

    for step in run.steps(len(prompts)):
        try:
            sampled, kept = sample_groups(run, flags, roles, rewards, prompts, step)
            experiences = [sampled[i] for i in responses_of(kept, flags.num_samples)]
            rollout = stack(experiences, flags.max_new_tokens)
            scores = penalised_scores(experiences, flags.missing_eos_penalty)
            advantages, token_kl = advantages_of(rollout, scores, flags)
            check_finite(prompts, experiences, {"advantages": advantages})
        except NonFiniteError as error:
            assess_and_save()  # before the step is counted, as a resumed run comes to it again
            step.skip(error)
            continue
        if run.step_index == 0:
            check_first_rollout(run, roles, sampled, flags.temperature)
        guards.watch(step, sampled)
        assess_and_save()
        measure_samples(step, stack(sampled, flags.max_new_tokens))
        all_scores = penalised_scores(sampled, flags.missing_eos_penalty)
        equal = without_spread(all_scores.view(-1, flags.num_samples))
        step.metrics.put("train/shaped_score", all_scores.mean().item())
        step.metrics.put("train/equal_groups", equal.double().mean().item())
        step.metrics.put("train/trained_groups", len(kept))

        if flags.kl_in == "reward":
            charged = flags.kl_coef * (token_kl * rollout.response_mask).sum(1)
            step.metrics.put("train/kl_penalty", charged.mean().item() if kept else 0.0)
        step.metrics.put("perf/rollout_seconds", time.perf_counter() - step.began)

        lengths = rollout.response_mask.sum(1).view(-1, flags.num_samples).sum(1)
        tokens = lengths + torch.tensor([len(e.prompt) for e in experiences[:: flags.num_samples]], dtype=torch.long)
        row_of = [e.row for e in experiences[:: flags.num_samples]]
        for epoch in range(flags.rollout_epochs):
            seed = seed_of_step(flags.seed, run.step_index, "order of a rollout")
            order = epoch_order(len(kept), seed=seed, epoch=epoch, shuffle=flags.shuffle).tolist()
            for start in range(0, len(order), mini_batch):
                groups = order[start : start + mini_batch]
                weights = weights_of(rollout, responses_of(groups, flags.num_samples), flags)
                of_groups = partial(pack, experiences, rollout, advantages, weights, flags.num_samples)
                given = {"rows": groups, "row_of": row_of, "tokens": tokens}
                for batch in step.micro_batches(of_groups, actor, **given):
                    batch.to(run.device)
                    step.backward(policy_loss(actor, batch, flags, step))
                    step.num_tokens += batch.forest.num_tokens
                step.update(optimizer, clip=flags.gradient_clip_val)
        step.metrics.put(
            "perf/train_seconds", time.perf_counter() - step.began - step.metrics.get("perf/rollout_seconds")
        )
    return run.finish(models, optimizers, tokenizer, assess, states)


if __name__ == "__main__":
    launch(main, GRPOFlags)
