"""metrics.jsonl, samples.jsonl, environment.json, and a Fabric logger beside them."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger, TensorBoardLogger

from rlhf.errors import UserError
from rlhf.files import atomic_write


class Logs:
    """The first device's logs. Lines after `resume_at` steps, of a run that went on after its checkpoint, are cut."""

    def __init__(self, folder: Path, logger: str, script: str, *, resume_at: int = 0) -> None:
        self._metrics, self._samples = folder / "metrics.jsonl", folder / "samples.jsonl"
        for path in (self._metrics, self._samples):
            if path.exists():
                _cut(path, resume_at)
        self._logger = _make_logger(logger, folder, script)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, null for what is not finite (JSON has no NaN); the logger gets the numbers."""
        _append(self._metrics, {"step": step, **{n: x if math.isfinite(x) else None for n, x in values.items()}})
        if self._logger is not None:
            self._logger.log_metrics(values, step)

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            _append(self._samples, {"step": step, **sample})

    def close(self) -> None:
        if self._logger is not None:
            self._logger.finalize("success")


def check_logger(name: str) -> None:
    """Raise `UserError` for a logger whose package is not installed."""
    if name == "wandb" and find_spec("wandb") is None:
        raise UserError("--logger=wandb needs the wandb package: pip install wandb")


def _append(path: Path, value: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def _cut(path: Path, step: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue  # the line that a kill cut off
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _make_logger(name: str, folder: Path, script: str):
    if name == "tensorboard":
        return TensorBoardLogger(root_dir=folder, name="tensorboard", version="")
    if name == "csv":
        return CSVLogger(root_dir=folder, name="csv", version="")
    if name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(project="rlhf", name=f"{script}/{folder.name}", save_dir=str(folder))
    return None


def environment(fabric: Fabric) -> dict[str, Any]:
    """Versions, hardware, command line and git commit: what a number may depend on besides the flags."""
    names = ("rlhf", "torch", "lightning", "transformers", "tokenizers", "peft", "datasets", "safetensors", "numpy")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(sys.argv),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(fabric.device),
        "device_name": torch.cuda.get_device_name() if fabric.device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "world_size": fabric.world_size,
        "precision": str(fabric.strategy.precision.precision),
        "versions": {name: _version(name) for name in names},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
