"""Direct preference optimisation and its relatives: learn from pairs without a reward model or sampling.

    loss = - log sigmoid(beta * [(log pi(y_c|x) - log ref(y_c|x)) - (log pi(y_r|x) - log ref(y_r|x))])

(Rafailov et al. 2023, arXiv 2305.18290, eq. 7), or another loss of such pairs, or a weighted sum of several
(`--loss_type`, `--loss_weights`; see `rlhf/pairwise.py`). Each pair is one prompt tree. The reference is the
policy as the run starts; its log-probabilities are computed once, kept beside the data, and read back by every later
run: no reference model is in memory while training. `orpo`, `cpo` and `simpo` do without a reference altogether.
With `--ref_update_interval` it follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656).

Deviations: (1) the mean is over the pairs of the step, all devices together. (2) `--sft_coef` adds that many times
the mean negative log-likelihood a token of the chosen responses (Pang et al. 2024, arXiv 2404.19733, eq. 2, which
normalises by each response's length); so do CPO (over responses) and ORPO (over prompts too), as in TRL. (3) AOT sorts
the pairs of the whole step: where they don't go through the model at once, a first pass without gradient finds their
ranks, without dropout.

CPU: python rlhf/rlhf_dpo.py --data_dir=data/hh --sft_experiment_dir=experiments/runs/sft --max_steps=100
GPU: fabric run --accelerator=cuda --devices=8 --strategy=ddp rlhf/rlhf_dpo.py --data_dir=data/hh \
     --sft_experiment_dir=experiments/runs/sft --micro_batch_tokens=16384
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.data.splits import Split
from rlhf.evaluation import log_sample
from rlhf.experiment.optimizers import make_optimizer
from rlhf.experiment.preflight import Pass, check_memory
from rlhf.experiment.reference import MovingReference, check_reference, reference_logps
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
    RunFlags,
    launch,
)
from rlhf.masked import widest
from rlhf.models.loading import check_kind, load_policy, resolve, tokenizer_of
from rlhf.monitoring import measure_pairs, watch_pairs
from rlhf.pairwise import (
    PairLogps,
    PairLossFlags,
    Partners,
    Reference,
    check_moving_reference,
    chosen_nll,
    match_sides,
    pair_logps,
    pair_losses,
    path_nll,
    sides,
)
from rlhf.trees.forest import Forest
from rlhf.trees.rows import pair_tokens, pair_tree


@dataclass(kw_only=True)
class DPOFlags(
    PairLossFlags, DataFlags, ModelFlags, BatchFlags, OptimizerFlags, GenerationFlags, RunFlags, DeviceFlags
):
    """Direct preference optimisation."""

    sft_experiment_dir: str | None = None
    """Experiment (or model) that the policy starts from; it takes the place of --model_name."""
    learning_rate: float = 1e-6
    """Peak learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_moving_reference(self)


@torch.no_grad()
def evaluate(
    run: Run, flags: DPOFlags, policy: nn.Module, split: Split, reference: Reference | None
) -> dict[str, float]:
    """Loss, accuracy of the rewards and the curves of `measure_pairs` over `--eval_iters` mini-batches."""
    policy.eval()
    metrics = run.metrics()
    # Fewer rows than devices: one without any takes the first, which counts for nothing, to know the names.
    mine = [*run.batches(len(split), flags.eval_iters)]
    weight = 1.0 if mine else 0.0
    batches = [
        pair_logps(flags, policy, reference, pack_pairs(flags, split, rows).to(run.device), rows)
        for rows in mine or [[0]]
    ]
    pairs = PairLogps(*map(torch.cat, zip(*batches, strict=True)))
    partners = partners_of(run, flags, [pairs], counts=bool(mine))[0] if flags.sorts else None
    metrics.mean("val/loss", pair_losses(flags, pairs, partners), weight)
    measure_pairs(metrics, "val", flags, pairs, weight)
    if flags.uses_reference:
        metrics.add("val/kl_k3_per_token", pairs.kl.sum() * weight, pairs.lengths.sum() * weight)
    policy.train()
    values = metrics.reduce()
    for name, coef in (("val/chosen_nll", flags.chosen_nll_coef), ("val/path_nll", flags.path_nll_coef)):
        if coef:
            values["val/loss"] += coef * values[name]
    return values


