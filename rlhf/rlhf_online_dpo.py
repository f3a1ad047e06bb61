"""Online DPO: sample responses, pair the best with the worst of each prompt, and learn from the fresh pairs.

    loss = - log sigmoid(beta * [(log pi(y_b|x) - log ref(y_b|x)) - (log pi(y_w|x) - log ref(y_w|x))])

(Guo et al. 2024, arXiv 2402.04792, algorithm 1; Rafailov et al. 2023, arXiv 2305.18290, eq. 7), or any loss of
`rlhf/pairwise.py` that looks at one pair at a time. y_b and y_w are the highest and the lowest rewarded of
`--num_samples` responses, or the better and the worse of two where `--judge` compares them. The prompt is the trunk,
they are the branches. With `--ref_update_interval=N --ref_mixup=1` the reference is renewed every N steps: iterative
DPO, in rounds of N steps (Xu et al. 2023, arXiv 2312.16682).

Deviations: (1) a prompt whose responses all have one reward makes no pair; the paper's annotator and TRL call one of
them the better. (2) IPO compares means over tokens, as in `rlhf_dpo.py`; TRL's online trainer sums. (3) The
log-probabilities are those of the distribution that is sampled, `--temperature` included.

CPU: python rlhf/rlhf_online_dpo.py --data_dir=data/hh --sft_experiment_dir=experiments/runs/sft \
     --rm_experiment_dir=experiments/runs/rm --rollout_size=8 --max_steps=50
GPU: fabric run --accelerator=cuda --devices=8 --strategy=ddp rlhf/rlhf_online_dpo.py --data_dir=data/hh \
     --sft_experiment_dir=experiments/runs/sft --rm_experiment_dir=experiments/runs/rm --num_samples=4
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rlhf.errors import NonFiniteError, UserError
from rlhf.experience import Experience, collect, penalised_scores, stack
from rlhf.experiment.optimizers import make_optimizer
from rlhf.experiment.preflight import Pass, check_memory, rollout_bytes, trial_forest
from rlhf.experiment.reference import MovingReference
from rlhf.experiment.run import Run
from rlhf.experiment.start import start_experiment
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
from rlhf.models.loading import check_kind, load_policy, resolve, tokenizer_of
from rlhf.models.roles import load_actor
from rlhf.monitoring import assess_policy, check_first_rollout, measure_pairs, measure_samples, watch_pairs
from rlhf.pairwise import PairLossFlags, check_moving_reference, chosen_nll, pair_logps, pair_losses
from rlhf.rewards.judge import Judge, load_judge
from rlhf.rewards.mix import check_rewards, load_rewards
from rlhf.seeds import seed_of_step
from rlhf.trees.batches import epoch_order
from rlhf.trees.forest import Forest, Tree

Pair = tuple[Experience, Experience]
"""The best and the worst response to one prompt."""


@dataclass(kw_only=True)
class OnlineDPOFlags(
    PairLossFlags,
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
    """Online DPO."""

    sft_experiment_dir: str | None = None
    """Experiment (or model) that the policy starts from, and that the reference stays at; else --model_name."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    num_samples: int = 2
    """Responses to each prompt, of which the best and the worst make the pair."""
    rollout_size: int = 8
    """Prompts of one step on one device; a multiple of --mini_batch_size, which counts prompts too."""
    rollout_mini_batch_size: int = 64
    """Responses that are decoded at once."""
    rollout_epochs: int = 1
    """Passes over the pairs of one step, each in a new order."""
    judge: str | None = None
    """Function FILE.py:NAME or MODULE:NAME that compares the two responses to a prompt in the place of their rewards:
    judge(prompts, first, second, rows) returns for each 0 (the first is better), 1, or -1 (neither)."""
    missing_eos_penalty: float = 0.0
    """Taken off the reward of a response without EOS."""
    eval_temperature: float = 0.01
    """Temperature at evaluations: near-greedy."""
    on_collapse: Literal["stop", "warn"] = "warn"
    """Once a guard has fired --guard_patience times in a row: warn, and go on, the last checkpoint from before being
    kept besides; or end the run with status 3 (take that with a reward model, which can be hacked)."""
    disable_dropout: bool = True
    """Online DPO compares what was sampled with what is trained: dropout stays off."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls: not at all, or to 0 along a line or a cosine, a step at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_on_policy(self, "online DPO")
        if self.num_samples < 2:
            raise UserError(f"--num_samples={self.num_samples} makes no pair; it must be 2 or more")
        if self.judge and (self.num_samples != 2 or self.missing_eos_penalty):
            raise UserError("--judge compares two responses, and no rewards: leave --num_samples=2 and no penalty")
        if self.sorts or self.path_nll_coef:
            raise UserError(
                f"--loss_type {' '.join(self.loss_type)}: aot, aot_unpaired and orpo need more than the two responses "
                f"of a fresh pair; take another, such as sigmoid"
            )
        check_moving_reference(self)


def pairs_of(experiences: list[Experience], flags: OnlineDPOFlags) -> list[Pair]:
    """The best and the worst response to each prompt, the first of equals; none where all rewards are equal.

    Args:
        experiences: `num_samples` of each prompt in turn.
    """
    scores = penalised_scores(experiences, flags.missing_eos_penalty).view(-1, flags.num_samples)
    found = []
    for g, row in enumerate(scores):
        best, worst = int(row.argmax()), int(row.argmin())
        if row[best] > row[worst]:
            found.append((experiences[g * flags.num_samples + best], experiences[g * flags.num_samples + worst]))
    return found


def pairs_judged(run: Run, judge: Judge, experiences: list[Experience], rows: list[int]) -> list[Pair]:
    """The better and the worse of two responses to each prompt of `rows`; none where the judge finds neither better.

    The devices share the comparisons; each returns all pairs, in the order of `rows`.
    """
    mine = list(range(run.rank, len(rows), run.world_size))
    first, second = ([experiences[2 * g + side].response for g in mine] for side in (0, 1))
    verdicts = judge(first, second, [rows[g] for g in mine])
    found = dict(run.gather(list(zip(mine, verdicts, strict=True))))
    decided = [(g, found[g]) for g in range(len(rows)) if found[g] >= 0]
    return [(experiences[2 * g + better], experiences[2 * g + 1 - better]) for g, better in decided]


def pack(pairs: list[Pair], rows: list[int]) -> tuple[Forest, list[int]]:
    """The micro-batch of these pairs: trees of a prompt with its best and its worst response."""
    return Forest(
        [Tree.of(best.prompt, best.response, worst.response) for best, worst in (pairs[i] for i in rows)]
    ), rows


def ref_logps_of(pairs: list[Pair], forest: Forest, rows: list[int]) -> Tensor:
    """(R,) log-probabilities of a micro-batch's targets under the reference, from when they were sampled."""
    found = [e.ref_logps for i in rows for e in pairs[i]]
    return torch.cat(found).to(forest.input_ids.device)


