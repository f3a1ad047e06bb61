"""KTO and BCO: learn from single responses that are labelled good or bad, unpaired and in any proportion.

    KTO  loss = w_y * (1 - sigmoid(s_y * (r - beta * z0))),    z0 = max(0, mean of log pi(y'|x) - log ref(y'|x))
    BCO  loss = - log sigmoid(s_y * (r - delta)),              delta = running mean of r

with the implicit reward r = beta * (log pi(y|x) - log ref(y|x)), s = 1 for a good response and -1 for a bad one
(Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8; Jung et al. 2024, arXiv 2404.04656), or APO-zero's two terms taken
apart (`rlhf/losses/feedback.py`). y' is the response of the row before it in its step of the first epoch, whose
mismatched pairs thus hold the step's own responses; later epochs keep to these pairs, as TRL does, so that there is
one for each row however long the run. It is a second branch on the prompt, computed without gradient on the keys and
values that the prompt has left. z0 and delta are of the whole step on all devices before its first backward pass. The
reference is the policy as the run starts; its log-probabilities, of the mismatched pairs too, are stored as those of
rlhf_dpo.py.

Where a step is cut into several micro-batches, all but the first go through the model once more, without gradient: KTO
their mismatched pairs, BCO the rows themselves.

Deviations: (1) the mean is over the rows of the step, all devices together, and so is z0; TRL takes z0 from each
micro-batch. (2) A row that is alone in its step is paired with the response of the next row of the file. (3) delta is
the mean over all rewards so far, each row once, as in TRL, and the step's own are in it; the paper's is the mean of
the good responses' mean and the bad ones'. Where one label prevails it lies near that one's: read val/auc, not
accuracy. (4) BCO's density-ratio weights for bad responses ("underlying distribution matching") are left out: they
need a classifier of prompts, and rows whose prompts differ by label. (5) Where all responses of a step, or of the
data, are of one label, the loss is that label's alone.

CPU: python rlhf/rlhf_kto.py --data_dir=data/hh --sft_experiment_dir=experiments/runs/sft --max_steps=100
GPU: fabric run --accelerator=cuda --devices=8 --strategy=ddp rlhf/rlhf_kto.py --data_dir=data/hh \
     --sft_experiment_dir=experiments/runs/sft --micro_batch_tokens=16384
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.advantages import RunningMoments
from rlhf.data.splits import Split
from rlhf.errors import UserError
from rlhf.evaluation import log_sample
from rlhf.experiment.metrics import Metrics
from rlhf.experiment.optimizers import make_optimizer
from rlhf.experiment.preflight import Pass, check_memory
from rlhf.experiment.reference import ReferenceLogps, check_reference, reference_logps
from rlhf.experiment.run import Run
from rlhf.experiment.start import start_experiment
from rlhf.flags import (
    BatchFlags,
    DataFlags,
    DeviceFlags,
    GenerationFlags,
    ModelFlags,
    OptimizerFlags,
    RunFlags,
    launch,
)
from rlhf.kl import kl_k3
from rlhf.losses.feedback import apo_zero_unpaired_loss, bco_loss, kto_kl, kto_loss
from rlhf.losses.preference import implicit_rewards
from rlhf.masked import moments
from rlhf.models.loading import check_kind, load_policy, resolve, tokenizer_of
from rlhf.reports import auc
from rlhf.trees.batches import mismatched, mismatched_of_run
from rlhf.trees.forest import Forest
from rlhf.trees.rows import feedback_tree


@dataclass(kw_only=True)
class KTOFlags(DataFlags, ModelFlags, BatchFlags, OptimizerFlags, GenerationFlags, RunFlags, DeviceFlags):
    """KTO and BCO."""

    sft_experiment_dir: str | None = None
    """Experiment (or model) that the policy starts from; it takes the place of --model_name."""
    reference: str | None = None
    """Experiment or model that is the reference; the policy as the run starts, unless set."""
    disable_dropout: bool = True
    """Set every dropout probability of the model to 0, so that the point of reference is of one policy."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    loss_type: Literal["kto", "apo_zero_unpaired", "bco"] = "kto"
    """KTO (eq. 8), APO-zero on single responses, or binary classifier optimisation."""
    beta: float = 0.1
    """Strength of the pull to the reference."""
    desirable_weight: float = 1.0
    """Weight of good responses; not with --loss_type=bco."""
    undesirable_weight: float = 1.0
    """Weight of bad responses; not with --loss_type=bco."""
    max_chosen_drop: float = 1.0
    """Warn once the good responses have lost this many nats a token against the reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) != 1 and self.loss_type == "bco":
                raise UserError(f"--{name} has no meaning with --loss_type=bco; leave it at 1")


class Batch(NamedTuple):
    """Rows as a forest of one branch each, and what is measured beside them.

    Attributes:
        pairs: (row, row whose response its prompt is paired with) of each tree of `beside`; empty without it.
    """

    rows: list[int]
    forest: Forest
    pairs: list[tuple[int, int]]
    beside: Forest | None


def forest_of(split: Split, pairs: list[tuple[int, int]]) -> Forest:
    """Trees of (row of the prompt, row of the response)."""
    return Forest([feedback_tree(split[i], split[j]) for i, j in pairs])


def partners_of(flags: KTOFlags, rows: Sequence[int], num_rows: int) -> dict[int, int]:
    """For each row of a step the row whose response, to the first one's prompt, is a sample of the point of reference.

    Another one for KTO, the row itself for BCO, and none at all for APO-zero.
    """
    if flags.loss_type == "kto":
        return dict(zip(rows, mismatched(rows, num_rows), strict=True))
    return {i: i for i in rows} if flags.loss_type == "bco" else {}


def train_partners(run: Run, flags: KTOFlags, num_rows: int) -> Sequence[int]:
    """`partners_of` for every row of the training split, the same in all epochs; empty for APO-zero."""
    if flags.loss_type == "kto":
        return mismatched_of_run(num_rows, run.global_batch, seed=flags.seed, shuffle=flags.shuffle)
    return range(num_rows) if flags.loss_type == "bco" else ()


def pack(split: Split, partner: Mapping[int, int], rows: list[int]) -> Batch:
    """These rows, and beside them the responses of their partners where those are other rows."""
    pairs = [(i, partner[i]) for i in rows if partner.get(i, i) != i]
    return Batch(rows, forest_of(split, [(i, i) for i in rows]), pairs, forest_of(split, pairs) if pairs else None)


def row_losses(flags: KTOFlags, policy_logps: Tensor, ref_logps: Tensor, labels: Tensor, point: Tensor) -> Tensor:
    """(B,) losses; `point` is what the responses are held against: z0 in nats (KTO), delta (BCO), or nothing."""
    if flags.loss_type == "bco":
        return bco_loss(policy_logps, ref_logps, labels, point, beta=flags.beta)
    weights = {"desirable_weight": flags.desirable_weight, "undesirable_weight": flags.undesirable_weight}
    if flags.loss_type == "kto":
        return kto_loss(policy_logps, ref_logps, labels, point, beta=flags.beta, **weights)
    return apo_zero_unpaired_loss(policy_logps, ref_logps, labels, beta=flags.beta, **weights)


def point_of_reference(
    run: Run, flags: KTOFlags, rewards_so_far: RunningMoments, ratios: list[Tensor], weight: float
) -> Tensor:
    """z0 of the step in nats (KTO), delta (BCO) or 0, from the log-ratios that each device has seen of the step.

    Args:
        rewards_so_far: BCO's running mean; the step's rewards go into it first.
        weight: 0 on a device without rows of its own.
    """
    if flags.loss_type == "apo_zero_unpaired":
        return torch.zeros((), device=run.device)
    found = torch.cat(ratios)
    if flags.loss_type == "bco":
        found = implicit_rewards(found, torch.zeros_like(found), beta=flags.beta)
    seen = moments(found, torch.ones_like(found, dtype=torch.bool)) * weight
    if run.world_size > 1:
        seen = run.fabric.all_reduce(seen, reduce_op="sum")
    if flags.loss_type == "kto":
        return kto_kl(seen[1] / seen[0]).float()
    rewards_so_far.update_from(seen)
    return torch.tensor(rewards_so_far.mean, device=run.device)


def threshold(flags: KTOFlags, point: Tensor) -> Tensor:
    """The reward above which a response counts as good: beta * z0 (KTO), delta (BCO), or 0."""
    return point * flags.beta if flags.loss_type == "kto" else point


def measure(
    metrics: Metrics, prefix: str, flags: KTOFlags, losses: Tensor, policy_logps: Tensor, ref_logps: Tensor,
    labels: Tensor, lengths: Tensor, point: Tensor, weight: float = 1.0,
) -> None:  # fmt: skip
    """Loss, accuracy of the labels, and the curves of good and bad responses apart."""
    rewards = implicit_rewards(policy_logps, ref_logps, beta=flags.beta).detach()
    metrics.mean(f"{prefix}/loss", losses, weight)
    metrics.mean(f"{prefix}/accuracy", ((rewards > threshold(flags, point)) == labels).float(), weight)
    change = policy_logps.detach() - ref_logps
    for name, those in (("chosen", labels), ("rejected", ~labels)):
        metrics.mean(f"{prefix}/{name}_reward", rewards[those], weight)
        tokens = lengths[those].sum() * weight
        metrics.add(f"{prefix}/{name}_logp_change_per_token", change[those].sum() * weight, tokens)
    metrics.difference(f"{prefix}/margin", f"{prefix}/chosen_reward", f"{prefix}/rejected_reward")


@torch.no_grad()
def evaluate(
    run: Run, flags: KTOFlags, policy: torch.nn.Module, split: Split, reference: ReferenceLogps, delta: float
) -> dict[str, float]:
    """Loss, accuracy, AUC and the curves of `measure` over `--eval_iters` mini-batches; z0 is that of all of them."""
    policy.eval()
    evaluated = run.rows_to_evaluate(len(split), flags.eval_iters)
    partner = partners_of(flags, evaluated, len(split))
    parts = [torch.empty(0, 6, device=run.device)]
    for rows in run.batches(len(split), flags.eval_iters):
        batch, own = pack(split, partner, rows), [(i, i) for i in rows]
        policy_logps, other_logps, token_logps = logps_of(run, policy, batch)
        ref_logps = reference.sums(own)
        divergence = batch.forest.per_branch(kl_k3(token_logps, reference.tokens(own)))
        ratios = other_logps - reference.sums(batch.pairs) if batch.pairs else torch.zeros_like(ref_logps)
        numbers = torch.tensor(rows, device=run.device).float()
        lengths = batch.forest.target_mask.sum(1)
        parts.append(torch.stack([numbers, policy_logps, ref_logps, lengths, divergence, ratios], 1))
    policy.train()
    table = run.gather_rows(torch.cat(parts))  # of all devices, on each: what follows is the same everywhere
    numbers, policy_logps, ref_logps, lengths, divergence, ratios = table[table[:, 0].argsort()].double().unbind(1)
    labels = split.labels[numbers.long()]
    point = kto_kl(ratios) if flags.loss_type == "kto" else torch.tensor(delta, dtype=torch.float64)
    losses = row_losses(flags, policy_logps, ref_logps, labels, point)
    metrics = run.metrics()
    measure(metrics, "val", flags, losses, policy_logps, ref_logps, labels, lengths, point)
    metrics.add("val/kl_k3_per_token", divergence.sum(), lengths.sum())
    if flags.loss_type == "kto":
        metrics.put("val/kl", point.item())
    area = auc(policy_logps - ref_logps, labels)
    if area is not None:
        metrics.put("val/auc", area)
    return metrics.reduce()


def logps_of(run: Run, policy: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) log-probabilities of the responses, (P,) of those beside them without graph, and the (R,) of tokens."""
    forest, beside = batch.forest.to(run.device), batch.beside
    token_logps, _ = policy(forest, beside=None if beside is None else beside.to(run.device))
    own, other = token_logps.split([forest.num_targets, len(token_logps) - forest.num_targets])
    return forest.per_branch(own), other if beside is None else beside.per_branch(other), own


