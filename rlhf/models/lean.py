"""The trunk of Llama-like models for one token a row, in few operations a layer.

There the arithmetic is small and what is paid for is reading the weights and calling operations. The weights stand in
the dtype of the products, packed for the processor where it can be, and a layer is some ten operations
(`rlhf/models/layers.py`); where all of them are compiled kernels, a step of all layers is one call.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.decode import Cache, TiledCache
from rlhf.models.forward import trunk_of
from rlhf.models.fused import Turn
from rlhf.models.layers import Layer, LeanLinear, is_lean, product_dtype, turn_of
from rlhf.models.runtime import recording


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
        self.in_tiles = all(layer.in_tiles for layer in self.layers)

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
    def __call__(self, input_ids: Tensor, positions: Tensor, cache: Cache | TiledCache) -> Tensor:
        """(T,) ids and positions to (T, H) hidden states after the last norm, in the dtype of the residual stream or of
        the products. They hold until the next call.
        """
        x = self.trunk.embed_tokens(input_ids)
        turn = turn_of(self.trunk, x, positions)
        with torch.autocast(x.device.type, enabled=False):
            if not (cache.recordable and self.in_tiles):
                return self.states(x, turn, cache)
            if cache.recorded is None:
                cache.recorded = Step(self, x, turn, cache)
                return cache.recorded.states
            return cache.recorded(x, turn)

    def states(self, x: Tensor, turn: Turn, cache: Cache | TiledCache) -> Tensor:
        """(T, H) embeddings to hidden states."""
        y = None  # what a layer adds to the stream, once the next norm reads it
        for layer in self.layers:
            between, norm, middle_norm = layer.operations(x), layer.norm, layer.middle_norm
            if y is None:
                states = between.normed(x, norm.weight, norm.variance_epsilon)
            else:
                x, states = between.added_and_normed(x, y, norm.weight, norm.variance_epsilon)
            packed = layer.inputs(states).view(len(x), layer.heads + 2 * layer.kv_heads, -1)
            output = layer.output(cache.decode(layer.attention, *layer.operands(x, packed, turn), layer.window))
            x, states = between.added_and_normed(x, output, middle_norm.weight, middle_norm.variance_epsilon)
            y = layer.down(between.gated(layer.gate_up(states)))
        norm = self.trunk.norm
        return between.added_and_normed(x, y, norm.weight, norm.variance_epsilon)[1]


class Step:
    """A trunk's kernels for one more token a row, from embeddings and turns to states, all in one call.

    It serves as long as the rows and the cache's buffers are those it was made with.
    """

    def __init__(self, trunk: LeanTrunk, x: Tensor, turn: Turn, cache: TiledCache) -> None:
        self._given = [part.clone() for part in (x, *turn)]
        x, *turn = self._given
        with recording() as self._kernels:
            self.states = trunk.states(x, tuple(turn), cache)

    def __call__(self, x: Tensor, turn: Turn) -> Tensor:
        for given, new in zip(self._given, (x, *turn), strict=True):
            given.copy_(new)
        self._kernels()
        return self.states