def main(flags: OnlineDPOFlags) -> dict:
    """Train; returns the last evaluation and the experiment folder."""
    run = start_experiment(flags, "rlhf_online_dpo")
    name = "sft_experiment_dir" if flags.sft_experiment_dir else "model_name"
    sft = resolve(getattr(flags, name), name)
    check_kind(sft, flags)
    reference = resolve(flags.reference, "reference") if flags.reference else None
    if reference:
        check_kind(reference, flags)
    judges = check_rewards(flags)
    tokenizer = tokenizer_of(sft, flags)
    prompts = run.load_prompts("train", tokenizer)
    validation = run.load_prompts("validation", tokenizer)
    judge = None
    if flags.judge:
        judge = load_judge(flags.judge, prompts, tokenizer, timeout=flags.reward_timeout, gather=run.gather)
    roles = load_actor(sft, flags, with_reference=flags.uses_reference and not flags.reference)
    if flags.reference:
        roles.reference = load_policy(reference, flags, trainable=False)
        run.check_reference(reference, roles.reference)
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
    models, optimizers = {"model": roles.actor}, {"optimizer": optimizer}
    if flags.ref_update_interval:
        models["reference"] = MovingReference(run, roles.reference, roles.actor)
    run.plan(len(prompts), what="prompts")
    mini_batch = flags.mini_batch_size * run.world_size
    run.say(
        f"rlhf_online_dpo: {flags.num_samples} responses to each prompt, the best against the worst; at most "
        f"{mini_batch} pairs an optimiser step; the reference is "
        f"{(flags.reference or f'{sft}, as this run starts') if flags.uses_reference else 'none'}"
        + (f", renewed every {flags.ref_update_interval} steps" if flags.ref_update_interval else "")
    )
    guards = Guards(run, flags)
    states = {"guards": guards}
    run.restore(models, optimizers, states)

    def trial_loss(rows: list[int]) -> Tensor:
        forest = trial_forest(run, prompts, rows, 2, flags.max_new_tokens)
        return roles.actor(forest, temperature=flags.temperature)[0].sum()

    most = prompts.split.prompt_lens + 2 * flags.max_new_tokens
    sampling = rollout_bytes(run, roles.actor, prompts, flags.rollout_size * flags.num_samples)
    check_memory(run, [Pass(roles.actor, trial_loss)], optimizers, most, rollout=sampling)
    run.open()

    assess = partial(assess_policy, run, flags, roles, rewards, validation, guards)

    def assess_and_save() -> None:
        run.evaluate_if_due(assess)
        if guards.may_save:
            run.save_if_due(models, optimizers, tokenizer, states)

    warned = False
    for step in run.steps(len(prompts)):
        num = flags.num_samples
        try:
            experiences = collect(
                run, flags, roles, rewards, prompts, step.global_rows, flags.temperature, num_samples=num
            )
        except NonFiniteError as error:
            assess_and_save()  # before the step is counted, as a resumed run comes to it again
            step.skip(error)
            continue
        if run.step_index == 0:
            own = replace(roles, reference=None) if flags.reference else roles
            check_first_rollout(run, own, experiences, flags.temperature)
        guards.watch(step, experiences)
        assess_and_save()
        if judge is None:
            pairs = pairs_of(experiences, flags)
        else:
            pairs = pairs_judged(run, judge, experiences, step.global_rows)
        measure_samples(step, stack(experiences, flags.max_new_tokens))
        step.metrics.put("train/shaped_score", penalised_scores(experiences, flags.missing_eos_penalty).mean().item())
        step.metrics.put("train/pairs", len(pairs))
        step.metrics.put("perf/rollout_seconds", time.perf_counter() - step.began)

        reference = partial(ref_logps_of, pairs) if flags.uses_reference else None
        tokens = torch.tensor([best.num_tokens + len(worst.response) for best, worst in pairs])
        row_of, drop = [best.row for best, _ in pairs], run.metrics()
        for epoch in range(flags.rollout_epochs):
            seed = seed_of_step(flags.seed, run.step_index, "order of a rollout")
            order = epoch_order(len(pairs), seed=seed, epoch=epoch, shuffle=flags.shuffle).tolist()
            for start in range(0, len(order), mini_batch):
                rows = order[start : start + mini_batch]
                num_chosen_tokens = sum(len(pairs[i][0].response) for i in rows)
                given = {"rows": rows, "row_of": row_of, "tokens": tokens}
                for forest, mine in step.micro_batches(partial(pack, pairs), actor, **given):
                    policy = partial(actor, temperature=flags.temperature)
                    logps = pair_logps(flags, policy, reference, forest.to(run.device), mine)
                    losses = pair_losses(flags, logps)
                    watch_pairs(step, logps, losses)
                    loss = losses.sum() / len(rows)
                    loss = loss + flags.chosen_nll_coef * chosen_nll(logps).sum() / max(1, num_chosen_tokens)
                    step.backward(loss)
                    step.metrics.add("train/loss", loss * len(rows) * step.weight, len(mine) * step.weight)
                    measure_pairs(step.metrics, "train", flags, logps, step.weight)
                    change = (logps.ref_sums - logps.policy_sums).detach()[0::2]
                    drop.add("nats", change.sum() * step.weight, logps.lengths[0::2].sum() * step.weight)
                    step.num_tokens += forest.num_tokens
                step.update(optimizer, clip=flags.gradient_clip_val)
        step.metrics.put(
            "perf/train_seconds", time.perf_counter() - step.began - step.metrics.get("perf/rollout_seconds")
        )
        lost = drop.reduce()["nats"] if pairs else 0.0
        if flags.uses_reference and lost > flags.max_chosen_drop and not warned:
            warned = True
            run.say(
                f"warning: the better responses of step {run.step_index} are {lost:.2f} nats a token below the "
                f"reference; lower --learning_rate, raise --beta or set --sft_coef"
            )
        if flags.ref_update_interval and (run.step_index + 1) % flags.ref_update_interval == 0:
            models["reference"].update(flags.ref_mixup)
    return run.finish(models, optimizers, tokenizer, assess, states)


if __name__ == "__main__":
    launch(main, OnlineDPOFlags)
