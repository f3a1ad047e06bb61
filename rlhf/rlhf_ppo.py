"""PPO on language models: sample responses, score them, and raise the likelihood of the better ones.

    reward  r_t = -beta * (log pi(y_t) - log ref(y_t)) + [t is the end] * score
    policy  - min(ratio_t * A_t, clip(ratio_t, 1 - eps, 1 + eps) * A_t),  ratio_t = pi(y_t) / pi_old(y_t)
    critic  1/2 max((V_t - R_t)^2, (clip(V_t, V_old - eps, V_old + eps) - R_t)^2)

(Schulman et al. 2017, arXiv 1707.06347, eq. 7; Ziegler et al. 2019, arXiv 1909.08593, eq. 2), with the details of
"The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024, arXiv 2403.17031).

Deviations: (1) losses are means over all tokens of a mini-batch on all devices, not means of micro-batch means.
(2) Actor and critic are two networks with two optimisers, so `--vf_coeff` scales the critic's gradient only before
its clipping. (3) The end state has a column where the response is shorter than `--max_new_tokens`, whatever the
longest response of the batch. (4) The log-ratio is clamped to +-20 before the exponential. (5) Advantages are
whitened over the whole rollout on all devices unless `--advantage_scope` says otherwise. (6) The critic starts at
the reward model's normalised score (times its weight in `--reward`), not at its raw one. (7) Where a reward is spread
over tokens, each earns its part there, and the end earns the rest of the score.

CPU: python rlhf/rlhf_ppo.py --data_dir=data/hh --sft_experiment_dir=experiments/runs/sft \
     --rm_experiment_dir=experiments/runs/rm --rollout_size=16 --max_steps=50
GPU: fabric run --accelerator=cuda --devices=8 --strategy=ddp rlhf/rlhf_ppo.py --data_dir=data/hh \
     --sft_experiment_dir=experiments/runs/sft --rm_experiment_dir=experiments/runs/rm --rollout_size=64
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rlhf.advantages import RunningMoments, end_state_mask, gae, score_missing_eos, token_rewards
from rlhf.data.splits import Split
from rlhf.errors import NonFiniteError, UserError
from rlhf.experience import Experience, Rollout, Targets, check_finite, collect, stack, value_index
from rlhf.experiment.metrics import Metrics
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
from rlhf.guards import GuardFlags, Guards
from rlhf.kl import KL_ESTIMATORS, kl_k2
from rlhf.losses.policy_gradient import (
    policy_clipped,
    ppo_policy_loss,
    ppo_value_loss,
    value_clipped,
)
from rlhf.losses.supervised import nll_loss
from rlhf.masked import masked_whiten
from rlhf.models.loading import check_kind, resolve, tokenizer_of
from rlhf.models.roles import load_roles
from rlhf.monitoring import assess_policy, check_first_rollout, measure_rollout, missing_eos_fault
from rlhf.rewards.mix import check_rewards, load_rewards, reward_model_of
from rlhf.schedules import AdaptiveKL, FixedKL
from rlhf.seeds import seed_of_step
from rlhf.trees.batches import epoch_order, rollout_sizes, rows_of_step
from rlhf.trees.forest import Forest, Tree
from rlhf.trees.rows import finetune_tree

MAX_LOG_RATIO = 20.0


@dataclass(kw_only=True)
class PPOFlags(
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
    """PPO."""

    sft_experiment_dir: str | None = None
    """Experiment (or model) that the policy starts from, and that the reference stays at; else --model_name."""
    actor_learning_rate: float = 1e-6
    """Peak learning rate of the policy."""
    critic_learning_rate: float = 3e-6
    """Peak learning rate of the critic."""
    critic_init: Literal["reward", "sft", "zero"] = "reward"
    """The critic starts as the reward model, as the policy with a random head, or with a head of zeros."""
    critic_warmup_steps: int = 0
    """First steps that train the critic alone; the policy stays as it is."""
    rollout_size: int = 64
    """Responses sampled for one step on one device."""
    rollout_mini_batch_size: int = 32
    """Responses that are decoded and scored at once."""
    ppo_epochs: int = 4
    """Passes over the rollout in one step, each in a new order."""
    init_kl_coeff: float = 0.05
    """beta: weight of the KL penalty; the starting value where it adapts."""
    adaptive_kl_coeff: bool = False
    """Move beta so that the KL of a response comes near --target_kl_coeff (Ziegler et al. 2019, section 2.2)."""
    target_kl_coeff: float = 6.0
    """KL of a response, in nats, that the adaptive beta aims at."""
    kl_horizon: float = 10_000.0
    """Responses over which the adaptive beta moves."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of each token's KL in the reward."""
    clip_coeff: float = 0.2
    """eps of the policy's ratio."""
    value_clip_coeff: float = 0.2
    """eps of the critic's clip around the old values; 0: plain squared error."""
    vf_coeff: float = 0.1
    """Weight of the critic's loss."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    ptx_coef: float = 0.0
    """Weight of a supervised loss on the `finetune` split beside PPO's (PPO-ptx); its token mean is its own."""
    gae_gamma: float = 1.0
    """Discount of a token."""
    gae_lambd: float = 0.95
    """lambda of generalised advantage estimation."""
    normalize_advantages: bool = True
    """Whiten the advantages."""
    advantage_scope: Literal["rollout", "rank", "mini_batch"] = "rollout"
    """Over what they are whitened: the rollout on all devices, on each device apart, or each mini-batch."""
    advantage_clip_value: float = 0.0
    """Clip whitened advantages to this size; 0: don't."""
    normalize_rewards: bool = False
    """Divide scores by their running standard deviation."""
    center_rewards: bool = False
    """With --normalize_rewards, also subtract the running mean."""
    clip_rewards: bool = False
    """Clip scores to --reward_clip_value, after the normalisation."""
    reward_clip_value: float = 5.0
    """Size that scores are clipped to."""
    whiten_rewards: bool = False
    """Divide token rewards by the standard deviation of the rollout, keeping the mean; needs 8 responses."""
    missing_eos: Literal["replace", "subtract", "keep"] = "replace"
    """A response without EOS: its score is replaced by --missing_eos_value, lowered by it, or kept."""
    missing_eos_value: float = -1.0
    """Score, or penalty, of a response without EOS."""
    stop_at_eos: bool = True
    """Sampling ends at EOS. False: samples a fixed length and cuts after the first EOS; the same numbers."""
    max_ratio: float = 0.0
    """Skip a mini-batch whose mean ratio is above this; 0: never."""
    target_update_kl: float = 0.0
    """End a step's epochs once the policy has moved this far (k2, nats a token) from the one that sampled; 0: never."""
    eval_temperature: float = 0.01
    """Temperature at evaluations: near-greedy."""
    disable_dropout: bool = True
    """PPO needs one distribution for sampling and training: dropout stays off."""
    optimizer_eps: float = 1e-5
    """Epsilon of Adam."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rates fall: not at all, or to 0 along a line or a cosine, a step at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_on_policy(self, "PPO")
        if self.whiten_rewards and self.rollout_size < 8:
            raise UserError(f"--whiten_rewards needs --rollout_size of 8 or more, not {self.rollout_size}")
        if self.center_rewards and not self.normalize_rewards:
            raise UserError("--center_rewards has no meaning without --normalize_rewards=True; set that too")


@dataclass
class Batch:
    """A packed micro-batch: R response tokens and V values: before each token, then the end states that count.

    `values`, where the rollout kept their graph, are the critic's own.
    """

    forest: Forest
    value_index: Tensor
    old_logps: Tensor
    advantages: Tensor
    old_values: Tensor
    returns: Tensor
    values: Tensor | None = None

    def to(self, device: torch.device) -> None:
        for name, value in vars(self).items():
            if value is not None:
                setattr(self, name, value.to(device))


def keeps_graph(flags: PPOFlags, run: Run) -> bool:
    """Whether the critic's pass over a rollout serves its first update too: the rollout is one micro-batch there.

    With several, their graphs would stand in memory together; with several devices, each trains on other rows.
    """
    one = flags.rollout_size <= min(flags.mini_batch_size, flags.micro_batch_size, flags.rollout_mini_batch_size)
    return one and not flags.micro_batch_tokens and run.world_size == 1


def shaped_scores(rollout: Rollout, flags: PPOFlags, moments: RunningMoments) -> Tensor:
    """(N,) scores after the treatment of missing EOS, the running normalisation and the clip."""
    scores = score_missing_eos(rollout.scores, rollout.ended, mode=flags.missing_eos, value=flags.missing_eos_value)
    if flags.normalize_rewards:
        moments.update(scores)
        scores = moments.normalize(scores) if flags.center_rewards else moments.scale(scores)
    return scores.clamp(-flags.reward_clip_value, flags.reward_clip_value) if flags.clip_rewards else scores


def targets_of(
    rollout: Rollout, scores: Tensor, kl_coef: float, flags: PPOFlags, world_size: int, *, scale: float = 1.0
) -> Targets:
    """Advantages and returns of a rollout: shaped rewards, GAE, whitening of the advantages alone.

    Args:
        scores: (N,) shaped; scale: what they were divided by, as process rewards must be.
    """
    mask, value_mask = rollout.response_mask, end_state_mask(rollout.response_mask)
    token_kl = KL_ESTIMATORS[flags.kl_estimator](rollout.old_logps, rollout.ref_logps)
    process = rollout.process_rewards / scale
    rewards = token_rewards(scores, token_kl, mask, kl_coef, value_mask=value_mask, process_rewards=process)
    if flags.whiten_rewards:
        rewards = masked_whiten(rewards, value_mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.values, value_mask, gamma=flags.gae_gamma, lam=flags.gae_lambd)
    advantages = advantages * mask
    if flags.normalize_advantages and flags.advantage_scope == "rollout":
        advantages = masked_whiten(advantages, mask)
    elif flags.normalize_advantages and flags.advantage_scope == "rank":
        for rank in range(world_size):
            own = slice(rank, None, world_size)
            advantages[own] = masked_whiten(advantages[own], mask[own])
    return Targets(token_kl, advantages, returns, value_mask)


def advantages_of(targets: Targets, rollout: Rollout, rows: list[int], flags: PPOFlags) -> Tensor:
    """(N, L) advantages, clipped; with `--advantage_scope=mini_batch` those of `rows` are first whitened together."""
    advantages = targets.advantages
    if flags.normalize_advantages and flags.advantage_scope == "mini_batch":
        advantages = advantages.clone()
        advantages[rows] = masked_whiten(advantages[rows], rollout.response_mask[rows])
    if flags.advantage_clip_value:
        advantages = advantages.clamp(-flags.advantage_clip_value, flags.advantage_clip_value)
    return advantages


def pack(experiences: list[Experience], targets: Targets, advantages: Tensor, rows: list[int]) -> Batch:
    """The micro-batch of these places of the rollout."""
    chosen = [experiences[i] for i in rows]
    forest = Forest([Tree.of(e.prompt, e.response) for e in chosen])
    lengths = [len(e.response) for e in chosen]
    width = targets.returns.shape[1]
    has_end = [n < width for n in lengths]
    ends = [k for k, room in enumerate(has_end) if room]
    places = list(zip(rows, lengths, strict=True))

    def in_order(of_each: list[Tensor]) -> Tensor:
        """(V,) from (T + 1,) values of each response."""
        return torch.cat([*(values[:-1] for values in of_each), *(of_each[k][-1:] for k in ends)])

    return Batch(
        forest=forest,
        value_index=value_index(forest, torch.tensor(has_end, dtype=torch.bool)),
        old_logps=torch.cat([e.old_logps for e in chosen]),
        advantages=torch.cat([advantages[i, :n] for i, n in places]),
        old_values=in_order([e.values for e in chosen]),
        returns=torch.cat(
            [
                *(targets.returns[i, :n] for i, n in places),
                *(targets.returns[rows[k], lengths[k] : lengths[k] + 1] for k in ends),
            ]
        ),
        values=in_order([e.graph for e in chosen]) if all(e.graph is not None for e in chosen) else None,
    )


def policy_losses(actor: torch.nn.Module, batch: Batch, flags: PPOFlags, step: Step, ratios: Metrics) -> Tensor:
    """Summed clipped surrogate of a micro-batch, less its entropy bonus; what it shows goes into the metrics."""
    token_logps, entropies = actor(batch.forest, temperature=flags.temperature, entropy=True)
    step.watch("log-probabilities", token_logps, batch.forest, name="actor")
    log_ratio = (token_logps - batch.old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    new_logps = batch.old_logps + log_ratio
    losses = ppo_policy_loss(new_logps, batch.old_logps, batch.advantages, clip_coef=flags.clip_coeff)
    clipped = policy_clipped(log_ratio, batch.advantages, clip_low=flags.clip_coeff, clip_high=flags.clip_coeff)
    ratio, approx_kl = log_ratio.detach().exp(), kl_k2(new_logps.detach(), batch.old_logps)
    step.metrics.mean("train/policy_loss", losses, step.weight)
    step.metrics.mean("train/entropy", entropies, step.weight)
    step.metrics.mean("train/clip_fraction", clipped, step.weight)
    step.metrics.mean("train/approx_kl", approx_kl, step.weight)
    step.metrics.mean("train/ratio", ratio, step.weight)
    # Under the policy that sampled, the ratio's mean is exactly 1: its variance is the mean square of ratio - 1.
    step.metrics.mean("train/ratio_variance", (ratio - 1).square(), step.weight)
    ratios.mean("ratio", ratio, step.weight)
    ratios.mean("approx_kl", approx_kl, step.weight)
    return losses.sum() - (flags.entropy_coef * entropies.sum() if flags.entropy_coef else 0.0)


def value_losses(critic: torch.nn.Module, batch: Batch, flags: PPOFlags, step: Step) -> Tensor:
    """Summed (clipped) squared error of the critic's values."""
    values = critic(batch.forest, batch.value_index) if batch.values is None else batch.values
    step.watch("values", values, batch.forest, batch.value_index, name="critic")
    clip = flags.value_clip_coeff or None
    losses = ppo_value_loss(values, batch.old_values, batch.returns, clip_coef=clip)
    step.metrics.mean("train/value_loss", losses, step.weight)
    if clip is not None:
        clipped = value_clipped(values, batch.old_values, batch.returns, clip_coef=clip)
        step.metrics.mean("train/value_clip_fraction", clipped, step.weight)
    return losses.sum()


