"""A decoder layer of Llama-like models in few operations: the arithmetic that sampling and training share.

Projections that have one input are one matrix product, and what runs in autocast's dtype is cast once. The numbers
are those of the model's own forward pass, rounding included: residual stream and norms in its dtype, products in
autocast's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHITECTURES = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Trunks whose layers are what `Layer` computes: pre-norm, rotary positions, gated SiLU."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rotated queries (B, heads, Q, D), keys and values (B, kv_heads, Q, ..) to (B, Q, heads, E)."""


def is_lean(trunk: nn.Module) -> bool:
    """Whether `Layer` computes this trunk's layers: a known architecture, its linear layers plain ones."""
    if type(trunk).__name__ not in ARCHITECTURES or getattr(trunk.config, "hidden_act", None) != "silu":
        return False
    return all(type(linear) is nn.Linear for layer in trunk.layers for group in linears_of(layer) for linear in group)


def linears_of(layer: nn.Module) -> tuple[tuple[nn.Linear, ...], ...]:
    """The linear layers of a decoder layer, those of one input together: q k v, output, gate and up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    inputs = attention.q_proj, attention.k_proj, attention.v_proj
    return inputs, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


def product_dtype(trunk: nn.Module) -> torch.dtype:
    """The dtype that the trunk's matrix products run in: autocast's where it is on, else the weights'."""
    weight = trunk.layers[0].mlp.up_proj.weight
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def turn_of(trunk: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, 1, D) cosines and sines of the positions, as `turned` takes them."""
    cos, sin = trunk.rotary_emb(x, position_ids=position_ids)
    half = cos.shape[-1] // 2
    # rotate_half(x) * sin, as the swapped halves of x times the sine with its first half negated.
    return cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None]


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """(.., D) heads rotated to their positions, in the dtype of the angles."""
    cos, sin = turn
    return x * cos + x.roll(cos.shape[-1] // 2, -1) * sin


class Kept(NamedTuple):
    """What a layer's backward pass needs beside its input.

    Attributes:
        packed: (B, Q, heads + 2 kv_heads, D) projections before norms and rotation; None without norms of heads.
        attended: (B, Q, heads * E), the output projection's input.
        middle: (B, Q, H) residual stream between attention and gated layer.
        gate_up: (B, Q, 2 F).
    """

    packed: Tensor | None
    attended: Tensor
    middle: Tensor
    gate_up: Tensor


class Layer:
    """One decoder layer, its weights laid out by `linear` as they are when this is made."""

    def __init__(self, layer: nn.Module, config, linear: Callable[[Sequence[nn.Linear]], LeanLinear]) -> None:
        self.attention = layer.self_attn
        self.norm, self.middle_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.window = getattr(self.attention, "sliding_window", None)
        if type(layer).__name__ == "MistralDecoderLayer":
            self.window = config.sliding_window
        self.head_norms = None
        if hasattr(self.attention, "q_norm"):
            self.head_norms = self.attention.q_norm, self.attention.k_norm
        self.inputs, self.output, self.gate_up, self.down = map(linear, linears_of(layer))

    def __call__(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, Kept]:
        """(B, Q, H) residual stream to that after the layer, without autocast and without a graph."""
        rows, num, _ = x.shape
        packed = self.inputs(normed(x, self.norm)).view(rows, num, self.heads + 2 * self.kv_heads, -1)
        rotated, value = packed.split([self.heads + self.kv_heads, self.kv_heads], 2)
        if self.head_norms is not None:
            parts = rotated.split([self.heads, self.kv_heads], 2)
            rotated = torch.cat([normed(part, norm) for part, norm in zip(parts, self.head_norms, strict=True)], 2)
        rotated = turned(rotated, turn).to(packed.dtype)
        query, key = rotated.split([self.heads, self.kv_heads], 2)
        attended = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).reshape(rows, num, -1)
        middle = x + self.output(attended)
        gate_up = self.gate_up(normed(middle, self.middle_norm))
        gate, up = gate_up.chunk(2, -1)
        out = middle + self.down(F.silu(gate).mul_(up))
        return out, Kept(packed if self.head_norms is not None else None, attended, middle, gate_up)


class LeanLinear:
    """Linear layers of one input: in another dtype than their own, one matrix; in their own, where that would be a
    second copy in memory, each as it is.

    Args:
        rows: pack the matrix for products with about so many rows, where the processor's library can; then it has
            no `backward`. None: it stays as it is.
    """

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype, rows: int | None = None) -> None:
        weights = [linear.weight.detach() for linear in linears]
        biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
        self.dtype, self.packed = dtype, False
        self.sizes = [len(weight) for weight in weights]
        if weights[0].dtype != dtype:
            weights, biases = [_joined(weights, dtype)], [None if biases[0] is None else _joined(biases, dtype)]
            self.packed = rows is not None and _can_pack(weights[0])
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

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Gradients of the input and of each layer's weight and bias (none where it has none).

        Args:
            grad: (N, outputs) in `dtype`; x: (N, inputs) in `dtype`.

        Returns:
            (N, inputs) in `dtype`; (outputs, inputs) each and (outputs,) each, in `dtype`.
        """
        grads = grad.split([len(weight) for weight, _ in self.pieces], 1)
        grad_x = grads[0] @ self.pieces[0][0]
        for part, (weight, _) in zip(grads[1:], self.pieces[1:], strict=True):
            grad_x.addmm_(part, weight)
        weights = [part.t() @ x for part in grads]
        if len(weights) == 1:
            weights = list(weights[0].split(self.sizes))
        if self.pieces[0][1] is None:
            return grad_x, weights, []
        return grad_x, weights, list(grad.sum(0).split(self.sizes))


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors end to end along the first axis, cast on the way."""
    out = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=dtype)
    for place, part in zip(out.split([len(part) for part in parts]), parts, strict=True):
        place.copy_(part)
    return out


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


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """The root-mean-square norm of the last axis, rounded as transformers rounds it."""
    if x.dtype == norm.weight.dtype:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return norm.weight * F.rms_norm(x, norm.weight.shape, None, norm.variance_epsilon)
