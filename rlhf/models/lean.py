"""The trunk of Llama-like models for sampling, in few operations a layer.

Where one token a row goes through the model, the arithmetic is small and what is paid for is reading the weights and
calling operations. Here the weights stand in the dtype of the products, packed for the processor where it can be, and
a layer is some twenty operations (`rlhf/models/layers.py`).
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.attention import active_plan
from rlhf.models.forward import trunk_of
from rlhf.models.layers import Attend, Layer, LeanLinear, is_lean, normed, product_dtype, turn_of


class LeanTrunk:
    """Token ids to hidden states, under the attention plan of the context (`attending`).

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
    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(B, Q) ids and positions to (B, Q, H) hidden states after the last norm."""
        x = self.trunk.embed_tokens(input_ids)
        turn = turn_of(self.trunk, x, position_ids)
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.layers:
                x, _ = layer(x, turn, _planned(layer))
            return normed(x, self.trunk.norm)


def _planned(layer: Layer) -> Attend:
    plan, attention = active_plan(), layer.attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = {"scaling": attention.scaling, "dropout": 0.0, "window": layer.window, "softcap": None}
        return plan(attention, query, key, value, **options)

    return attend
