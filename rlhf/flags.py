"""The flags that scripts share: flat dataclasses, grouped and checked the same way in every script.

A script declares `class DPOFlags(ModelFlags, DataFlags, ...)`; the docstring under a field is its help, and the
class that declares a field is its group in `--help`. What a value may be alone stands in `rlhf/flag_values.py`; what
flags mean beside each other is checked by the class that declares them, in `__post_init__`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from simple_parsing.helpers import field

from rlhf.command_line import launch as launch
from rlhf.command_line import parse as parse
from rlhf.errors import UserError
from rlhf.flag_values import RANGES, check_numbers


@dataclass(kw_only=True)
class CheckedFlags:
    """Flags whose numbers are checked one by one as they are made; those that refine `__post_init__` call this one."""

    ranges = RANGES

    def __post_init__(self) -> None:
        check_numbers(self, self.ranges)


@dataclass(kw_only=True)
class ModelFlags(CheckedFlags):
    """Model."""

    model_name: str | None = field(default=None, alias="--model_name_or_path")
    """Pretrained model: a hub id or a local folder. Not needed where an earlier stage's folder is given."""
    finetune_mode: Literal["all", "last_layer", "lora"] = "all"
    """What is trained: every weight, the last block with the final norm and head, or low-rank adapters."""
    lora_rank: int | None = None
    """Rank of the adapters; 8 unless set, or the rank of the adapter that is continued."""
    lora_alpha: float | None = None
    """Scale of the adapters is lora_alpha / lora_rank; twice the rank unless set."""
    lora_dropout: float | None = None
    """Dropout before the adapters; 0 unless set."""
    lora_targets: list[str] | None = None
    """Names of the linear layers that get adapters; all but the head unless set."""
    disable_dropout: bool = False
    """Set every dropout probability of the model to 0."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Off: such a model is refused."""


@dataclass(kw_only=True)
class DataFlags(CheckedFlags):
    """Data."""

    data_dir: str
    """Folder written by a prepare_data.py."""
    shuffle: bool = True
    """Visit the training rows in a new seeded order every epoch. False: in file order."""
    seed: int = 42
    """Seed of the data order, dropout, sampling and new weights."""
    num_workers: int = 0
    """Threads that pack micro-batches ahead of the step that trains on them. 0: packed as they are needed."""


@dataclass(kw_only=True)
class BatchFlags(CheckedFlags):
    """Batches and length of the run."""

    epochs: float = 1.0
    """Passes over the training rows; a fraction is allowed."""
    max_steps: int | None = None
    """Stop after this many optimiser steps, whatever --epochs says."""
    mini_batch_size: int = 8
    """Samples (rows, pairs, rollouts) of one optimiser step on one device."""
    micro_batch_size: int = 8
    """Samples that go through the model at once; the gradient does not depend on it."""
    micro_batch_tokens: int | None = None
    """Instead of --micro_batch_size: fill each micro-batch up to this many distinct tokens."""


@dataclass(kw_only=True)
class OptimizerFlags(CheckedFlags):
    """Optimiser and schedule."""

    optimizer: Literal["adamw", "adam", "adam_tf", "sgd"] = "adamw"
    """AdamW (decoupled weight decay), Adam, Adam with TensorFlow's place for epsilon, or plain SGD."""
    weight_decay: float = 0.0
    """Weight decay of matrices; norms, biases and embeddings are never decayed."""
    optimizer_eps: float = 1e-8
    """Epsilon of Adam."""
    optimizer_beta1: float = 0.9
    """First-moment decay of Adam; momentum of SGD is 0."""
    optimizer_beta2: float = 0.999
    """Second-moment decay of Adam."""
    gradient_clip_val: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    lr_warmup_steps: int = 0
    """Optimiser steps of linear warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after the warm-up: not at all, or to 0 along a line or a cosine."""
    skip_nonfinite_steps: int = 0
    """Updates and rollouts with a loss, gradient, log-probability, value, reward or advantage that is not finite, which
    are skipped, as if they had not been, before the run stops."""


