"""A decoder layer of Llama-like models in few operations: what sampling (`lean.py`) and training (`trained.py`) share.

Projections that have one input are one matrix product, and what runs in autocast's dtype is cast once. The numbers
are those of the model's own forward pass, rounding included: residual stream and norms in its dtype, products in
autocast's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.models import fused
from rlhf.models.fused import Turn
from rlhf.models.plain import normed, operations, turned
from rlhf.models.products import laid_out

ARCHITECTURES = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Trunks whose layers are what `Layer` computes: pre-norm, rotary positions, gated SiLU."""

Attend = Callable[[Tensor], Tensor]
"""Projections (T, heads + 2 kv_heads, D) of queries, keys and values to (T, heads * E)."""


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


def turn_of(trunk: nn.Module, x: Tensor, positions: Tensor) -> Turn:
    """Cosines and sines of (T,) positions for a residual stream (T, H)."""
    cos, sin = trunk.rotary_emb(x, position_ids=positions[None])
    half = cos.shape[-1] // 2
    # rotate_half(x) * sin, as the swapped halves of x times the sine with its first half negated.
    return cos[0, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[0, :, None]


class Kept(NamedTuple):
    """What a layer's backward pass needs beside its input.

    Attributes:
        packed: (T, heads + 2 kv_heads, D) projections before norms and rotation; None without norms of heads.
        attended: (R, heads * E), the output projection's input, of the tokens that are asked for (all of them: R = T).
        middle: (R, H) residual stream between attention and gated layer.
        gate_up: (R, 2 F).
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
        self.scaling = self.attention.scaling
        self.inputs, self.output, self.gate_up, self.down = map(linear, linears_of(layer))
        linears = self.inputs, self.output, self.gate_up, self.down
        self.in_tiles = self.head_norms is None and all(linear.in_tiles for linear in linears)

    def operations(self, x: Tensor) -> ModuleType:
        """What runs between the matrix products over this residual stream."""
        return operations(x, self.norm.weight, self.inputs.dtype)

    def __call__(self, x: Tensor, attend: Attend, rows: Tensor | None = None) -> tuple[Tensor, Kept]:
        """(T, H) residual stream to that after the layer, without autocast and without a graph.

        Args:
            rows: (R,) tokens whose stream is asked for; what comes after attention is computed for them alone.
        """
        between, norm, middle_norm = self.operations(x), self.norm, self.middle_norm
        states = between.normed(x, norm.weight, norm.variance_epsilon)
        packed = self.inputs(states).view(len(x), self.heads + 2 * self.kv_heads, -1)
        attended = attend(packed)
        if rows is not None:
            x, attended = x[rows], attended[rows]
        output = self.output(attended)
        middle, states = between.added_and_normed(x, output, middle_norm.weight, middle_norm.variance_epsilon)
        gate_up = self.gate_up(states)
        out = between.added(middle, self.down(between.gated(gate_up)))
        return out, Kept(packed if self.head_norms is not None else None, attended, middle, gate_up)

    def operands(self, x: Tensor, packed: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Attention's operands as `products.laid_out` gives them, from what `Attend` is given.

        Args:
            x: (T, H) residual stream before the layer.
        """
        if self.head_norms is None:
            return self.operations(x).rotated(packed, turn, self.kv_heads, self.scaling)
        parts = packed.split([self.heads, self.kv_heads, self.kv_heads], 1)
        query, key = (
            turned(normed(part, norm.weight, norm.variance_epsilon), turn).to(packed.dtype)
            for part, norm in zip(parts, self.head_norms, strict=False)
        )
        return laid_out(query, key, parts[2], self.scaling)


class LeanLinear:
    """Linear layers of one input: in another dtype than their own, one matrix; in their own, where that would be a
    second copy in memory, each as it is.

    Args:
        rows: pack the matrix for products with about so many rows, where the processor's library can; then it has
            no `backward`. None: it stays as it is.

    Attributes:
        in_tiles: the product is a kernel of `fused`.
    """

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype, rows: int | None = None) -> None:
        weights = [linear.weight.detach() for linear in linears]
        biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
        self.dtype, self.sizes = dtype, [len(weight) for weight in weights]
        self.packed: Callable[[Tensor], Tensor] | None = None
        if weights[0].dtype != dtype and rows is not None:
            self.packed = _in_tiles(weights, biases, dtype, rows)
        self.in_tiles = self.packed is not None
        if weights[0].dtype != dtype and rows is not None and self.packed is None:
            self.packed = _by_onednn(weights, biases, dtype, rows)
        if weights[0].dtype != dtype and self.packed is None:
            weights, biases = [_joined(weights, dtype)], [None if biases[0] is None else _joined(biases, dtype)]
        self.pieces = [] if self.packed else list(zip(weights, biases, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """(.., inputs) of any dtype to (.., outputs of all layers in turn), in `dtype`."""
        x = x.to(self.dtype)
        if self.packed is not None:
            return self.packed(x)
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


def _in_tiles(
    weights: list[Tensor], biases: list[Tensor | None], dtype: torch.dtype, rows: int
) -> Callable[[Tensor], Tensor] | None:
    """The product with these matrices end to end by `fused.product`; None where it does not serve."""
    fits = all(len(weight) % fused.COLUMNS == 0 and weight.shape[1] % 2 == 0 for weight in weights)
    if not fits or rows > fused.FEW_ROWS or not fused.multiplies(weights[0].dtype, dtype, weights[0].device):
        return None
    tiles = torch.cat([fused.packed_tiles(weight) for weight in weights])
    return partial(fused.product, packed=tiles, bias=None if biases[0] is None else torch.cat(biases))


def _by_onednn(
    weights: list[Tensor], biases: list[Tensor | None], dtype: torch.dtype, rows: int
) -> Callable[[Tensor], Tensor] | None:
    """The product with these matrices end to end, laid out once for about so many rows; None where that cannot be.

    Unpacked, oneDNN lays a matrix out again for every product: a third of its time at 16 rows.
    """
    if not _onednn_packs(weights[0].device, dtype):
        return None
    weight = torch.ops.mkldnn._reorder_linear_weight(_joined(weights, dtype), rows)
    bias = None if biases[0] is None else _joined(biases, dtype)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_packs(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
