"""Command-line flags: flat dataclasses, read by simple-parsing, grouped and checked the same way in every script.

A script declares `class DPOFlags(ModelFlags, DataFlags, ...)`; the docstring under a field is its help, and the
class that declares a field is its group in `--help`. `launch(main, DPOFlags)` is the whole of a script's
command line: it parses, runs `main(flags)`, and turns a `UserError` into one line and its exit status, 2 as a rule.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from simple_parsing import ArgumentParser, DashVariant
from simple_parsing.helpers import field

from rlhf.errors import LAST_WORDS, UserError

Flags = TypeVar("Flags")


def parse(flags_class: type[Flags], argv: Sequence[str] | None = None) -> Flags:
    """Read `flags_class` from the command line (default `sys.argv[1:]`).

    `--args_file args.json` supplies values first (the `args.json` of an experiment repeats its run); flags on the
    command line override it. Booleans take a value (`--shuffle=False`); dashes and underscores both work.

    A run's own args.json says what was run, not where: its repeat gets a folder of its own, and `--resume=True`
    beside it goes on in the folder in which the file lies. A file that stands elsewhere is taken word for word.

    Raises:
        UserError: an args file that is missing, not JSON, or holds a key that is no flag of this script.
        SystemExit: status 2, after argparse's one-line message, for an unknown flag or a value of a wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        description=_description(flags_class),
        add_option_string_dash_variants=DashVariant.UNDERSCORE_AND_DASH,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        add_config_path_arg=False,
    )
    args_file = _args_file(argv)
    default = None if args_file is None else _from_args_file(flags_class, args_file)
    parser.add_arguments(flags_class, dest="flags", default=default)
    parser._preprocessing(args=argv)  # simple-parsing adds the actions late; grouping needs them now
    _group_actions(parser, flags_class)
    flags = parser.parse_args(argv).flags
    if args_file is not None and _is_of_a_run(args_file) and flags.resume and flags.experiment_dir is None:
        flags.experiment_dir = str(args_file.parent)
    return flags


def launch(main: Callable[[Flags], Any], flags_class: type[Flags]) -> None:
    """Run a script: parse its flags, call `main`, and end with one sentence and its status on a `UserError`."""
    try:
        main(parse(flags_class))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        for tell in LAST_WORDS:
            tell(str(error))
        sys.exit(error.status)


def _description(flags_class: type) -> str:
    module = sys.modules.get(flags_class.__module__)
    return ((module and module.__doc__) or flags_class.__doc__ or "").strip()


def _args_file(argv: list[str]) -> Path | None:
    path = None
    for i, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name in ("--args_file", "--args-file"):
            path = Path(value or (argv[i + 1] if i + 1 < len(argv) else ""))
    return path


def _is_of_a_run(path: Path) -> bool:
    return path.name == "args.json" and (path.parent / "environment.json").is_file()