@dataclass(kw_only=True)
class RunFlags(CheckedFlags):
    """Experiment folder, evaluation and logging."""

    experiment_dir: str | None = None
    """Folder of this run; experiments/runs/<script>-<time> unless set."""
    resume: bool = False
    """Go on from the last whole checkpoint in --experiment_dir, to the weights of the run that never stopped."""
    save_interval: int = 1000
    """Optimiser steps between checkpoints; one more comes after the last step. 0: none but the final model."""
    keep_checkpoints: int = 2
    """Latest checkpoints kept, besides the best one and, while a guard fires, the last from before; 0 keeps all."""
    keep_weights: int = 0
    """Checkpoints before those of which the weights alone (their model/) are kept."""
    eval_interval: int = 100
    """Optimiser steps between evaluations; 0: only at the end."""
    eval_iters: int = 100
    """Mini-batches of the validation split in one evaluation; 0: all of it."""
    memory_check: Literal["auto", "estimate", "trial", "none"] = "auto"
    """Before the first step: estimate the memory that the run takes at its peak, about as long as one micro-batch; on
    CUDA (auto), or anywhere (trial), also try the largest micro-batch, forward and backward."""
    log_interval: int = 1
    """Optimiser steps between lines of metrics.jsonl and of the logger."""
    logger: Literal["tensorboard", "csv", "wandb", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl."""
    args_file: str | None = None
    """JSON file of flags, such as the args.json of a run to repeat in a new folder; flags on the command line win."""


@dataclass(kw_only=True)
class DeviceFlags(CheckedFlags):
    """Devices, all through Lightning Fabric."""

    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto"
    """What to run on; auto: the fastest there is. gpu is cuda or mps."""
    devices: str = "auto"
    """How many devices on each node, or auto."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How devices share the work; auto is ddp on several devices."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """32-true, or bf16-mixed (bf16 products, float32 weights); auto: the latter where the hardware is fast at it."""


@dataclass(kw_only=True)
class GenerationFlags(CheckedFlags):
    """Generation."""

    max_new_tokens: int = 64
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Logits are divided by this before sampling."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability; 1: all."""
    do_sample: bool = True
    """False: always the likeliest token."""


@dataclass(kw_only=True)
class RewardFlags(CheckedFlags):
    """Rewards of sampled responses."""

    reward: list[str] = dataclasses.field(default_factory=list)
    """Rewards that are added up, each [WEIGHT*]KIND[:ARGUMENT]: model:FOLDER, function:FILE.py:NAME, http:URL, exact,
    numeric[:TOLERANCE], regex:PATTERN, length:TOKENS, overlong:FROM:TO, repetition[:N] or keyword:WORD,WORD."""
    reward_timeout: float = 60.0
    """Seconds that one call of a function or of a URL may take; 0: no limit, and functions run in the main thread."""
    rm_experiment_dir: str | None = None
    """Experiment (or model) of a reward model: the same as model:FOLDER, of weight 1, in --reward."""


def check_positive(flags: Any, *names: str) -> None:
    """Raise `UserError` for the first of these flags that is set and not above 0.

    For flags of one script whose names have no range in `rlhf/flag_values.py`.
    """
    for name in names:
        value = getattr(flags, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name}={value} must be above 0")


def check_on_policy(flags: Any, algorithm: str) -> None:
    """Raise `UserError` where a run would learn from another distribution than the one that it samples from.

    Args:
        algorithm: its name, for the user.
    """
    if flags.top_k or flags.top_p != 1.0 or not flags.do_sample:
        raise UserError(
            f"{algorithm} trains on the distribution that it samples from: leave --top_k=0, --top_p=1 and "
            f"--do_sample=True (--temperature is applied in training too)"
        )
    if not flags.disable_dropout:
        raise UserError(f"{algorithm} needs dropout off in every role; leave --disable_dropout=True")
    if flags.rollout_size % flags.mini_batch_size:
        nearest = max(1, round(flags.rollout_size / flags.mini_batch_size)) * flags.mini_batch_size
        raise UserError(
            f"--rollout_size={flags.rollout_size} is no multiple of --mini_batch_size={flags.mini_batch_size}; the "
            f"nearest is {nearest}"
        )
