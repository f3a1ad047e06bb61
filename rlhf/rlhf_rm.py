"""Reward model: a scalar head that scores the preferred of two responses higher.

    loss = - log sigmoid(r(x, y_chosen) - r(x, y_rejected))    (Ouyang et al. 2022, arXiv 2203.02155, eq. 1)

Each pair is one prompt tree: the prompt goes through the model once. After training the whole validation split is
scored, whatever --eval_iters: for report.json, and to shift and scale the scores so that its chosen responses have
mean 0 and deviation 1 ("The N Implementation Details of RLHF with PPO", reward detail 3). The two numbers are kept in
the model's config.json as `reward_mean` and `reward_scale`; PPO's reward is (score - reward_mean) / reward_scale.

Deviations: (1) the mean is over the pairs of the step, all devices together; InstructGPT averages over the
K-choose-2 comparisons of one prompt. (2) The head has no bias: `AutoModelForSequenceClassification` has none, and
a bias cancels in the loss.

CPU: python rlhf/rlhf_rm.py --data_dir=data/hh --sft_experiment_dir=experiments/runs/sft --max_steps=100
GPU: fabric run --accelerator=cuda --devices=8 --strategy=ddp rlhf/rlhf_rm.py --data_dir=data/hh \
     --sft_experiment_dir=experiments/runs/sft --micro_batch_tokens=16384
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.data.splits import Split
from rlhf.errors import NonFiniteError
from rlhf.experiment.optimizers import make_optimizer
from rlhf.experiment.preflight import Pass, check_memory
from rlhf.experiment.run import Run
from rlhf.experiment.start import start_experiment
from rlhf.files import write_json
from rlhf.flags import BatchFlags, DataFlags, DeviceFlags, ModelFlags, OptimizerFlags, RunFlags, launch
from rlhf.losses.reward import average_reward_loss, last_token_reward_loss, per_sample_reward_loss
from rlhf.models.loading import load_scorer, resolve, tokenizer_of
from rlhf.reports import preference_report
from rlhf.trees.forest import Forest
from rlhf.trees.rows import first_difference, halves, pair_tokens, pair_tree


@dataclass(kw_only=True)
class RMFlags(DataFlags, ModelFlags, BatchFlags, OptimizerFlags, RunFlags, DeviceFlags):
    """Reward model."""

    sft_experiment_dir: str | None = None
    """Experiment (or model) that the reward model starts from; it takes the place of --model_name."""
    disable_dropout: bool = True
    """Set every dropout probability of the model to 0, so that a pair's score is one number."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    loss_type: Literal["last_token", "average", "per_sample"] = "last_token"
    """Which scores are compared: at the last tokens; their means over the responses; or at every position from
    the first difference on."""


def pack(split: Split, rows: list[int]) -> tuple[Forest, Tensor]:
    """The forest of these pairs, and the (B,) index of the first difference of each."""
    pairs = [split[i] for i in rows]
    return Forest([pair_tree(row) for row in pairs]), torch.tensor([first_difference(row) for row in pairs])


