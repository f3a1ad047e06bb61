"""Devices and precision, all through Lightning Fabric."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any

import torch
import transformers
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from rlhf.allocator import keep_freed_memory
from rlhf.errors import UserError

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others in one operation. One that ended is noticed in seconds (`lifeline`), so this
is for those that work: the longest rollout, reward or preparation of data on one process while the others wait."""
MOST_DEVICES = 1024
"""On one machine; a larger number is a slip of the pen."""


def fast_bf16(accelerator: str) -> bool:
    """Whether the hardware multiplies bf16 faster than float32: CUDA 8.0 and later, CPUs with AVX512-BF16 or AMX."""
    if accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    if accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available()):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _why_device(fabric: Fabric, accelerator: str) -> str:
    kind = fabric.device.type
    if accelerator != "auto":
        return f"on {kind} as --accelerator={accelerator} asks"
    return f"on {kind}, " + ("as neither CUDA nor MPS is there" if kind == "cpu" else "which is there")


def _why_precision(precision: str, asked: bool) -> str:
    if asked:
        return f"{precision} as --precision asks"
    slow = "the hardware is not faster at bf16"
    return f"{precision}, as {'the hardware is fast at bf16' if precision == 'bf16-mixed' else slow}"


def make_fabric(flags: Any) -> tuple[Fabric, str]:
    """Lightning Fabric from the device flags, or from what `fabric run` asked for; and why it is this device and
    precision: one clause.

    Raises:
        UserError: a device, strategy or precision that is not supported or not there.
    """
    accelerator = os.environ.get("LT_ACCELERATOR", flags.accelerator)
    precision = os.environ.get("LT_PRECISION", flags.precision)
    asked = precision != "auto"
    if not asked:
        precision = "bf16-mixed" if fast_bf16(accelerator) else "32-true"
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"--precision={precision} is not supported; use 32-true or bf16-mixed")
    devices = os.environ.get("LT_DEVICES", flags.devices)
    if devices == "auto" and accelerator in ("cpu", "auto") and not torch.cuda.is_available():
        devices = "1"
    num_nodes = int(os.environ.get("LT_NUM_NODES", flags.num_nodes))
    strategy = os.environ.pop("LT_STRATEGY", flags.strategy)
    if strategy not in ("auto", "ddp"):
        raise UserError(f"--strategy={strategy} is not supported; use auto or ddp")
    _check_devices(accelerator, str(devices))
    several = devices not in ("1", "auto") or num_nodes > 1 or (devices == "auto" and torch.cuda.device_count() > 1)
    if several or strategy == "ddp":
        strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, timeout=PATIENCE)
    for name in ("LT_ACCELERATOR", "LT_PRECISION", "LT_DEVICES", "LT_NUM_NODES"):
        os.environ.pop(name, None)
    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=int(devices) if str(devices).isdigit() else devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,
        )
        return fabric, f"{_why_device(fabric, accelerator)}; {_why_precision(precision, asked)}"
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--accelerator={accelerator} --devices={devices} can't be had ({reason}); give --accelerator=cpu, or auto"
        ) from None


def _check_devices(accelerator: str, devices: str) -> None:
    """Refuse devices that this machine has not, and words that name none."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    has["gpu"] = any(has.values())
    if not has.get(accelerator, True):
        raise UserError(f"--accelerator={accelerator}: torch finds none here; give --accelerator=cpu, or auto")
    count = int(devices) if re.fullmatch("[0-9]{1,6}", devices) else None
    if devices == "auto" or (count is not None and 0 < count <= MOST_DEVICES):
        return
    if torch.cuda.is_available() and accelerator != "cpu" and re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3})*,?", devices):
        return
    raise UserError(
        f"--devices={devices} must be auto or a number from 1 to {MOST_DEVICES}, on CUDA also a list such as 0,1"
    )