def pack_pairs(flags: DPOFlags, split: Split, rows: Sequence[int]) -> Forest:
    """The trees of some pairs; ORPO's likelihood is of their prompts too."""
    return Forest([pair_tree(split[i], prompt_targets=flags.path_nll_coef > 0) for i in rows])


def partners_of(run: Run, flags: DPOFlags, batches: list[PairLogps], *, counts: bool) -> list[Partners]:
    """AOT's partners of the pairs of each batch, among all batches of all devices.

    Args:
        counts: False on a device whose batch only keeps the others company.
    """
    tables = [sides(flags, pairs).to(widest(run.device)) for pairs in batches]
    mine = torch.cat(tables if counts else [tables[0][:0]])
    owner = torch.full_like(mine[:, :1], run.rank)
    table = run.gather_rows(torch.cat([owner, mine], 1))
    found = torch.stack(match_sides(table[:, 1:]), 1)[table[:, 0] == run.rank].to(mine).float()
    if not counts:
        found = torch.zeros_like(tables[0][:, :3]).float()
    return [Partners(*part.unbind(1)) for part in found.split([len(t) for t in tables])]


@torch.no_grad()
def partners_of_step(
    run: Run,
    flags: DPOFlags,
    policy: nn.Module,
    reference: Reference | None,
    step: Step,
    pack: Callable[[list[int]], tuple[Forest, list[int]]],
    tokens: Tensor,
) -> Iterable[Partners | None]:
    """AOT's partners of each micro-batch of a step; None where it is the only one, and holds its own partners."""
    batches = list(step.micro_batches(pack, tokens=tokens))
    if len(batches) == run.world_size == 1:
        return repeat(None)
    policy.eval()
    pairs = [pair_logps(flags, policy, reference, forest.to(run.device), rows) for forest, rows in batches]
    policy.train()
    return partners_of(run, flags, pairs, counts=step.weight > 0)


def references_of(
    run: Run, flags: DPOFlags, policy: nn.Module, source: str, train: Split, validation: Split | None
) -> tuple[Reference | None, Reference | None]:
    """What gives the reference's log-probabilities of the rows of both splits that this run will use.

    Stored ones, or with `--ref_update_interval` a model, the same for both. None for a split that isn't there, and
    for both where the losses do without a reference.
    """
    if not flags.uses_reference:
        why = "--reference_free" if flags.reference_free else f"--loss_type {' '.join(flags.loss_type)}"
        run.say(f"rlhf_dpo: no reference ({why})")
        return None, None
    own = resolve(flags.reference, "reference") if flags.reference else source
    name = own if flags.reference else f"{source}, the policy as this run starts"
    if flags.ref_update_interval or flags.reference:
        model = load_policy(own, flags, trainable=False)
        run.check_reference(own, model)
    if flags.ref_update_interval:
        run.say(
            f"rlhf_dpo: the reference starts as {name}, and moves every {flags.ref_update_interval} steps; it stays in "
            f"memory, and none of its log-probabilities are stored"
        )
        moving = MovingReference(run, run.fabric.to_device(model), policy.module)
        return moving, moving
    if flags.reference:
        policy = run.fabric.setup_module(model)

    def stored(split: Split, rows: Sequence[int]):
        folder = Path(flags.data_dir) / "reference_logps"
        size = flags.micro_batch_size
        return reference_logps(run, policy, rows, lambda i: pair_tree(split[i]), folder, micro_batch_size=size)

    found = stored(train, run.rows_to_train(len(train))), None
    check_reference(run, found[0], train)
    if validation is not None:
        found = found[0], stored(validation, run.rows_to_evaluate(len(validation), flags.eval_iters))
    computed = sum(r.computed for r in found if r is not None)
    run.say(f"rlhf_dpo: the reference is {name}; {computed} of its log-probabilities computed, the others on disk")
    return found


