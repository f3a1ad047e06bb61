"""What tells a healthy RL run from a broken or a hacked one: checks before it, numbers during it, held-out answers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf.data.prompts import Prompts
from rlhf.errors import UserError
from rlhf.evaluation import log_sample
from rlhf.experience import Experience, Rollout, Targets, collect
from rlhf.experiment.metrics import Metrics
from rlhf.experiment.run import Run
from rlhf.experiment.steps import Step
from rlhf.guards import Guards
from rlhf.kl import kl_k1, kl_k3
from rlhf.losses.policy_gradient import explained_variance
from rlhf.masked import masked_mean
from rlhf.models.roles import Roles
from rlhf.pairwise import PairLogps, PairLossFlags, chosen_nll, pair_rewards, path_nll
from rlhf.reports import interval_of
from rlhf.rewards.mix import Rewards
from rlhf.trees.batches import cut
from rlhf.trees.forest import Forest, Tree
from rlhf.trees.rows import halves

LOGGED_SAMPLES = 64
"""Answers of one evaluation that go to samples.jsonl, the first ones, so always to the same prompts: at the default
`--eval_interval` a run of 100,000 steps then writes some tens of megabytes."""


def measure_samples(step: Step, rollout: Rollout) -> None:
    """Log what tells a healthy run from a hacked reward: scores, lengths, perplexity, distance from the reference."""
    mask, old_logps, ref_logps = rollout.response_mask, rollout.old_logps, rollout.ref_logps
    values = {
        "train/score": rollout.scores.mean().item(),
        "train/score_std": rollout.scores.std(correction=0).item(),
        "train/response_length": mask.sum(1).double().mean().item(),
        "train/eos_rate": rollout.ended.double().mean().item(),
        "train/perplexity": math.exp(min(700.0, -masked_mean(old_logps, mask).item())),
    }
    if ref_logps is not None:
        values |= {
            "train/kl_per_response": response_kl(rollout),
            "train/kl_per_token": masked_mean(kl_k1(old_logps, ref_logps), mask).item(),
            "train/kl_k3_per_token": masked_mean(kl_k3(old_logps, ref_logps), mask).item(),
        }
    values |= {f"train/reward_{name}": part.mean().item() for name, part in rollout.parts.items()}
    for name, value in values.items():
        step.metrics.put(name, value)


def response_kl(rollout: Rollout) -> float:
    """Mean KL of a response (k1), in nats; the rollout must have a reference."""
    return ((rollout.old_logps - rollout.ref_logps) * rollout.response_mask).sum(1).mean().item()


def measure_rollout(step: Step, rollout: Rollout, scores: Tensor, targets: Targets, kl_coef: float) -> float:
    """Log `measure_samples`, the reward and what the critic says; returns the mean KL of a response, in nats.

    Args:
        scores: (N,) as they enter the reward.
    """
    measure_samples(step, rollout)
    mask = rollout.response_mask
    penalty = kl_coef * (targets.token_kl * mask).sum(1).mean().item()
    shaped = scores.mean().item()
    values = {
        "train/shaped_score": shaped,
        "train/kl_penalty": penalty,
        "train/reward": shaped - penalty,
        "train/kl_coef": kl_coef,
        "train/value": masked_mean(rollout.values, mask).item(),
        "train/return": masked_mean(targets.returns, targets.value_mask).item(),
        "train/explained_variance": explained_variance(rollout.values, targets.returns, targets.value_mask).item(),
    }
    for name, value in values.items():
        step.metrics.put(name, value)
    return response_kl(rollout)


def watch_pairs(step: Step, pairs: PairLogps, losses: Tensor) -> None:
    """What to name, with its rows, of a micro-batch of pairs if its update is not finite."""
    step.watch("log-probabilities", pairs.policy)
    step.watch("reference log-probabilities", pairs.reference)
    step.watch("losses", losses)


def measure_pairs(metrics: Metrics, prefix: str, flags: PairLossFlags, pairs: PairLogps, weight: float = 1.0) -> None:
    """The curves that tell a fine run from a broken one: chosen and rejected apart, not their difference alone."""
    chosen, rejected = halves(pair_rewards(flags, pairs).detach())
    metrics.mean(f"{prefix}/accuracy", (chosen > rejected).float(), weight)
    metrics.mean(f"{prefix}/margin", chosen - rejected, weight)
    metrics.mean(f"{prefix}/chosen_reward", chosen, weight)
    metrics.mean(f"{prefix}/rejected_reward", rejected, weight)
    # Without a reference its sums are 0, and what is left is the policy's own log-probability.
    what = "logp_change_per_token" if flags.uses_reference else "logp_per_token"
    changes, lengths = halves((pairs.policy_sums - pairs.ref_sums).detach()), halves(pairs.lengths)
    for name, change, tokens in zip(("chosen", "rejected"), changes, lengths, strict=True):
        metrics.add(f"{prefix}/{name}_{what}", change.sum() * weight, tokens.sum() * weight)
    metrics.add(f"{prefix}/chosen_nll", chosen_nll(pairs).sum() * weight, lengths[0].sum() * weight)
    if flags.path_nll_coef:
        path_tokens = halves(pairs.path_lengths)[0].sum()
        metrics.add(f"{prefix}/path_nll", path_nll(pairs).sum() * weight, path_tokens * weight)
    if flags.wpo_weighting:
        metrics.mean(f"{prefix}/wpo_weight", pairs.weights, weight)


@torch.no_grad()
def check_first_rollout(run: Run, roles: Roles, experiences: list[Experience], temperature: float) -> None:
    """Before the first update, policy and reference are one distribution, sampled and recomputed alike.

    Raises:
        UserError: they differ by more than rounding; the sentence says between which passes.
    """
    exact = run.precision == "32-true"
    mine = experiences[run.rank :: run.world_size][:4] or experiences[:1]
    forest = Forest([Tree.of(e.prompt, e.response) for e in mine]).to(run.device)
    with run.fabric.autocast():
        recomputed, _ = roles.actor(forest, temperature=temperature)
    recomputed = recomputed.cpu()
    sampling_gap = (torch.cat([e.old_logps for e in mine]) - recomputed).abs().max().item()
    if sampling_gap > (1e-3 if exact else 0.5):
        raise UserError(
            f"sampling and training disagree on the same policy by {sampling_gap:.2g} nats a token before any update; "
            f"a model whose forward depends on more than its tokens cannot be trained on its own samples"
        )
    if roles.reference is None:
        return
    reference_gap = (torch.cat([e.ref_logps for e in mine]) - recomputed).abs().max().item()
    if reference_gap > (1e-4 if exact else 0.5):
        raise UserError(
            f"policy and reference differ by {reference_gap:.2g} nats a token before any update; give both the same "
            f"--sft_experiment_dir"
        )
    kl = torch.cat([e.old_logps - e.ref_logps for e in experiences]).mean().item()
    if abs(kl) > (1e-5 if exact else 0.05):
        raise UserError(f"the KL of the first rollout is {kl:.2g} nats a token, not 0; sampling differs from training")


def missing_eos_fault(rollout: Rollout, mode: str, value: float) -> str | None:
    """Whether the score that stands for a missing EOS rewards it: a clause for the user, or None.

    Scores are centred on the pairs that the reward model saw; an early policy's own responses often lie far below,
    and a fixed score for those that never end is then better than most.
    """
    ended = rollout.scores[rollout.ended]
    if mode != "replace" or not len(ended) or value <= ended.mean():
        return None
    better = (ended < value).double().mean().item()
    return (
        f"a response without EOS scores {value:g} (--missing_eos_value), more than {100 * better:.0f} % of those that "
        f"end (mean {ended.mean().item():.2f}), so the policy learns not to end; set --missing_eos=subtract or a lower "
        f"value"
    )


@torch.no_grad()
def log_ratio_per_response(
    run: Run, roles: Roles, experiences: list[Experience], temperature: float, size: int
) -> float:
    """Mean over responses of the sum over tokens of log pi - log ref, in nats.

    Both are at `temperature`, that of training: at the near-zero one of an evaluation any other likeliest token
    would count hundreds of nats. As the responses are not sampled at it, this is no unbiased estimate of the KL.
    """
    sums: list[float] = []
    mine = range(run.rank, len(experiences), run.world_size)
    with run.fabric.autocast():
        for batch in cut(mine, micro_batch_size=size):
            trees = [Tree.of(experiences[i].prompt, experiences[i].response) for i in batch]
            forest = Forest(trees).to(run.device)
            policy, _ = roles.actor(forest, temperature=temperature)
            reference, _ = roles.reference(forest, temperature=temperature)
            sums += forest.per_branch(policy - reference).tolist()
    return sum(run.gather(sums)) / len(experiences)


def assess_policy(
    run: Run, flags: Any, roles: Roles, rewards: Rewards, prompts: Prompts | None, guards: Guards
) -> dict[str, float]:
    """The evaluation of a run that samples: the example prompt, and held-out ones where the data has some.

    The best weights so far are kept, unless a guard fires.

    Raises:
        Collapse: the guards end the run.
    """
    log_sample(run, roles.actor, rewards.tokenizer)
    if prompts is None:
        return {}
    values, samples = evaluate_sampling(run, flags, roles, rewards, prompts)
    run.log_samples(samples)
    if guards.evaluated(values["val/score"]):
        run.save_best(roles.actor, rewards.tokenizer, "val/score", values["val/score"], higher=True)
    return values


@torch.no_grad()
def evaluate_sampling(
    run: Run, flags: Any, roles: Roles, rewards: Rewards, prompts: Prompts
) -> tuple[dict[str, float], list[dict]]:
    """Near-greedy answers to held-out prompts: scores, KL, and the score of the data's own answers beside them.

    Returns:
        The means over all answers, and the first `LOGGED_SAMPLES` answers for samples.jsonl.
    """
    limit = min(len(prompts), flags.eval_iters * flags.mini_batch_size * run.world_size or len(prompts))
    rows = list(range(limit))
    experiences = collect(run, flags, roles, rewards, prompts, rows, flags.eval_temperature)
    scored = interval_of(torch.tensor([e.score for e in experiences], dtype=torch.float64))
    values = {
        "val/score": scored["mean"],
        "val/response_length": sum(len(e.response) for e in experiences) / len(experiences),
        "val/eos_rate": sum(e.ended for e in experiences) / len(experiences),
    }
    if scored["n"] > 1:
        values["val/score_error"] = scored["mean"] - scored["interval"][0]
    if roles.reference is not None:
        size = flags.rollout_mini_batch_size
        values["val/kl"] = log_ratio_per_response(run, roles, experiences, flags.temperature, size)
    for name in experiences[0].parts:
        values[f"val/reward_{name}"] = sum(e.parts[name] for e in experiences) / len(experiences)
    answers = [(row, prompts.answer(row)) for row in rows]
    answers = [(row, answer) for row, answer in answers if answer is not None]
    if answers:
        mine = answers[run.rank :: run.world_size]
        with run.fabric.autocast():
            scores = rewards.over(prompts)(
                [prompts.prompt(row) for row, _ in mine], [a for _, a in mine], [r for r, _ in mine]
            )
        values["val/reference_score"] = sum(run.gather(scores.total.tolist())) / len(answers)
    decode = prompts.tokenizer.decode
    samples = [
        {"prompt": decode(e.prompt), "response": decode(e.response, skip_special_tokens=True), "score": e.score}
        for e in experiences[:LOGGED_SAMPLES]
    ]
    return values, samples