def train_supervised(run: Run, step: Step, flags: PPOFlags, actor: torch.nn.Module, split: Split, update: int) -> None:
    """Add `--ptx_coef` times the supervised loss of `mini_batch_size` rows of the finetune split.

    Args:
        update: number of the optimiser's update, from 0: each takes the next rows.
    """
    size = flags.mini_batch_size * run.world_size
    rows = rows_of_step(update, len(split), size, seed=flags.seed, shuffle=flags.shuffle)

    def forest_of(chosen: list[int]) -> Forest:
        return Forest([finetune_tree(split[i]) for i in chosen])

    num_targets = max(1, forest_of(rows).num_targets)
    for forest in step.micro_batches(forest_of, actor, rows=rows, tokens=split.lengths("input_ids")):
        token_logps, _ = actor(forest.to(run.device))
        step.watch("supervised log-probabilities", token_logps, forest, name="actor")
        losses = nll_loss(token_logps)
        step.backward(flags.ptx_coef * losses.sum() / num_targets, name="actor")
        step.metrics.mean("train/ptx_loss", losses, step.weight)


def main(flags: PPOFlags) -> dict:
    """Train; returns the last evaluation and the experiment folder."""
    run = start_experiment(flags, "rlhf_ppo")
    name = "sft_experiment_dir" if flags.sft_experiment_dir else "model_name"
    sft = resolve(getattr(flags, name), name)
    check_kind(sft, flags)
    judges = check_rewards(flags)
    rm, rm_weight = reward_model_of(flags) or (None, 1.0)
    tokenizer = tokenizer_of(sft, flags)
    prompts = run.load_prompts("train", tokenizer)
    validation = run.load_prompts("validation", tokenizer)
    supervised = run.load_splits("finetune", tokenizer)[0] if flags.ptx_coef else None
    roles = load_roles(sft, rm, flags.critic_init, flags, reward_weight=rm_weight)
    rewards = load_rewards(
        flags,
        prompts,
        tokenizer,
        device=run.device,
        gather=run.gather,
        batch_size=flags.rollout_mini_batch_size,
        loaded={rm: roles.reward} if rm else {},
        judges=judges,
    )
    run.check_rewards(rewards)
    actor, critic = run.setup(roles.actor), run.setup(roles.critic)
    for frozen in (roles.reference, roles.reward):
        if frozen is not None:
            run.fabric.to_device(frozen)
    actor_optimizer = make_optimizer(roles.actor, flags, flags.actor_learning_rate)
    critic_optimizer = make_optimizer(roles.critic, flags, flags.critic_learning_rate)
    kl = (
        AdaptiveKL(flags.init_kl_coeff, target=flags.target_kl_coeff, horizon=flags.kl_horizon)
        if flags.adaptive_kl_coeff
        else FixedKL(flags.init_kl_coeff)
    )
    score_moments = RunningMoments()
    guards = Guards(run, flags)
    run.plan(len(prompts), what="prompts")
    mini_batch = flags.mini_batch_size * run.world_size
    mini_batches = flags.rollout_size // flags.mini_batch_size
    updates = flags.ppo_epochs * mini_batches
    sizes = rollout_sizes(len(prompts), run.global_batch, run.total_steps)
    all_updates = flags.ppo_epochs * sum(n * math.ceil(size / mini_batch) for size, n in sizes.items())
    if flags.whiten_rewards and min(sizes) < 8:
        raise UserError(
            f"--whiten_rewards needs 8 responses, and the last rollout of an epoch has {min(sizes)} (of "
            f"{len(prompts)} prompts); take another --rollout_size"
        )
    run.say(
        f"rlhf_ppo: {run.global_batch} responses a rollout; {mini_batch} responses an "
        f"optimiser step; {updates} optimiser steps a rollout ({flags.ppo_epochs} epochs of {mini_batches}), "
        f"{all_updates:,} in all; {roles.sharing}; the critic starts as {flags.critic_init}; "
        f"the reference is {sft}"
    )
    models = {"model": roles.actor, "critic": roles.critic}
    optimizers = {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    states = {"kl": kl, "score_moments": score_moments, "guards": guards}
    run.restore(models, optimizers, states)

    def trial(rows: list[int]) -> Forest:
        return trial_forest(run, prompts, rows, 1, flags.max_new_tokens)

    def actor_loss(rows: list[int]) -> Tensor:
        token_logps, entropies = roles.actor(trial(rows), temperature=flags.temperature, entropy=True)
        return (token_logps + entropies).sum()

    def critic_loss(rows: list[int]) -> Tensor:
        forest = trial(rows)
        ends = torch.ones(len(rows), dtype=torch.bool, device=run.device)
        return roles.critic(forest, value_index(forest, ends)).sum()

    passes = [Pass(roles.critic, critic_loss), Pass(roles.actor, actor_loss)]
    sampling = rollout_bytes(run, roles.actor, prompts, flags.rollout_size)
    check_memory(run, passes, optimizers, prompts.split.prompt_lens + flags.max_new_tokens, rollout=sampling)
    run.open()

    assess = partial(assess_policy, run, flags, roles, rewards, validation, guards)

    def assess_and_save() -> None:
        run.evaluate_if_due(assess)
        if guards.may_save:
            run.save_if_due(models, optimizers, tokenizer, states)

    for step in run.steps(len(prompts)):
        try:
            options = {"stop_at_eos": flags.stop_at_eos, "keep_graph": keeps_graph(flags, run)}
            experiences = collect(run, flags, roles, rewards, prompts, step.global_rows, flags.temperature, **options)
        except NonFiniteError as error:
            assess_and_save()  # before the step is counted, as a resumed run comes to it again
            step.skip(error)
            continue
        if run.step_index == 0:
            check_first_rollout(run, roles, experiences, flags.temperature)
        guards.watch(step, experiences)
        assess_and_save()
        before = score_moments.state_dict()
        rollout = stack(experiences, flags.max_new_tokens)
        if run.step_index == 0 and (fault := missing_eos_fault(rollout, flags.missing_eos, flags.missing_eos_value)):
            run.say(f"warning: {fault}")
        scores = shaped_scores(rollout, flags, score_moments)
        scale = score_moments.std if flags.normalize_rewards else 1.0
        targets = targets_of(rollout, scores, kl.value, flags, run.world_size, scale=scale)
        try:
            check_finite(prompts, experiences, {"advantages": targets.advantages, "returns": targets.returns})
        except NonFiniteError as error:
            step.skip(error)
            score_moments.load_state_dict(before)
            continue
        response_kl = measure_rollout(step, rollout, scores, targets, kl.value)
        kl.update(response_kl, len(experiences))
        step.metrics.put("perf/rollout_seconds", time.perf_counter() - step.began)

        warming_up = run.step_index < flags.critic_warmup_steps
        tokens, row_of = torch.tensor([e.num_tokens for e in experiences]), [e.row for e in experiences]
        for epoch in range(flags.ppo_epochs):
            seed = seed_of_step(flags.seed, run.step_index, "order of a rollout")
            order = epoch_order(len(experiences), seed=seed, epoch=epoch, shuffle=flags.shuffle).tolist()
            moved = []
            for start in range(0, len(order), mini_batch):
                rows = order[start : start + mini_batch]
                advantages = advantages_of(targets, rollout, rows, flags)
                num_tokens, num_values = int(rollout.response_mask[rows].sum()), int(targets.value_mask[rows].sum())
                ratios = run.metrics()
                of_rows = partial(pack, experiences, targets, advantages)
                given = {"rows": rows, "row_of": row_of, "tokens": tokens}
                for batch in step.micro_batches(of_rows, actor, critic, **given):
                    batch.to(run.device)
                    # No name for a loss: nodes of a graph that outlive it leave a CPU's heap full of holes.
                    step.backward(flags.vf_coeff * value_losses(critic, batch, flags, step) / num_values, name="critic")
                    batch.values = None
                    for experience in experiences:
                        experience.graph = None  # used up: the actor's pass has its room
                    if not warming_up:
                        step.backward(policy_losses(actor, batch, flags, step, ratios) / num_tokens, name="actor")
                    step.num_tokens += batch.forest.num_tokens
                if flags.ptx_coef and not warming_up:
                    update = run.step_index * updates + epoch * mini_batches + start // mini_batch
                    train_supervised(run, step, flags, actor, supervised, update)
                means = ratios.reduce()
                blown = flags.max_ratio and means.get("ratio", 0.0) > flags.max_ratio
                step.metrics.add("train/skipped_mini_batches", float(bool(blown)), 1)
                if blown:
                    step.drop(actor_optimizer, name="actor")
                elif not warming_up:
                    step.update(actor_optimizer, clip=flags.gradient_clip_val, name="actor")
                step.update(critic_optimizer, clip=flags.gradient_clip_val, name="critic")
                moved.append(means.get("approx_kl", 0.0))
            if flags.target_update_kl and sum(moved) / len(moved) > flags.target_update_kl:
                break
        step.metrics.put(
            "perf/train_seconds", time.perf_counter() - step.began - step.metrics.get("perf/rollout_seconds")
        )
    return run.finish(models, optimizers, tokenizer, assess, states)


if __name__ == "__main__":
    launch(main, PPOFlags)
