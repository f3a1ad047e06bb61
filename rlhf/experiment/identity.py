"""What makes two runs the same run: script, flags, devices, and the contents of the data and models that it reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import try_to_load_from_cache

from rlhf.errors import UserError
from rlhf.models.adapters import adapter_base
from rlhf.models.loading import resolve
from rlhf.rewards.specs import parse_spec
from rlhf.untrusted import UnreadableFileError, read_json

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
    "keep_weights",
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

MODEL_FLAGS = ("model_name", "sft_experiment_dir", "rm_experiment_dir", "reference")
"""Flags that name a model; those of `--reward model:FOLDER` come besides."""

_SAMPLES, _SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True)
class Identity:
    """What a run is, to compare with what a checkpoint was.

    Attributes:
        script: its name.
        flags: its dataclass of flags.
        world_size: devices that share the rows of a step.
        data: fingerprint of every split that it reads, by stage and name.
        models: fingerprint of every model folder that it reads, by flag.
    """

    script: str
    flags: Any
    world_size: int = 1
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    models: dict[str, str] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return json.loads(json.dumps({**vars(self), "flags": dataclasses.asdict(self.flags)}))

    def check(self, saved: dict[str, Any], where: Path | str) -> None:
        """Refuse to go on with a run that is another one.

        Args:
            saved: the `record` of the run in `where`; a part that it lacks is not compared.

        Raises:
            UserError: naming every flag that differs, the splits, or the models.
        """
        script = saved.get("script", self.script)
        if script != self.script:
            raise UserError(f"{where} is of {script}.py; resume it with that script, not with {self.script}.py")
        _check_flags(self.flags, saved["flags"], where)
        _check_batches(self.flags, self.world_size, saved["flags"], saved["world_size"], where)
        _check_contents(self.data, saved.get("data", self.data), f"data in --data_dir={self.flags.data_dir}", where)
        _check_contents(self.models, saved.get("models", self.models), "models", where)


def record_in(folder: Path) -> dict[str, Any] | None:
    """The `Identity.record`, but for the script, of the run whose folder this is; None unless it is whole."""
    try:
        arguments, machine, data = (
            read_json(folder / f"{name}.json", constants=True) for name in ("args", "environment", "data")
        )
        world_size, read, models = machine["world_size"], data["read"], data["models"]
    except (OSError, UnreadableFileError, KeyError, TypeError):
        return None
    return {"flags": arguments, "world_size": world_size, "data": read, "models": models}


def summary_in(folder: Path) -> dict[str, Any]:
    """What a run that has ended returned; empty where none has."""
    try:
        return read_json(folder / "summary.json", constants=True)
    except (OSError, UnreadableFileError):
        return {}


def has_ended(folder: Path, total_steps: int) -> bool:
    """Whether the run in this folder did all its steps and wrote its model."""
    whole = any((folder / "final" / name).is_file() for name in ("config.json", "adapter_config.json"))
    return whole and summary_in(folder).get("steps") == total_steps


def _check_flags(flags: Any, saved: dict[str, Any], where: Path | str) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(flags)}
    changed = []
    for name, value in json.loads(json.dumps(dataclasses.asdict(flags))).items():
        before = saved.get(name, defaults[name] if defaults[name] is not dataclasses.MISSING else value)
        if name not in {*FREE_TO_CHANGE, *PER_DEVICE} and before != value:
            changed.append(f"--{name}={value} differs from {before!r}")
    if changed:
        raise UserError(
            f"{', '.join(changed)} of the run in {where}; resume with the same value{'s' * (len(changed) > 1)}, or "
            f"start another run"
        )


def _check_batches(
    flags: Any, world_size: int, saved: dict[str, Any], saved_world_size: int, where: Path | str
) -> None:
    """A step must have the same rows over all devices: they are dealt out from one order, device by device."""
    for name in PER_DEVICE:
        each, before = getattr(flags, name, None), saved.get(name)
        if each is None or before is None or each * world_size == before * saved_world_size:
            continue
        whole = before * saved_world_size
        remedy = f"on a number of devices that divides {whole}"
        if whole % world_size == 0:
            remedy = f"with --{name}={whole // world_size}"
        raise UserError(
            f"--{name}={each} on each of {world_size} device(s) is {each * world_size} in all, and the run in {where} "
            f"has {before} on each of {saved_world_size}, {whole} in all; resume {remedy}"
        )
    if getattr(flags, "advantage_scope", None) == "rank" and world_size != saved_world_size:
        raise UserError(
            f"--advantage_scope=rank whitens on each device apart, and the run in {where} has {saved_world_size} "
            f"devices, not {world_size}; resume it on {saved_world_size}"
        )


def _check_contents(now: dict[str, str], saved: dict[str, str], what: str, where: Path | str) -> None:
    changed = sorted(name for name in {*now, *saved} if now.get(name) != saved.get(name))
    if changed:
        raise UserError(
            f"the {what} have changed since the run in {where} began ({', '.join(changed)}); bring back what it "
            f"began with, or start another run"
        )


def model_fingerprints(flags: Any) -> dict[str, str]:
    """The fingerprint of each model that the flags name, by flag; a reward's by its word.

    Raises:
        UserError: a path that holds no model.
    """
    return {name: _fingerprint(source) for name, source in _sources(flags)}


def _sources(flags: Any) -> Iterator[tuple[str, str]]:
    for flag in MODEL_FLAGS:
        value = getattr(flags, flag, None)
        if value and not (flag == "model_name" and getattr(flags, "sft_experiment_dir", None)):
            yield f"--{flag}", resolve(value, flag)
    for word in getattr(flags, "reward", []):
        spec = parse_spec(word)
        if spec.kind == "model":
            yield f"--reward {word}", resolve(spec.argument, "reward")


def _fingerprint(source: str) -> str:
    """Hash of a model folder's configuration, and of sizes and samples of its weights; a hub id's commit."""
    folder = Path(source)
    if not folder.is_dir():
        cached = try_to_load_from_cache(source, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else source
    digest = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            _add_samples(digest, path)
        elif path.name in ("config.json", "adapter_config.json"):
            digest.update(path.name.encode() + path.read_bytes())
    base = adapter_base(source)
    if base:
        digest.update(_fingerprint(base).encode())
    return digest.hexdigest()


def _add_samples(digest: xxhash.xxh3_128, path: Path) -> None:
    """Pieces all over the file, so that training that touched a layer or an adapter shows, at no cost in size."""
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    stride = max(_SAMPLE_BYTES, size // _SAMPLES)
    with path.open("rb") as file:
        for start in range(0, size, stride):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