def references_of(
    run: Run, flags: KTOFlags, policy: torch.nn.Module, source: str, train: Split, validation: Split | None
) -> tuple[ReferenceLogps, ReferenceLogps | None]:
    """Stored log-probabilities, under the reference, of the pairs (row of the prompt, row of the response) of both
    splits that this run will use; None for a split that isn't there."""
    name = f"{source}, the policy as this run starts"
    if flags.reference:
        name = resolve(flags.reference, "reference")
        model = load_policy(name, flags, trainable=False)
        run.check_reference(name, model)
        policy = run.fabric.setup_module(model)

    def stored(split: Split, pairs: list[tuple[int, int]]) -> ReferenceLogps:
        def tree_of(pair):
            return feedback_tree(split[pair[0]], split[pair[1]])

        folder, distinct = Path(flags.data_dir) / "reference_logps", list(dict.fromkeys(pairs))
        return reference_logps(run, policy, distinct, tree_of, folder, micro_batch_size=flags.micro_batch_size)

    rows, partners = run.rows_to_train(len(train)), train_partners(run, flags, len(train))
    found = stored(train, [(i, i) for i in rows] + [(i, partners[i]) for i in rows if partners]), None
    check_reference(run, found[0], train)
    if validation is not None:
        rows = run.rows_to_evaluate(len(validation), flags.eval_iters)
        pairs = [(i, i) for i in rows]
        found = found[0], stored(validation, [*pairs, *partners_of(flags, rows, len(validation)).items()])
    computed = sum(r.computed for r in found if r is not None)
    run.say(f"rlhf_kto: the reference is {name}; {computed} of its log-probabilities computed, the others on disk")
    return found