def pair_losses(
    scorer: torch.nn.Module, forest: Forest, differ: Tensor, loss_type: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and scores of the chosen and the rejected responses at their last tokens: three (B,) tensors."""
    if loss_type == "last_token":
        chosen, rejected = halves(scorer(forest, forest.branch_last))
        return last_token_reward_loss(chosen, rejected), chosen, rejected
    scores = forest.dense(scorer(forest, forest.target_index))
    mask = forest.target_mask
    last = mask.sum(1, keepdim=True).clamp(min=1) - 1
    chosen, rejected = halves(scores.gather(1, last).squeeze(1))
    (chosen_scores, rejected_scores), (chosen_mask, rejected_mask) = halves(scores), halves(mask)
    if loss_type == "average":
        losses = average_reward_loss(chosen_scores, chosen_mask, rejected_scores, rejected_mask)
    else:
        losses = per_sample_reward_loss(chosen_scores, chosen_mask, rejected_scores, rejected_mask, differ)
    return losses, chosen, rejected


@torch.no_grad()
def evaluate(run: Run, scorer: torch.nn.Module, split: Split, loss_type: str, limit: int) -> dict[str, Tensor]:
    """Scores of the validation pairs, gathered from all devices: `loss`, `chosen`, `rejected`, `row`, (N,) each.

    Raises:
        NonFiniteError: some are not finite; no mean, deviation or report can be made of them.
    """
    scorer.eval()
    parts: list[Tensor] = [torch.empty(0, 4, device=run.device)]
    for rows in run.batches(len(split), limit):
        forest, differ = pack(split, rows)
        losses, chosen, rejected = pair_losses(scorer, forest.to(run.device), differ.to(run.device), loss_type)
        parts.append(torch.stack([losses, chosen, rejected, torch.tensor(rows, device=run.device).float()], 1))
    scorer.train()
    table = run.gather_rows(torch.cat(parts))
    table = table[table[:, 3].argsort()]
    if not table.isfinite().all():
        bad = table[~table.isfinite().all(1), 3].long().tolist()
        raise NonFiniteError(f"the scores of rows {bad} of {split.path} are not finite")
    return dict(zip(("loss", "chosen", "rejected", "row"), table.double().unbind(1), strict=True))


def main(flags: RMFlags) -> dict:
    """Train; returns the last evaluation and the experiment folder."""
    run = start_experiment(flags, "rlhf_rm")
    name = "sft_experiment_dir" if flags.sft_experiment_dir else "model_name"
    source = resolve(getattr(flags, name), name)
    tokenizer = tokenizer_of(source, flags)
    train, validation = run.load_splits("preference", tokenizer)
    scorer = run.setup(load_scorer(source, flags, new_head=True))
    optimizer = make_optimizer(scorer.module, flags, flags.learning_rate)
    run.plan(len(train), what="pairs")
    models, optimizers = {"model": scorer.module}, {"optimizer": optimizer}
    run.restore(models, optimizers)
    columns = train.lengths("chosen_input_ids"), train.lengths("rejected_input_ids")
    tokens = pair_tokens(train.prompt_lens, *columns)

    def trial_loss(rows: list[int]) -> Tensor:
        forest, differ = pack(train, rows)
        return pair_losses(scorer.module, forest.to(run.device), differ.to(run.device), flags.loss_type)[0].sum()

    check_memory(run, [Pass(scorer.module, trial_loss)], optimizers, tokens)
    run.open()

    def assess() -> dict[str, float]:
        if validation is None:
            return {}
        at_end = run.step_index == run.total_steps
        scores = evaluate(run, scorer, validation, flags.loss_type, 0 if at_end else flags.eval_iters)
        chosen, rejected = scores["chosen"], scores["rejected"]
        if at_end and run.rank == 0:
            report = preference_report(
                chosen,
                rejected,
                chosen_lens=validation.lengths("chosen_input_ids") - validation.prompt_lens,
                rejected_lens=validation.lengths("rejected_input_ids") - validation.prompt_lens,
                prompt_lens=validation.prompt_lens,
                batch_size=run.global_batch,
            )
            write_json(run.folder / "report.json", report)
        scorer.module.reward_mean = chosen.mean().item()
        scorer.module.reward_scale = max(chosen.std(correction=0).item(), 1e-6)
        values = {
            "val/loss": scores["loss"].mean().item(),
            "val/accuracy": (chosen > rejected).double().mean().item(),
            "val/margin": (chosen - rejected).mean().item(),
        }
        run.save_best(scorer.module, tokenizer, "val/accuracy", values["val/accuracy"], higher=True)
        return values

    for step in run.steps(len(train)):
        run.evaluate_if_due(assess)
        run.save_if_due(models, optimizers, tokenizer)
        for forest, differ in step.micro_batches(lambda rows: pack(train, rows), scorer, tokens=tokens):
            losses, chosen, rejected = pair_losses(
                scorer, forest.to(run.device), differ.to(run.device), flags.loss_type
            )
            step.watch("scores", torch.stack([chosen, rejected], 1))
            step.watch("losses", losses)
            step.backward(losses.sum() / len(step.global_rows))
            step.metrics.mean("train/loss", losses, step.weight)
            step.metrics.mean("train/accuracy", (chosen > rejected).float(), step.weight)
            step.metrics.mean("train/margin", chosen - rejected, step.weight)
            step.metrics.mean("train/chosen_score", chosen, step.weight)
            step.metrics.mean("train/rejected_score", rejected, step.weight)
            step.num_tokens += forest.num_tokens
        step.update(optimizer, clip=flags.gradient_clip_val)

    return run.finish(models, optimizers, tokenizer, assess)


if __name__ == "__main__":
    launch(main, RMFlags)