def main(flags: DPOFlags) -> dict:
    """Train; returns the last evaluation and the experiment folder."""
    run = start_experiment(flags, "rlhf_dpo")
    name = "sft_experiment_dir" if flags.sft_experiment_dir else "model_name"
    source = resolve(getattr(flags, name), name)
    check_kind(source, flags)
    if flags.reference:
        check_kind(resolve(flags.reference, "reference"), flags)
    tokenizer = tokenizer_of(source, flags)
    train, validation = run.load_splits("preference", tokenizer)
    policy = run.setup(load_policy(source, flags))
    run.plan(len(train), what="pairs")
    reference, validation_reference = references_of(run, flags, policy, source, train, validation)
    optimizer = make_optimizer(policy.module, flags, flags.learning_rate)
    models, optimizers = {"model": policy.module}, {"optimizer": optimizer}
    if flags.ref_update_interval:
        models["reference"] = reference
    run.restore(models, optimizers)
    chosen_lens, prompt_lens = train.lengths("chosen_input_ids"), train.prompt_lens
    tokens = pair_tokens(prompt_lens, chosen_lens, train.lengths("rejected_input_ids"))

    def pack(rows: list[int]) -> tuple[Forest, list[int]]:
        return pack_pairs(flags, train, rows), rows

    def trial_loss(rows: list[int]) -> Tensor:
        pairs = pair_logps(flags, policy.module, reference, pack(rows)[0].to(run.device), rows)
        return pair_losses(flags, pairs).sum()

    check_memory(run, [Pass(policy.module, trial_loss)], optimizers, tokens)
    run.open()

    def assess() -> dict[str, float]:
        log_sample(run, policy.module, tokenizer)
        if validation is None:
            return {}
        values = evaluate(run, flags, policy, validation, validation_reference)
        drop = -values.get("val/chosen_logp_change_per_token", 0.0)
        if drop > flags.max_chosen_drop:
            run.say(
                f"warning: the chosen responses have lost {drop:.2f} nats a token; lower --learning_rate, raise "
                f"--beta or set --sft_coef"
            )
        if math.isfinite(values["val/loss"]):  # NaN rewards count as wrong ones in the accuracy
            run.save_best(policy.module, tokenizer, "val/accuracy", values["val/accuracy"], higher=True)
        return values

    for step in run.steps(len(train)):
        run.evaluate_if_due(assess)
        run.save_if_due(models, optimizers, tokenizer)
        num_pairs = len(step.global_rows)
        path_lens = chosen_lens[step.global_rows]
        num_chosen_tokens = int((path_lens - prompt_lens[step.global_rows]).sum())
        num_path_tokens = int((path_lens - 1).sum())
        partners = repeat(None)
        if flags.sorts:
            partners = partners_of_step(run, flags, policy, reference, step, pack, tokens)
        for (forest, rows), part in zip(step.micro_batches(pack, policy, tokens=tokens), partners, strict=False):
            pairs = pair_logps(flags, policy, reference, forest.to(run.device), rows)
            losses = pair_losses(flags, pairs, part)
            watch_pairs(step, pairs, losses)
            loss = losses.sum() / num_pairs
            loss = loss + flags.chosen_nll_coef * chosen_nll(pairs).sum() / num_chosen_tokens
            loss = loss + flags.path_nll_coef * path_nll(pairs).sum() / num_path_tokens
            step.backward(loss)
            step.metrics.add("train/loss", loss * num_pairs * step.weight, len(rows) * step.weight)
            measure_pairs(step.metrics, "train", flags, pairs, step.weight)
            step.num_tokens += forest.num_tokens
        step.update(optimizer, clip=flags.gradient_clip_val)
        if flags.ref_update_interval and (run.step_index + 1) % flags.ref_update_interval == 0:
            reference.update(flags.ref_mixup)
    return run.finish(models, optimizers, tokenizer, assess)


if __name__ == "__main__":
    launch(main, DPOFlags)
