"""Checkpoints that appear whole or not at all, and exact resume from the last of them.

checkpoints/step-00000100/   model/ (a Hugging Face folder), <other>.safetensors, <optimizer>.pt, state.json
checkpoints/last             link to the newest
checkpoints/best/            model/ and best.json: the weights of the best evaluation so far
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from rlhf.errors import UserError
from rlhf.files import atomic_dir
from rlhf.models.loading import Role, save_model

FREE_TO_CHANGE = {
    "accelerator",
    "args_file",
    "devices",
    "eval_interval",
    "eval_iters",
    "experiment_dir",
    "gradient_checkpointing",
    "guard_empty",
    "guard_eos",
    "guard_kl",
    "guard_length",
    "guard_patience",
    "guard_repetition",
    "guard_score",
    "keep_checkpoints",
    "log_interval",
    "logger",
    "memory_check",
    "micro_batch_size",
    "micro_batch_tokens",
    "num_nodes",
    "num_workers",
    "on_collapse",
    "resume",
    "rollout_mini_batch_size",
    "save_interval",
    "skip_nonfinite_steps",
    "strategy",
}
"""Flags that a resumed run may change: none of them changes its weights but by rounding (and dropout's masks)."""

PER_DEVICE = ("mini_batch_size", "rollout_size")
"""Flags that count on each device: a resumed run may share the same rows out over another number of devices."""


BROKEN = (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError)
"""What reading a file raises that was cut, emptied or overwritten."""


class Checkpoints:
    """The `checkpoints` folder of one run.

    Args:
        keep: how many of the latest are kept; 0 keeps all.
        world_size: devices that share the rows of a step.
    """

    def __init__(self, folder: Path, *, keep: int, world_size: int = 1) -> None:
        self.folder, self.keep, self.world_size = folder, keep, world_size

    def save(
        self,
        step: int,
        flags: Any,
        models: dict[str, Role],
        optimizers: dict[str, Optimizer],
        tokenizer: Any,
        extra: dict[str, Any],
    ) -> None:
        """Write `step-<step>`; the model named "model" as a Hugging Face folder, others as their trained tensors."""
        target = self.folder / f"step-{step:08d}"
        with atomic_dir(target) as temporary:
            for name, role in models.items():
                if name == "model":
                    save_model(role, tokenizer, temporary / "model")
                else:
                    save_file(_trained(role), temporary / f"{name}.safetensors")
            for name, optimizer in optimizers.items():
                torch.save(optimizer.state_dict(), temporary / f"{name}.pt")
            flags_now = dataclasses.asdict(flags)
            state = {"step": step, "flags": flags_now, "world_size": self.world_size, "extra": extra}
            (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        link = self.folder / f".last.{os.getpid()}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        os.replace(link, self.folder / "last")
        for old in self.steps()[: -self.keep] if self.keep else []:
            shutil.rmtree(old)

    def save_best(self, step: int, role: Role, tokenizer: Any, metric: str, value: float, *, higher: bool) -> None:
        """Replace `best` where `value` is better than what it holds."""
        record = self.folder / "best" / "best.json"
        if record.is_file():
            best = json.loads(record.read_text(encoding="utf-8"))["value"]
            if value <= best if higher else value >= best:
                return
        with atomic_dir(self.folder / "best") as temporary:
            save_model(role, tokenizer, temporary / "model")
            content = json.dumps({"step": step, "metric": metric, "value": value}, indent=2)
            (temporary / "best.json").write_text(content + "\n", encoding="utf-8")

    def steps(self) -> list[Path]:
        """The folders `step-*`, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def load_last(
        self, flags: Any, models: dict[str, Role], optimizers: dict[str, Optimizer]
    ) -> tuple[int, dict[str, Any]]:
        """Load the newest whole checkpoint in place; broken ones are named and passed over.

        Returns:
            The number of steps it was saved after, and the extra state.

        Raises:
            UserError: no checkpoint is whole, one is of another model, or the flags would make it another run.
        """
        for folder in reversed(self.steps()):
            try:
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                optimizer_states = {
                    name: torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu")
                    for name in optimizers
                }
                weights = {name: _read(folder, name, role) for name, role in models.items()}
                saved_flags, saved_world_size = state["flags"], state["world_size"]
            except BROKEN as error:
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                print(f"note: the checkpoint {folder} is broken ({reason}); trying an older one")
                continue
            _check_flags(flags, saved_flags, folder)
            _check_batches(flags, self.world_size, saved_flags, saved_world_size, folder)
            for name, role in models.items():
                _load(name, role, weights[name], f"{folder} ({name})")
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(optimizer_states[name])
            return state["step"], state["extra"]
        raise UserError(f"{self.folder} holds no whole checkpoint to resume from; start the run without --resume")


def _trained(role: Role) -> dict[str, torch.Tensor]:
    return {name: p.detach().contiguous() for name, p in role.own_parameters().items()}


def _read(folder: Path, name: str, role: Role) -> dict[str, torch.Tensor]:
    if name != "model":
        return load_file(folder / f"{name}.safetensors")
    if isinstance(role.model, PeftModel):
        return load_peft_weights(str(folder / "model"), device="cpu")
    index = folder / "model" / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    return {key: value for file in files for key, value in load_file(folder / "model" / file).items()}


def _load(name: str, role: Role, weights: dict[str, torch.Tensor], where: str) -> None:
    own = role.own_parameters()
    if name != "model":
        _copy(own, weights, where)
    elif isinstance(role.model, PeftModel):
        result = set_peft_model_state_dict(role.model, weights, adapter_name="default")
        if not weights or result.unexpected_keys:
            raise UserError(f"the checkpoint {where} is of another adapter than this run's; resume with its own flags")
    else:
        _copy({n: p for n, p in role.model.named_parameters() if p.requires_grad}, weights, where)


def _copy(parameters: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], where: str) -> None:
    missing = sorted(set(parameters) - set(weights))
    if missing:
        raise UserError(f"the checkpoint {where} lacks {missing[0]}; it is of another model: resume with its own flags")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _check_flags(flags: Any, saved: dict[str, Any], folder: Path) -> None:
    for name, value in dataclasses.asdict(flags).items():
        if (
            name not in {*FREE_TO_CHANGE, *PER_DEVICE}
            and name in saved
            and saved[name] != json.loads(json.dumps(value))
        ):
            raise UserError(
                f"--{name}={value} differs from {saved[name]!r} of the run in {folder}; resume with the same value, or "
                f"start another run"
            )


def _check_batches(flags: Any, world_size: int, saved: dict[str, Any], saved_world_size: int, folder: Path) -> None:
    """A step must have the same rows over all devices: they are dealt out from one order, device by device."""
    for name in PER_DEVICE:
        each, before = getattr(flags, name, None), saved.get(name)
        if each is None or each * world_size == before * saved_world_size:
            continue
        whole = before * saved_world_size
        remedy = f"on a number of devices that divides {whole}"
        if whole % world_size == 0:
            remedy = f"with --{name}={whole // world_size}"
        raise UserError(
            f"--{name}={each} on each of {world_size} device(s) is {each * world_size} in all, and the run in {folder} "
            f"has {before} on each of {saved_world_size}, {whole} in all; resume {remedy}"
        )
    if getattr(flags, "advantage_scope", None) == "rank" and world_size != saved_world_size:
        raise UserError(
            f"--advantage_scope=rank whitens on each device apart, and the run in {folder} has {saved_world_size} "
            f"devices, not {world_size}; resume it on {saved_world_size}"
        )