def balance_of(flags: KTOFlags, labels: Tensor) -> str:
    """How many responses are good and bad, and which weight would bring them into the paper's proportion.

    It is w_D * good over w_U * bad in [1, 4/3] (Ethayarajh et al. 2024, eq. 9); BCO has no weights.
    """
    good, bad = int(labels.sum()), int((~labels).sum())
    text = f"{good:,} good and {bad:,} bad responses"
    if not good or not bad:
        return f"{text}: with one label alone, nothing holds the policy but --beta"
    ratio = flags.desirable_weight * good / max(flags.undesirable_weight * bad, 1e-9)
    if flags.loss_type == "bco" or 1 <= ratio <= 4 / 3:
        return text
    if ratio > 1:
        remedy = f"--undesirable_weight={flags.desirable_weight * good / bad:.3g}"
    else:
        remedy = f"--desirable_weight={flags.undesirable_weight * bad / good:.3g}"
    return f"{text}; the paper wants their weighted proportion, {ratio:.3g}, between 1 and 1.33: {remedy}"


def main(flags: KTOFlags) -> dict:
    """Train; returns the last evaluation and the experiment folder."""
    run = start_experiment(flags, "rlhf_kto")
    name = "sft_experiment_dir" if flags.sft_experiment_dir else "model_name"
    source = resolve(getattr(flags, name), name)
    check_kind(source, flags)
    if flags.reference:
        check_kind(resolve(flags.reference, "reference"), flags)
    tokenizer = tokenizer_of(source, flags)
    train, validation = run.load_splits("feedback", tokenizer)
    if flags.loss_type == "kto" and len(train) < 2:
        raise UserError(f"{train.path} has {len(train)} row, and KTO pairs prompts with other rows' responses; give 2")
    policy = run.setup(load_policy(source, flags))
    run.plan(len(train))
    run.say(f"rlhf_kto: {balance_of(flags, train.labels)}")
    train_reference, validation_reference = references_of(run, flags, policy, source, train, validation)
    optimizer = make_optimizer(policy.module, flags, flags.learning_rate)
    rewards_so_far = RunningMoments()
    models, optimizers = {"model": policy.module}, {"optimizer": optimizer}
    states = {"rewards_so_far": rewards_so_far}
    run.restore(models, optimizers, states)
    partners = train_partners(run, flags, len(train))
    all_labels, tokens = train.labels, train.lengths("input_ids")
    response_lens = tokens - train.prompt_lens

    def trial_loss(rows: list[int]) -> Tensor:
        longest, next_longest = response_lens.topk(2).indices.tolist() if flags.loss_type == "kto" else (0, 0)
        partner = {i: next_longest if i == longest else longest for i in rows}
        batch = pack(train, partner if flags.loss_type == "kto" else {}, rows)
        return logps_of(run, policy.module, batch)[0].sum()

    check_memory(run, [Pass(policy.module, trial_loss)], optimizers, tokens)
    run.open()

    def assess() -> dict[str, float]:
        log_sample(run, policy.module, tokenizer)
        if validation is None:
            return {}
        values = evaluate(run, flags, policy, validation, validation_reference, rewards_so_far.mean)
        drop = -values.get("val/chosen_logp_change_per_token", 0.0)
        if drop > flags.max_chosen_drop:
            run.say(
                f"warning: the good responses have lost {drop:.2f} nats a token; lower --learning_rate or raise --beta"
            )
        best, higher = ("val/auc", True) if "val/auc" in values else ("val/loss", False)
        if math.isfinite(values["val/loss"]):  # NaN rewards have a place of their own in the order of the AUC
            run.save_best(policy.module, tokenizer, best, values[best], higher=higher)
        return values

    @torch.no_grad()
    def log_ratios(pairs: list[tuple[int, int]]) -> Tensor:
        """(P,) of pairs (row of the prompt, row of the response), without graph."""
        forest = forest_of(train, pairs).to(run.device)
        return forest.per_branch(policy(forest)[0]) - train_reference.sums(pairs)

    for step in run.steps(len(train)):
        run.evaluate_if_due(assess)
        run.save_if_due(models, optimizers, tokenizer, states)
        before, point = rewards_so_far.state_dict(), None
        partner = {i: partners[i] for i in step.global_rows if partners}
        first, *later = step.cuts(tokens=tokens)
        ratios = [log_ratios([(i, partner[i]) for i in rows]) for rows in later if partner]
        beside = {i: partner[i] for i in first if partner}
        for batch in step.micro_batches(partial(pack, train, beside), policy, tokens=tokens):
            policy_logps, other_logps, _ = logps_of(run, policy, batch)
            ref_logps = train_reference.sums([(i, i) for i in batch.rows])
            if point is None:  # of the whole step: the first micro-batch completes what was seen of the later ones
                own = policy_logps.detach() - ref_logps
                ratios.append(other_logps - train_reference.sums(batch.pairs) if batch.pairs else own)
                point = point_of_reference(run, flags, rewards_so_far, ratios, step.weight)
            labels, lengths = all_labels[batch.rows].to(run.device), batch.forest.target_mask.sum(1)
            losses = row_losses(flags, policy_logps, ref_logps, labels, point)
            step.watch("log-probabilities", policy_logps)
            step.watch("reference log-probabilities", ref_logps)
            step.watch("losses", losses)
            step.backward(losses.sum() / len(step.global_rows))
            measure(step.metrics, "train", flags, losses, policy_logps, ref_logps, labels, lengths, point, step.weight)
            step.num_tokens += batch.forest.num_tokens
            if flags.loss_type == "kto":
                step.num_tokens += int(response_lens[[partner[i] for i in batch.rows]].sum())
        num_chosen = int(all_labels[step.global_rows].sum())
        step.metrics.put("train/num_chosen", num_chosen)
        step.metrics.put("train/num_rejected", len(step.global_rows) - num_chosen)
        if flags.loss_type == "kto":
            step.metrics.put("train/kl", point.item())
        elif flags.loss_type == "bco":
            step.metrics.put("train/delta", point.item())
        if not step.update(optimizer, clip=flags.gradient_clip_val):
            rewards_so_far.load_state_dict(before)
    return run.finish(models, optimizers, tokenizer, assess, states)


if __name__ == "__main__":
    launch(main, KTOFlags)
