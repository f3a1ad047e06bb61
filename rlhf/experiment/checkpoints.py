"""Checkpoints that appear whole or not at all, and exact resume from the last of them.

checkpoints/step-00000100/   model/ (a Hugging Face folder), <other>.safetensors, <optimizer>.pt, state.json
checkpoints/last             link to the newest
checkpoints/best/            model/ and best.json: the weights of the best evaluation so far

Of older ones that `--keep_weights` keeps, only model/ is left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.optim import Optimizer

from rlhf.errors import UserError
from rlhf.experiment.identity import Identity
from rlhf.files import WriteError, atomic_dir, atomic_link, free_bytes, remove_dir, shown_bytes
from rlhf.models.adapters import adapter_weights
from rlhf.models.loading import Role, save_model
from rlhf.models.policy import Scorer
from rlhf.untrusted import UnreadableFileError, check_finite, check_inside, read_json, read_pickle, read_tensors, shards

BROKEN = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError, UnreadableFileError)
"""What reading a file raises that was cut, emptied or overwritten."""

SMALL_FILES = 32_000_000
"""Bytes that a save is given for what is not tensors: the tokenizer, configurations, headers, the counters."""

Weights = dict[str, torch.Tensor]


class Stateful(Protocol):
    """Whatever a script keeps from step to step beside weights: its state is a dict that JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The `checkpoints` folder of one run.

    Args:
        keep: how many of the latest are kept; 0 keeps all.
        keep_weights: of how many older ones the weights are kept.

    Attributes:
        spared: step of one that is kept besides, whole; None: there is none.
    """

    spared: int | None = None

    def __init__(self, folder: Path, *, keep: int, keep_weights: int = 0) -> None:
        self.folder, self.keep, self.keep_weights = folder, keep, keep_weights

    def save(
        self,
        step: int,
        identity: Identity,
        models: Mapping[str, Role],
        optimizers: Mapping[str, Optimizer],
        tokenizer: Any,
        extra: dict[str, Any],
    ) -> None:
        """Write `step-<step>`; the model named "model" as a Hugging Face folder, others as their trained tensors.

        Older ones are thinned out only once this one is whole.

        Raises:
            WriteError: there is no room for it, or the disk fails; all that stood there still does.
        """
        target = self.of(step)
        others = [_trained(role) for name, role in models.items() if name != "model"]
        _check_room(target, num_bytes(models["model"]) + _tensor_bytes(others) + _tensor_bytes(optimizers))
        with atomic_dir(target) as temporary:
            for name, role in models.items():
                if name == "model":
                    save_model(role, tokenizer, temporary / "model")
                else:
                    save_file(_trained(role), temporary / f"{name}.safetensors")
            for name, optimizer in optimizers.items():
                torch.save(optimizer.state_dict(), temporary / f"{name}.pt")
            moments = {n: [r.reward_mean, r.reward_scale] for n, r in models.items() if isinstance(r, Scorer)}
            state = {"step": step, **identity.record(), "reward_moments": moments, "extra": extra}
            (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        self.settle(step)

    def settle(self, step: int) -> None:
        """Let `last` name the checkpoint of this step, and thin out those before it: a kill may come in between.

        Of the `keep_weights` before those that are kept, all but the weights are removed, the state first. Later ones,
        which are broken or of steps that are done again, are left alone and don't count; nor does the one `spared`.
        """
        target = self.of(step)
        if not (self.folder / "last").is_symlink() or os.readlink(self.folder / "last") != target.name:
            atomic_link(self.folder / "last", target.name)
        numbers = {folder: int(folder.name.removeprefix("step-")) for folder in self.steps()}
        so_far = [folder for folder, number in numbers.items() if number <= step and number != self.spared]
        older = so_far[: -self.keep] if self.keep else []
        weights_only = older[-self.keep_weights :] if self.keep_weights else []
        for folder in older:
            if folder not in weights_only:
                remove_dir(folder)
                continue
            (folder / "state.json").unlink(missing_ok=True)
            for path in folder.iterdir():
                if path.name != "model":
                    path.unlink()

    def save_best(self, step: int, role: Role, tokenizer: Any, metric: str, value: float, *, higher: bool) -> None:
        """Replace `best` where `value` is better than what it holds.

        Raises:
            WriteError: there is no room for it, or the disk fails; the best so far still stands.
        """
        record = self.folder / "best" / "best.json"
        if record.is_file():
            best = read_json(record, "remove its folder", constants=True)["value"]
            if value <= best if higher else value >= best:
                return
        _check_room(self.folder / "best", num_bytes(role))
        with atomic_dir(self.folder / "best") as temporary:
            save_model(role, tokenizer, temporary / "model")
            content = json.dumps({"step": step, "metric": metric, "value": value}, indent=2)
            (temporary / "best.json").write_text(content + "\n", encoding="utf-8")

    def steps(self) -> list[Path]:
        """The folders `step-*`, oldest first: by number, as that of step 100,000,000 is longer than the others."""
        found = (p for p in self.folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit())
        return sorted(found, key=lambda p: int(p.name[5:]))

    def of(self, step: int) -> Path:
        """The folder of the checkpoint after this step, whether or not there is one."""
        return self.folder / f"step-{step:08d}"

    def any_trace(self) -> bool:
        """Whether there is, or was, a checkpoint."""
        return bool(self.steps()) or os.path.lexists(self.folder / "last")

    def load_last(
        self, identity: Identity, models: Mapping[str, Role], optimizers: Mapping[str, Optimizer]
    ) -> tuple[int, dict[str, Any]]:
        """Load the newest whole checkpoint in place; broken ones are named and passed over.

        Returns:
            The number of steps it was saved after, and the extra state.

        Raises:
            UserError: no checkpoint is whole, one is of another model or lacks a part, or it is of another run.
        """
        reason = None
        for folder in reversed(self.steps()):
            if {path.name for path in folder.iterdir()} <= {"model"}:
                reason = reason or f"{folder.name} keeps its weights alone"
                continue
            try:
                check_inside(folder, self.folder)
                state = _state(folder)
                optimizer_states = {name: read_pickle(folder / f"{name}.pt") for name in optimizers}
                weights = {name: _read(folder, name, role) for name, role in models.items()}
            except BROKEN as error:
                fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                print(f"note: the checkpoint {folder} is broken ({fault}); trying an older one")
                reason = reason or f"{folder.name}: {fault}"
                continue
            for key in ("step", "flags", "world_size", "reward_moments", "extra"):
                part_of(state, key, folder / "state.json")
            identity.check(state, folder)
            for name, role in models.items():
                check_finite(weights[name].items(), f"{folder} ({name})")
                _load(name, role, weights[name], f"{folder} ({name})")
                if isinstance(role, Scorer):
                    moments = part_of(state["reward_moments"], name, folder / "state.json")
                    role.reward_mean, role.reward_scale = moments
            for name, optimizer in optimizers.items():
                _check_optimizer(optimizer, optimizer_states[name], folder / f"{name}.pt")
                optimizer.load_state_dict(optimizer_states[name])
            return state["step"], state["extra"]
        raise UserError(
            f"{self.folder} holds no whole checkpoint to resume from ({reason or 'there is none'}); start the run "
            f"again in another --experiment_dir, without --resume"
        )


def part_of(state: Any, key: str, where: Path | str) -> Any:
    """`state[key]`.

    Raises:
        UserError: it isn't there: naming the key and where it should be.
    """
    if not isinstance(state, dict) or key not in state:
        raise UserError(
            f"{where} lacks {key!r}, without which the run would not go on as it was; it was written by another "
            f"version or by hand: resume from another checkpoint, or start another run"
        )
    return state[key]


def load_state(state: Stateful, extra: dict[str, Any], name: str, where: Path | str) -> None:
    """Load what `extra` holds for a script's state of this name.

    Raises:
        UserError: it holds nothing for it, or not all of it: naming what is missing and where it should be.
    """
    saved = part_of(extra, name, where)
    for key in state.state_dict():
        part_of(saved, key, f"{where} ({name})")
    state.load_state_dict(saved)


def save_final(role: Role, tokenizer: Any, folder: Path) -> None:
    """Write the trained model as a Hugging Face folder.

    Raises:
        WriteError: there is no room for it, or the disk fails.
    """
    _check_room(folder, num_bytes(role))
    with atomic_dir(folder) as temporary:
        save_model(role, tokenizer, temporary)


def num_bytes(role: Role) -> int:
    """What `save_model` will write of tensors: an adapter's own, or all of a model's, tied ones once."""
    if isinstance(role.model, PeftModel):
        return _tensor_bytes(get_peft_model_state_dict(role.model, save_embedding_layers=False))
    return _tensor_bytes(role.model.state_dict())


def _tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested containers and optimisers, each storage counted once."""
    storages: dict[int, int] = {}

    def walk(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            storages[item.data_ptr()] = item.numel() * item.element_size()
        elif isinstance(item, Optimizer):
            walk(item.state)
        elif isinstance(item, Mapping):
            walk(list(item.values()))
        elif isinstance(item, list):
            for part in item:
                walk(part)

    walk(tree)
    return sum(storages.values())


def _check_room(target: Path, tensor_bytes: int) -> None:
    needed, free = tensor_bytes + SMALL_FILES, free_bytes(target)
    if free < needed:
        raise WriteError(
            f"{target} needs {shown_bytes(needed)} and {shown_bytes(free)} are free there; make room on that disk"
        )


def _trained(role: Role) -> Weights:
    return {name: p.detach().contiguous() for name, p in role.own_parameters().items()}


def _read(folder: Path, name: str, role: Role) -> Weights:
    if name != "model":
        return read_tensors(folder / f"{name}.safetensors")
    if isinstance(role.model, PeftModel):
        return adapter_weights(str(folder / "model"))
    index = folder / "model" / "model.safetensors.index.json"
    if index.is_file():
        files = shards(index)
    else:
        files = ["model.safetensors"]
    return {key: value for file in files for key, value in read_tensors(folder / "model" / file).items()}


def _load(name: str, role: Role, weights: Weights, where: str) -> None:
    if name != "model":
        own = role.own_parameters()
        _check_shapes({n: p.shape for n, p in own.items()}, weights, where, whole=True)
        _copy(own, weights)
    elif isinstance(role.model, PeftModel):
        own = get_peft_model_state_dict(role.model, save_embedding_layers=False)
        _check_shapes({n: p.shape for n, p in own.items()}, weights, where, whole=True)
        set_peft_model_state_dict(role.model, weights, adapter_name="default")
    else:
        own = {n: p for n, p in role.model.named_parameters() if p.requires_grad}
        _check_shapes({n: p.shape for n, p in own.items()}, weights, where, whole=False)
        _copy(own, weights)


def _check_shapes(own: dict[str, torch.Size], weights: Weights, where: str, *, whole: bool) -> None:
    """Refuse weights of another model: a tensor too few, of another shape, or with `whole` one too many."""
    faults = [f"lacks {name}" for name in sorted(set(own) - set(weights))]
    faults += [
        f"has {name} in the shape {tuple(weights[name].shape)}, not {tuple(shape)}"
        for name, shape in own.items()
        if name in weights and weights[name].shape != shape
    ]
    faults += [f"has {name} besides" for name in sorted(set(weights) - set(own)) if whole]
    if faults:
        raise UserError(f"the checkpoint {where} {faults[0]}; it is of another model: resume with its own flags")


def _copy(parameters: Mapping[str, torch.Tensor], weights: Weights) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _check_optimizer(optimizer: Optimizer, saved: dict[str, Any], where: Path) -> None:
    """Refuse the state of an optimiser of other parameters; torch itself compares only how many there are."""
    groups = [group["params"] for group in optimizer.param_groups]
    entries, state = part_of(saved, "param_groups", where), part_of(saved, "state", where)
    lists = isinstance(entries, list) and all(isinstance(part_of(entry, "params", where), list) for entry in entries)
    if not lists or not isinstance(state, dict) or not all(isinstance(values, dict) for values in state.values()):
        raise UserError(f"{where} is the state of no optimiser; resume from another checkpoint, or start another run")
    saved_groups = [entry["params"] for entry in entries]
    sizes, saved_sizes = [len(group) for group in groups], [len(group) for group in saved_groups]
    if sizes != saved_sizes:
        raise UserError(
            f"{where} is the state of an optimiser of {saved_sizes} parameters, and this run's has {sizes}; resume "
            f"with its own flags"
        )
    for entry, group in zip(entries, optimizer.param_groups, strict=True):
        for name, value in entry.items():
            if name in group and not _of_one_kind(value, group[name]):
                raise UserError(f"{where} has {value!r} for {name}; resume from another checkpoint")
    for place, (parameter, index) in enumerate(zip(chain(*groups), chain(*saved_groups), strict=True)):
        moments = state.get(index, {}) if isinstance(index, int) else {}
        check_finite(((str(name), value) for name, value in moments.items() if torch.is_tensor(value)), str(where))
        for name, value in moments.items():
            if not torch.is_tensor(value):
                raise UserError(
                    f"{where} has {value!r} for {name} of parameter {place}; resume from another checkpoint"
                )
            if value.ndim and value.shape != parameter.shape:
                raise UserError(
                    f"{where} has {name} of parameter {place} in the shape {tuple(value.shape)}, and that of this run "
                    f"is {tuple(parameter.shape)}; resume with its own flags"
                )


def _of_one_kind(value: Any, other: Any) -> bool:
    """Whether both are numbers, or of one type."""
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (value, other))
    return numbers or type(value) is type(other)


def _state(folder: Path) -> dict[str, Any]:
    """What state.json says of the run, as far as it is of the right types and of this folder."""
    path = folder / "state.json"
    state = read_json(path, constants=True, largest=16 << 20)
    kinds = {"step": int, "world_size": int, "flags": dict, "extra": dict}
    for key, kind in kinds.items():
        if key in state and type(state[key]) is not kind:
            raise UnreadableFileError(f"{path} has no {key!r} that is one; resume from another checkpoint")
    if "step" in state and f"step-{state['step']:08d}" != folder.name:
        raise UnreadableFileError(f"{path} is of step {state['step']}; resume from another checkpoint")
    return state
