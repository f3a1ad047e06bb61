"""What a configuration declares: whether it fits the weights beside it, before anything of that size is made; how much
its model reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from rlhf.errors import UserError
from rlhf.untrusted import TensorEntry

_VALUES_PER_BYTE = 4
"""Of packed weights; the densest that are in use hold two."""


def check_shapes(folder: str, config: PretrainedConfig, kind, tensors: dict[str, TensorEntry]) -> None:
    """Build the model that `config` declares without memory, and compare its shapes with those of the weights.

    transformers compares them too, but fills a model of the declared size first, where files of some kilobytes may
    declare terabytes.

    Args:
        kind: the class of transformers (`AutoModelForCausalLM`) that the model is loaded by.
        tensors: what `check_folder` found; without safetensors files only the sizes are compared.

    Raises:
        UserError: naming the first tensor of another shape, with both, or the sizes.
    """
    held = sum(path.stat().st_size for suffix in ("safetensors", "bin") for path in Path(folder).glob(f"*.{suffix}"))
    if not held:
        return  # transformers says best which files it looked for
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if tensors and isinstance(layers, int) and layers > len(tensors):
        raise UserError(
            f"{folder}: its config.json has num_hidden_layers={layers}, and its weights are {len(tensors)} tensors; "
            f"copy both from the same model"
        )
    with torch.device("meta"):
        model = kind.from_config(copy.deepcopy(config))
    packed = getattr(config, "quantization_config", None) is not None
    prefix = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        entry = tensors.get(name) or tensors.get(name.removeprefix(prefix)) or tensors.get(prefix + name)
        if entry is not None and not packed and entry.shape != tuple(parameter.shape):
            remedy = "copy both from the same model"
            if name == "score.weight":
                remedy = "give a reward model, which has one output"
            raise UserError(
                f"{folder}: {name} has the shape {entry.shape}, and its config.json asks for {tuple(parameter.shape)}; "
                f"{remedy}"
            )
    wanted = sum(parameter.numel() for parameter in model.parameters())
    head = getattr(model, "score", None)
    fresh = 0 if head is None else head.weight.numel()
    if wanted - fresh > _VALUES_PER_BYTE * held:
        raise UserError(
            f"{folder}: its config.json asks for {wanted:,} values, and its weights have {held:,} bytes in all; copy "
            f"both from the same model"
        )


def positions_of(config: Any) -> int | None:
    """The most tokens that a configuration says its model reads; None where it says nothing."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None
