"""Supervised fine-tuning: maximise the log-likelihood of responses given their prompts.

    loss = - sum_t log pi(y_t | x, y_<t) / (number of supervised tokens of the whole step)

over all rows of an optimiser step, on all devices (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).

Deviations: (1) the mean is over the tokens of the step, not of each row or micro-batch, so that the gradient does
not depend on how the step is cut.

CPU: python rlhf/rlhf_sft.py --data_dir=data/hh --model_name=HuggingFaceTB/SmolLM2-135M --max_steps=100
GPU: fabric run --accelerator=cuda --devices=8 --strategy=ddp rlhf/rlhf_sft.py --data_dir=data/hh \
     --model_name=HuggingFaceTB/SmolLM2-1.7B --micro_batch_tokens=16384
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlhf.data.splits import Split
from rlhf.evaluation import log_sample
from rlhf.experiment.optimizers import make_optimizer
from rlhf.experiment.preflight import Pass, check_memory
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
from rlhf.losses.supervised import nll_loss
from rlhf.models.loading import load_policy, resolve, tokenizer_of
from rlhf.trees.forest import Forest
from rlhf.trees.rows import finetune_tree


@dataclass(kw_only=True)
class SFTFlags(DataFlags, ModelFlags, BatchFlags, OptimizerFlags, GenerationFlags, RunFlags, DeviceFlags):
    """Supervised fine-tuning."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    use_targets: bool = True
    """Loss on the responses only (the rows' `targets`). False: on every token, prompts too."""


@torch.no_grad()
def evaluate(run: Run, policy: torch.nn.Module, split: Split, use_targets: bool) -> dict[str, float]:
    """Mean negative log-likelihood a token, and its exponential, over `--eval_iters` mini-batches."""
    policy.eval()
    metrics = run.metrics()
    metrics.add("val/loss", 0.0, 0.0)
    for rows in run.batches(len(split), run.flags.eval_iters):
        forest = Forest([finetune_tree(split[i], use_targets) for i in rows]).to(run.device)
        token_logps, _ = policy(forest)
        metrics.add("val/loss", nll_loss(token_logps).sum(), forest.num_targets)
    policy.train()
    loss = metrics.reduce()["val/loss"]
    return {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}


def main(flags: SFTFlags) -> dict:
    """Train; returns the last evaluation and the experiment folder."""
    run = start_experiment(flags, "rlhf_sft")
    source = resolve(flags.model_name, "model_name")
    tokenizer = tokenizer_of(source, flags)
    train, validation = run.load_splits("finetune", tokenizer)
    policy = run.setup(load_policy(source, flags))
    optimizer = make_optimizer(policy.module, flags, flags.learning_rate)
    run.plan(len(train))
    models, optimizers = {"model": policy.module}, {"optimizer": optimizer}
    run.restore(models, optimizers)
    lengths = train.lengths("input_ids")

    def pack(rows: list[int]) -> Forest:
        return Forest([finetune_tree(train[i], flags.use_targets) for i in rows])

    def trial_loss(rows: list[int]) -> torch.Tensor:
        return nll_loss(policy.module(pack(rows).to(run.device))[0]).sum()

    check_memory(run, [Pass(policy.module, trial_loss)], optimizers, lengths)
    run.open()

    def assess() -> dict[str, float]:
        log_sample(run, policy.module, tokenizer)
        if validation is None:
            return {}
        values = evaluate(run, policy, validation, flags.use_targets)
        run.save_best(policy.module, tokenizer, "val/loss", values["val/loss"], higher=False)
        return values

    for step in run.steps(len(train)):
        run.evaluate_if_due(assess)
        run.save_if_due(models, optimizers, tokenizer)
        num_targets = pack(step.global_rows).num_targets
        for forest in step.micro_batches(pack, policy, tokens=lengths):
            token_logps, _ = policy(forest.to(run.device))
            step.watch("log-probabilities", token_logps, forest)
            loss = nll_loss(token_logps).sum()
            step.backward(loss / max(1, num_targets))
            step.metrics.add("train/loss", loss * step.weight, forest.num_targets * step.weight)
            step.num_tokens += forest.num_tokens
        step.update(optimizer, clip=flags.gradient_clip_val)
    return run.finish(models, optimizers, tokenizer, assess)


if __name__ == "__main__":
    launch(main, SFTFlags)
