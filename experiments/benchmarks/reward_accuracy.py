"""Held-out accuracy of a reward model trained here and by TRL's RewardTrainer, at the same budget on the same pairs.

    python experiments/benchmarks/reward_accuracy.py --data_dir=data/hh --model_name=models/smollm2-135m-instruct \
        --output_dir=experiments/runs/reward_accuracy

Both train one epoch on `preference_train.pt` with the same batch, rate, schedule, optimiser and precision, each
in its own order, and are scored on `preference_validation.pt` by the same code. Prints the two accuracies with their
95 % intervals, the seconds, and whether ours is within the error bar of TRL's or above.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from rlhf.allocator import keep_freed_memory
from rlhf.data.splits import Split, load_split
from rlhf.experiment.devices import fast_bf16
from rlhf.files import write_json
from rlhf.flags import ModelFlags, launch
from rlhf.models.loading import load_scorer, resolve, tokenizer_of
from rlhf.reports import accuracy_of
from rlhf.rlhf_rm import RMFlags
from rlhf.rlhf_rm import main as train_here
from rlhf.trees.forest import Forest
from rlhf.trees.rows import halves, pair_tree


@dataclass(kw_only=True)
class AccuracyFlags(ModelFlags):
    """Reward-model accuracy beside TRL's."""

    data_dir: str
    """Folder with preference_train.pt and preference_validation.pt."""
    output_dir: str
    """Folder for both runs and accuracy.json."""
    learning_rate: float = 1e-5
    """Peak rate of both, cosine to 0."""
    batch_size: int = 8
    """Pairs of one optimiser step of both."""
    max_steps: int = -1
    """Fewer steps than the epoch, of both; -1: the whole epoch."""
    seed: int = 42
    """Seed of both."""


def accuracy(folder: str, split: Split, flags: AccuracyFlags) -> dict:
    """Accuracy of the reward model in `folder` on every pair of the split."""
    scorer = load_scorer(folder, flags, trainable=False)
    right = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16("cpu")):
        for start in range(0, len(split), 8):
            forest = Forest([pair_tree(split[i]) for i in range(start, min(start + 8, len(split)))])
            chosen, rejected = halves(scorer(forest, forest.branch_last))
            right.append(chosen > rejected)
    return accuracy_of(torch.cat(right))


def train_trl(source: str, train: Split, flags: AccuracyFlags) -> str:
    """TRL's RewardTrainer on the same token ids; returns the folder of its model."""
    from trl import RewardConfig, RewardTrainer

    tokenizer = tokenizer_of(source, flags)
    torch.manual_seed(flags.seed)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = [
        {"chosen_ids": row["chosen_input_ids"].tolist(), "rejected_ids": row["rejected_input_ids"].tolist()}
        for row in train
    ]
    folder = str(Path(flags.output_dir) / "trl")
    settings = RewardConfig(
        output_dir=folder,
        per_device_train_batch_size=flags.batch_size,
        learning_rate=flags.learning_rate,
        lr_scheduler_type="cosine",
        num_train_epochs=1,
        max_steps=flags.max_steps,
        max_length=None,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=fast_bf16("cpu"),
        use_cpu=True,
        gradient_checkpointing=False,
        disable_dropout=True,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=flags.seed,
    )
    trainer = RewardTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(folder)
    return folder


def main(flags: AccuracyFlags) -> dict:
    """Train both, score both; returns the table."""
    keep_freed_memory()
    source = resolve(flags.model_name, "model_name")
    train, validation = (load_split(flags.data_dir, "preference", name) for name in ("train", "validation"))
    began = time.perf_counter()
    ours = train_here(
        RMFlags(
            data_dir=flags.data_dir,
            model_name=source,
            experiment_dir=str(Path(flags.output_dir) / "ours"),
            learning_rate=flags.learning_rate,
            mini_batch_size=flags.batch_size,
            micro_batch_size=flags.batch_size,
            max_steps=None if flags.max_steps < 0 else flags.max_steps,
            eval_interval=0,
            save_interval=0,
            logger="none",
            accelerator="cpu",
            seed=flags.seed,
        )
    )
    middle = time.perf_counter()
    peer = train_trl(source, train, flags)
    end = time.perf_counter()
    results = {
        "ours": {**accuracy(str(Path(ours["experiment_dir"]) / "final"), validation, flags), "seconds": middle - began},
        "trl": {**accuracy(peer, validation, flags), "seconds": end - middle},
    }
    for name, found in results.items():
        low, high = found["interval"]
        print(
            f"{name:5} accuracy {100 * found['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] on {found['n']} "
            f"pairs after {found['seconds']:.0f} s"
        )
    write_json(Path(flags.output_dir) / "accuracy.json", results)
    return results


if __name__ == "__main__":
    launch(main, AccuracyFlags)
