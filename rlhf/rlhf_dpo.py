"""Direct preference optimisation: learn from pairs without a reward model or sampling.

    loss = - log sigmoid(beta * [(log pi(y_c|x) - log ref(y_c|x)) - (log pi(y_r|x) - log ref(y_r|x))])

(Rafailov et al. 2023, arXiv 2305.18290, eq. 7), or the IPO or hinge loss of the same margin
(`rlhf/losses/preference.py`). Each pair is one prompt tree. The reference is the policy as the run starts; its
log-probabilities are computed once, kept beside the data, and read back by every later run: no reference model is
in memory while training.

Deviations: (1) the mean is over the pairs of the step, all devices together. (2) `--sft_coef` adds that many times
the mean negative log-likelihood a token of the chosen responses (Pang et al. 2024, arXiv 2404.19733, eq. 2, which
normalises by each response's length).

CPU: python rlhf/rlhf_dpo.py --data_dir=data/hh --sft_experiment_dir=experiments/runs/sft --max_steps=100
GPU: fabric run --accelerator=cuda --devices=8 --strategy=ddp rlhf/rlhf_dpo.py --data_dir=data/hh \
     --sft_experiment_dir=experiments/runs/sft --micro_batch_tokens=16384
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlhf.data.splits import Split
from rlhf.errors import UserError
from rlhf.evaluation import log_sample
from rlhf.experiment.metrics import Metrics
from rlhf.experiment.optimizers import make_optimizer
from rlhf.experiment.reference import ReferenceLogps, reference_logps
from rlhf.experiment.run import Run, start_experiment
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
from rlhf.losses.preference import hinge_loss, implicit_rewards, ipo_loss, sigmoid_loss
from rlhf.losses.supervised import nll_loss
from rlhf.models.loading import load_policy, resolve, tokenizer_of
from rlhf.trees.forest import Forest
from rlhf.trees.rows import halves, pair_tokens, pair_tree


@dataclass(kw_only=True)
class DPOFlags(DataFlags, ModelFlags, BatchFlags, OptimizerFlags, GenerationFlags, RunFlags, DeviceFlags):
    """Direct preference optimisation."""

    sft_experiment_dir: str | None = None
    """Experiment (or model) that the policy starts from; it takes the place of --model_name."""
    reference: str | None = None
    """Experiment or model that is the reference; the policy as the run starts, unless set."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """DPO (eq. 7), IPO (Azar et al. 2023, eq. 17) or hinge (SLiC)."""
    beta: float = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong (conservative DPO); with --loss_type=sigmoid only."""
    reference_free: bool = False
    """Leave the reference out: its log-ratios are 0."""
    sft_coef: float = 0.0
    """Weight of the chosen responses' mean negative log-likelihood a token."""
    max_chosen_drop: float = 1.0
    """Warn once the chosen responses have lost this many nats a token against the reference."""

    def __post_init__(self) -> None:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise UserError(f"--label_smoothing has no meaning with --loss_type={self.loss_type}; leave it at 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        if self.beta <= 0:
            raise UserError(f"--beta={self.beta} must be above 0")
        if self.reference_free and self.reference:
            raise UserError("--reference and --reference_free contradict each other; leave one out")


def pair_losses(flags: DPOFlags, policy_logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> Tensor:
    """(B,) losses from the summed log-probabilities (2B,) of chosen and rejected in turn, and their lengths."""
    if flags.loss_type == "ipo":  # means over the tokens, see ipo_loss
        policy_logps, ref_logps = policy_logps / lengths, ref_logps / lengths
    logps = (*halves(policy_logps), *halves(ref_logps))
    if flags.loss_type == "ipo":
        return ipo_loss(*logps, beta=flags.beta)
    if flags.loss_type == "hinge":
        return hinge_loss(*logps, beta=flags.beta)
    return sigmoid_loss(*logps, beta=flags.beta, label_smoothing=flags.label_smoothing)


def measure(
    metrics: Metrics, prefix: str, beta: float, losses: Tensor, policy_logps: Tensor, ref_logps: Tensor,
    lengths: Tensor, weight: float = 1.0,
) -> None:  # fmt: skip
    """The curves that tell a fine run from a broken one: chosen and rejected apart, not their difference alone."""
    chosen, rejected = halves(implicit_rewards(policy_logps, ref_logps, beta=beta).detach())
    metrics.mean(f"{prefix}/loss", losses, weight)
    metrics.mean(f"{prefix}/accuracy", (chosen > rejected).float(), weight)
    metrics.mean(f"{prefix}/margin", chosen - rejected, weight)
    metrics.mean(f"{prefix}/chosen_reward", chosen, weight)
    metrics.mean(f"{prefix}/rejected_reward", rejected, weight)
    for name, change, tokens in zip(
        ("chosen", "rejected"), halves(policy_logps.detach() - ref_logps), halves(lengths), strict=True
    ):
        metrics.add(f"{prefix}/{name}_logp_change_per_token", change.sum() * weight, tokens.sum() * weight)


@torch.no_grad()
def evaluate(
    run: Run, flags: DPOFlags, policy: torch.nn.Module, split: Split, reference: ReferenceLogps | None
) -> dict[str, float]:
    """Loss, implicit-reward accuracy and the curves of `measure` over `--eval_iters` mini-batches."""
    policy.eval()
    metrics = run.metrics()
    # Fewer rows than devices: one without any takes the first, which counts for nothing, to know the names.
    mine = [*run.batches(len(split), flags.eval_iters)]
    weight = 1.0 if mine else 0.0
    for rows in mine or [[0]]:
        forest = Forest([pair_tree(split[i]) for i in rows]).to(run.device)
        token_logps, _ = policy(forest)
        policy_logps, lengths = forest.per_branch(token_logps), forest.target_mask.sum(1).clamp(min=1)
        ref_logps = torch.zeros_like(policy_logps) if reference is None else reference.sums(rows)
        losses = pair_losses(flags, policy_logps, ref_logps, lengths)
        measure(metrics, "val", flags.beta, losses, policy_logps, ref_logps, lengths, weight)
        if reference is not None:
            metrics.mean("val/kl_k3_per_token", kl_k3(token_logps, reference.tokens(rows)), weight)
    policy.train()
    return metrics.reduce()


def references_of(
    run: Run, flags: DPOFlags, policy: torch.nn.Module, source: str, train: Split, validation: Split | None
) -> tuple[ReferenceLogps | None, ReferenceLogps | None]:
    """Stored log-probabilities, under the reference, of the rows of both splits that this run will use.

    None for a split that isn't there, and for both with `--reference_free`.
    """
    if flags.reference_free:
        run.say("rlhf_dpo: no reference (--reference_free)")
        return None, None
    if flags.reference:
        name = resolve(flags.reference, "reference")
        policy = run.fabric.setup_module(load_policy(name, flags, trainable=False))
    else:
        name = f"{source}, the policy as this run starts"

    def stored(split: Split, rows: Sequence[int]) -> ReferenceLogps:
        folder = Path(flags.data_dir) / "reference_logps"
        size = flags.micro_batch_size
        return reference_logps(run, policy, rows, lambda i: pair_tree(split[i]), folder, micro_batch_size=size)

    found = stored(train, run.rows_to_train(len(train))), None
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
    tokenizer = tokenizer_of(source, flags)
    train, validation = run.load_splits("preference", tokenizer)
    policy = run.setup(load_policy(source, flags))
    run.plan(len(train), what="pairs")
    train_reference, validation_reference = references_of(run, flags, policy, source, train, validation)
    optimizer = make_optimizer(policy.module, flags, flags.learning_rate)
    models, optimizers = {"model": policy.module}, {"optimizer": optimizer}
    run.restore(models, optimizers)
    run.open()

    def assess() -> dict[str, float]:
        log_sample(run, policy.module, tokenizer)
        if validation is None:
            return {}
        values = evaluate(run, flags, policy, validation, validation_reference)
        drop = -values["val/chosen_logp_change_per_token"]
        if drop > flags.max_chosen_drop:
            run.say(
                f"warning: the chosen responses have lost {drop:.2f} nats a token; lower --learning_rate, raise "
                f"--beta or set --sft_coef"
            )
        run.save_best(policy.module, tokenizer, "val/accuracy", values["val/accuracy"], higher=True)
        return values

    def pack(rows: list[int]) -> tuple[Forest, list[int]]:
        return Forest([pair_tree(train[i]) for i in rows]), rows

    columns = train.lengths("chosen_input_ids"), train.lengths("rejected_input_ids")
    tokens = pair_tokens(train.prompt_lens, *columns)
    for step in run.steps(len(train)):
        run.evaluate_if_due(assess)
        run.save_if_due(models, optimizers, tokenizer)
        num_pairs = len(step.global_rows)
        num_chosen_tokens = int((columns[0] - train.prompt_lens)[step.global_rows].sum())
        for forest, rows in step.micro_batches(pack, policy, tokens=tokens):
            token_logps, _ = policy(forest.to(run.device))
            policy_logps, lengths = forest.per_branch(token_logps), forest.target_mask.sum(1).clamp(min=1)
            ref_logps = torch.zeros_like(policy_logps) if train_reference is None else train_reference.sums(rows)
            losses = pair_losses(flags, policy_logps, ref_logps, lengths)
            chosen_nll = nll_loss(halves(policy_logps)[0])
            step.backward(losses.sum() / num_pairs + flags.sft_coef * chosen_nll.sum() / num_chosen_tokens)
            measure(step.metrics, "train", flags.beta, losses, policy_logps, ref_logps, lengths, step.weight)
            step.metrics.add("train/chosen_nll", chosen_nll.sum() * step.weight, halves(lengths)[0].sum() * step.weight)
            step.num_tokens += forest.num_tokens
        step.update(optimizer, clip=flags.gradient_clip_val)
    return run.finish(models, optimizers, tokenizer, assess)


if __name__ == "__main__":
    launch(main, DPOFlags)