def _from_args_file(flags_class: type[Flags], path: Path) -> Flags:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--args_file {path}: no such file; give the args.json of an experiment") from None
    except ValueError as error:
        raise UserError(
            f"--args_file {path} is not valid JSON ({error}); give the args.json of an experiment"
        ) from None
    fields = {field.name for field in dataclasses.fields(flags_class)}
    unknown = sorted(set(values) - fields) if isinstance(values, dict) else None
    if unknown is None:
        raise UserError(f"--args_file {path} holds no JSON object; give the args.json of an experiment")
    if unknown:
        raise UserError(f"--args_file {path}: {unknown[0]!r} is not a flag of this script; remove it")
    required = {
        field.name
        for field in dataclasses.fields(flags_class)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if required - set(values):
        raise UserError(f"--args_file {path} lacks {sorted(required - set(values))[0]!r}; add it")
    if _is_of_a_run(path):
        values = {name: value for name, value in values.items() if name not in ("experiment_dir", "resume")}
    return flags_class(**values)


def _group_actions(parser: argparse.ArgumentParser, flags_class: type) -> None:
    """Re-sort the parser's actions into one titled group for each class that declares fields."""
    owner = {}
    for cls in reversed(flags_class.__mro__):
        for name in inspect.get_annotations(cls):
            owner.setdefault(name, cls)
    moved = []
    for group in list(parser._action_groups):
        for action in list(group._group_actions):
            if action.dest.startswith("flags."):
                group._group_actions.remove(action)
                moved.append(action)
    for cls in flags_class.__mro__:
        actions = [action for action in moved if owner.get(action.dest.removeprefix("flags.")) is cls]
        if actions:
            doc = (cls.__doc__ or cls.__name__).strip().split("\n")[0].rstrip(".")
            parser.add_argument_group(doc)._group_actions.extend(actions)
    parser._action_groups = [group for group in parser._action_groups if group._group_actions]


class _HelpFormatter(argparse.HelpFormatter):
    """One flag a line in the usage's place: a usage line with eighty flags helps nobody."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        super().add_usage(usage or "%(prog)s --flag=value ...", actions, groups, prefix)

    def _format_text(self, text: str) -> str:
        return text.strip("\n") + "\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = min(
            action.option_strings,
            key=lambda option: ("-" in option[2:], not option.startswith("--"), len(option)),
        )
        return ", ".join([name, *[o for o in action.option_strings if _is_alias(o, name)]])

    def _expand_help(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").replace("(default: %(default)s)", "").split())
        if action.choices:
            text += f" One of {', '.join(str(choice) for choice in action.choices)}."
        if action.dest != "help" and action.default not in (None, argparse.SUPPRESS, dataclasses.MISSING):
            text += f" (default: {action.default})"
        return text


def _is_alias(option: str, name: str) -> bool:
    """Whether `option` is a second name of the flag `name`, and neither a dashed spelling nor its --no form."""
    return option.startswith("--") and "-" not in option[2:] and option not in (name, f"--no{name[2:]}")


@dataclass(kw_only=True)
class ModelFlags:
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
class DataFlags:
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
class BatchFlags:
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
class OptimizerFlags:
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
    """Steps with a non-finite loss or gradient norm that are skipped before the run stops."""


@dataclass(kw_only=True)
class RunFlags:
    """Experiment folder, evaluation and logging."""

    experiment_dir: str | None = None
    """Folder of this run; experiments/runs/<script>-<time> unless set."""
    resume: bool = False
    """Go on from the last whole checkpoint in --experiment_dir, to the weights of the run that never stopped."""
    save_interval: int = 1000
    """Optimiser steps between checkpoints; 0: none but the final model."""
    keep_checkpoints: int = 2
    """Latest checkpoints kept (the best one is kept besides); 0 keeps all."""
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
class DeviceFlags:
    """Devices, all through Lightning Fabric."""

    accelerator: str = "auto"
    """cpu, cuda, mps, or auto."""
    devices: str = "auto"
    """How many devices on each node, or auto."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How devices share the work; auto is ddp on several devices."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """32-true, or bf16-mixed (bf16 products, float32 weights); auto: the latter where the hardware is fast at it."""


@dataclass(kw_only=True)
class GenerationFlags:
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
class RewardFlags:
    """Rewards of sampled responses."""

    reward: list[str] = dataclasses.field(default_factory=list)
    """Rewards that are added up, each [WEIGHT*]KIND[:ARGUMENT]: model:FOLDER, function:FILE.py:NAME, http:URL, exact,
    numeric[:TOLERANCE], regex:PATTERN, length:TOKENS, overlong:FROM:TO, repetition[:N] or keyword:WORD,WORD."""
    reward_timeout: float = 60.0
    """Seconds that one call of a function or of a URL may take; 0: no limit, and functions run in the main thread."""
    rm_experiment_dir: str | None = None
    """Experiment (or model) of a reward model: the same as model:FOLDER, of weight 1, in --reward."""


def check_positive(flags: Any, *names: str) -> None:
    """Raise `UserError` for the first of these flags that is set and not above 0."""
    for name in names:
        value = getattr(flags, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name}={value} must be above 0")


def check_not_negative(flags: Any, *names: str) -> None:
    """Raise `UserError` for the first of these flags that is set and below 0."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < 0:
            raise UserError(f"--{name}={value} must not be below 0")


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
