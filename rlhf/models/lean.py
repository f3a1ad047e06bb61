"""The trunk of Llama-like models for one token a row, in few operations a layer.

There the arithmetic is small and what is paid for is reading the weights and calling operations. The weights stand in
the dtype of the products, packed for the processor where it can be, and a layer is some ten operations
(`rlhf/models/layers.py`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.forward import trunk_of
from rlhf.models.layers import Layer, LeanLinear, is_lean, product_dtype, turn_of


class Decode(Protocol):
    """Keys and values of the tokens before, and attention to them."""

    def decode(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """(T, heads * E) from an attention layer, operands of `Layer.operands`, and its sliding window."""


class LeanTrunk:
    """Token ids to hidden states, one token a row.

    Where products run in another dtype than the weights', it holds a copy of them as they are when it is made, so it
    serves until the next optimiser step.

    Args:
        trunk: a model of `layers.ARCHITECTURES`, its linear layers plain.
        rows: tokens that go through at once as a rule; what the layout of packed weights is chosen for.
    """

    def __init__(self, trunk: nn.Module, rows: int) -> None:
        self.trunk, self.dtype, self.rows = trunk, product_dtype(trunk), rows
        self.layers = [Layer(layer, trunk.config, self.linear) for layer in trunk.layers]

    def linear(self, linears: tuple[nn.Linear, ...]) -> LeanLinear:
        """Linear layers of one input, laid out like the trunk's own."""
        return LeanLinear(linears, self.dtype, self.rows)

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, rows: int) -> LeanTrunk | None:
        """The lean trunk of a model, for `rows` tokens at once.

        None where the architecture is another or the layers carry adapters.
        """
        trunk = trunk_of(model)
        return cls(trunk, rows) if is_lean(trunk) else None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, positions: Tensor, cache: Decode) -> Tensor:
        """(T,) ids and positions to (T, H) hidden states after the last norm, in the dtype of the residual stream or of
        the products."""
        x, norm = self.trunk.embed_tokens(input_ids), self.trunk.norm
        turn = turn_of(self.trunk, x, positions)
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.layers:

                def attend(packed: Tensor, layer: Layer = layer, x: Tensor = x) -> Tensor:
                    return cache.decode(layer.attention, *layer.operands(x, packed, turn), layer.window)

                x, _ = layer(x, attend)
            return layer.operations(x).normed(x, norm.weight, norm.variance_epsilon)
