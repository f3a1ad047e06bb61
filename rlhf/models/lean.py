"""The trunk of Llama-like models for passes without gradients, in few operations a layer.

Where one token a row goes through the model, the arithmetic is small and what is paid for is reading the weights and
calling operations. Here the weights stand in the dtype of the products, those that share an input in one matrix, and
a layer is some twenty operations. The numbers are those of the model's own forward pass, rounding included: residual
stream and norms in its dtype, products in autocast's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.attention import active_plan
from rlhf.models.forward import trunk_of

ARCHITECTURES = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Trunks whose layers are what `LeanTrunk` computes: pre-norm, rotary positions, gated SiLU."""


class LeanTrunk:
    """Token ids to hidden states, under the attention plan of the context (`attending`).

    Where products run in another dtype than the weights', it holds a copy of them as they are when it is made, so it
    serves until the next optimiser step.

    Args:
        trunk: a model of `ARCHITECTURES`, its linear layers plain.
        dtype: of the matrix products: autocast's, or the weights' own.
        rows: tokens that go through at once as a rule; what the layout of packed weights is chosen for.
    """

    def __init__(self, trunk: nn.Module, dtype: torch.dtype, rows: int) -> None:
        self.trunk, self.dtype, self.rows = trunk, dtype, rows
        self.layers = [_Layer(layer, trunk.config, self.linear, dtype) for layer in trunk.layers]

    def linear(self, *linears: nn.Linear) -> LeanLinear:
        """Linear layers of one input, laid out like the trunk's own."""
        return LeanLinear(linears, self.dtype, self.rows)

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, rows: int) -> LeanTrunk | None:
        """The lean trunk of a model, for `rows` tokens at once.

        None where the architecture is another or the layers carry adapters.
        """
        trunk = trunk_of(model)
        if type(trunk).__name__ not in ARCHITECTURES or getattr(trunk.config, "hidden_act", None) != "silu":
            return None
        if any(type(linear) is not nn.Linear for layer in trunk.layers for linear in _linears(layer)):
            return None
        weight = trunk.layers[0].mlp.up_proj.weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return cls(trunk, dtype, rows)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(B, Q) ids and positions to (B, Q, H) hidden states after the last norm."""
        x = self.trunk.embed_tokens(input_ids)
        cos, sin = self.trunk.rotary_emb(x, position_ids=position_ids)
        half = cos.shape[-1] // 2
        # rotate_half(x) * sin, as the swapped halves of x times the sine with its first half negated.
        turn = cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None]
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.layers:
                x = layer(x, turn)
            return _normed(x, self.trunk.norm)


class _Layer:
    def __init__(self, layer: nn.Module, config, linear: Callable[..., LeanLinear], dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.attention, self.dtype = layer, attention, dtype
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.window = getattr(attention, "sliding_window", None)
        if type(layer).__name__ == "MistralDecoderLayer":
            self.window = config.sliding_window
        self.inputs = linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = linear(attention.o_proj)
        self.gate_up = linear(mlp.gate_proj, mlp.up_proj)
        self.down = linear(mlp.down_proj)

    def __call__(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        states = self._attended(_normed(x, self.layer.input_layernorm), turn)
        x = x + self.output(states)
        gate, up = self.gate_up(_normed(x, self.layer.post_attention_layernorm)).chunk(2, -1)
        return x.add_(self.down(F.silu(gate).mul_(up)))

    def _attended(self, states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        attention, (heads, kv_heads) = self.attention, self.heads
        rows, num, _ = states.shape
        packed = self.inputs(states).view(rows, num, heads + 2 * kv_heads, -1)
        turned, values = packed[:, :, : heads + kv_heads], packed[:, :, heads + kv_heads :]
        if hasattr(attention, "q_norm"):
            queries, keys = turned.split([heads, kv_heads], 2)
            turned = torch.cat([_normed(queries, attention.q_norm), _normed(keys, attention.k_norm)], 2)
        cos, sin = turn
        turned = (turned * cos + turned.roll(cos.shape[-1] // 2, -1) * sin).to(self.dtype)
        query, key, value = (x.transpose(1, 2) for x in (*turned.split([heads, kv_heads], 2), values))
        out = active_plan()(
            attention, query, key, value, scaling=attention.scaling, dropout=0.0, window=self.window, softcap=None
        )
        return out.reshape(rows, num, -1)


class LeanLinear:
    """Linear layers of one input: in another dtype than their own, one matrix, packed for the processor where it can
    be; in their own, where that would be a second copy in memory, each as it is."""

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype, rows: int) -> None:
        weights = [linear.weight.detach() for linear in linears]
        biases = [linear.bias for linear in linears]
        self.dtype, self.packed = dtype, False
        if weights[0].dtype != dtype:
            weights = [torch.cat([weight.to(dtype) for weight in weights])]
            biases = [None if biases[0] is None else torch.cat([bias.detach().to(dtype) for bias in biases])]
            self.packed = _can_pack(weights[0])
            if self.packed:
                weights = [torch.ops.mkldnn._reorder_linear_weight(weights[0], rows)]
        self.pieces = list(zip(weights, biases, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """(.., inputs) of any dtype to (.., outputs of all layers in turn), in `dtype`."""
        x = x.to(self.dtype)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, *self.pieces[0], "none", [], "")
        outputs = [F.linear(x, weight, bias) for weight, bias in self.pieces]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can lay the weight out once; otherwise it does so again for every product (a third of its time
    at 16 rows)."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _linears(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    if x.dtype == norm.weight.dtype:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return norm.weight * F.rms_norm(x, norm.weight.shape, None, norm.variance_epsilon)
