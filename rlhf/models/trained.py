"""Training Llama-like models on a CPU: a decoder layer as one autograd function over a forest.

Autograd over transformers' layers keeps every intermediate result, adds up the gradients of each projection's input
apart, and takes two or three passes over memory where one does. Here a layer keeps its input, the residual stream in
its middle, attention's operands and the gated layer's, and computes norms and activation again in the backward pass.
A training step then needs a quarter to nearly half less memory. The forward pass is `Layer` of `rlhf/models/layers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.models import fused
from rlhf.models.accumulation import added, added_to_rows, made_of
from rlhf.models.fused import Turn
from rlhf.models.layers import Kept, Layer, LeanLinear, linears_of, product_dtype, turn_of
from rlhf.models.plain import norm_backward, packed_together, turned_back
from rlhf.models.products import attended, attended_backward
from rlhf.trees.forest import Forest
from rlhf.trees.masks import Block, dense_blocks

Keep = Callable[[nn.Module, Tensor, Tensor], None]
"""Takes an attention layer, and its keys and values, (kv_heads, T, D) each."""


def trained_states(trunk: nn.Module, forest: Forest, *, keep: Keep | None = None, at: Tensor | None = None) -> Tensor:
    """(T, H) last hidden states of a forest's tokens, by tree attention; (N, H) where some are asked for.

    Args:
        trunk: one that `layers.is_lean`, on a CPU, its attention without dropout.
        keep: called with the keys and values of every layer.
        at: (N,) packed positions. The last layer then computes the others' keys and values and nothing more.
    """
    read, place = (None, None) if at is None else torch.unique(at, return_inverse=True)
    x = _embedded(trunk.embed_tokens, forest.input_ids)
    turn = turn_of(trunk, x, forest.positions)
    dtype = product_dtype(trunk)
    recompute = trunk.training and getattr(trunk, "gradient_checkpointing", False) and torch.is_grad_enabled()
    for layer in trunk.layers:
        rows = read if layer is trunk.layers[-1] else None
        run = partial(_DecoderLayer.apply, *turn, forest, layer, trunk.config, dtype, keep, rows)
        parameters = _parameters(layer)
        x = checkpoint(run, x, *parameters, use_reentrant=False) if recompute else run(x, *parameters)
    x = trunk.norm(x)
    return x if place is None else x[place]


def _embedded(embedding: nn.Module, ids: Tensor) -> Tensor:
    """(T, H) embeddings of (T,) token ids; their gradient may join those of the same weights as a head."""
    plain = type(embedding) is nn.Embedding and not (embedding.max_norm or embedding.scale_grad_by_freq)
    if not plain or embedding.sparse or embedding._forward_hooks or embedding._forward_pre_hooks:
        return embedding(ids)
    return _Embedding.apply(embedding.weight, ids, embedding.padding_idx)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, padding):
        ctx.parameter, ctx.padding = weight, padding
        ctx.save_for_backward(ids)
        return torch.embedding(weight, ids)

    @staticmethod
    def backward(ctx, grad):
        weight, (ids,) = ctx.parameter, ctx.saved_tensors
        if ctx.padding is not None:
            grad = grad.masked_fill((ids == ctx.padding)[:, None], 0)
        if added_to_rows(weight, ids, grad):
            return None, None, None
        return torch.ops.aten.embedding_dense_backward(grad, ids, len(weight), -1, False), None, None


def _parameters(layer: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the linear layers, group by group, then the norms': the order of the gradients."""
    groups = [[*(linear.weight for linear in g), *(linear.bias for linear in g)] for g in linears_of(layer)]
    return [p for group in groups for p in group if p is not None] + [norm.weight for norm in _norms(layer)]


def _norms(layer: nn.Module) -> list[nn.Module]:
    attention = layer.self_attn
    heads = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    return [layer.input_layernorm, layer.post_attention_layernorm, *heads]


class _Blocks:
    """Attention of a forest as products over dense blocks; keeps the weights of those with few keys."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, keeps: bool) -> tuple[Tensor, ...]:
        out, weights = attended(q, k, v, self.blocks, keeps=keeps)
        return out, *weights

    def backward(self, grad: Tensor, q, k, v, out, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attended_backward(grad, q, k, v, out, weights, self.blocks)


class _Tiles:
    """The same in tiles that leave out what no query sees; keeps a number a query."""

    def __init__(self, forest: Forest) -> None:
        self.forest = forest

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, keeps: bool) -> tuple[Tensor, ...]:
        return fused.attended(q, k, v, self.forest)

    def backward(self, grad: Tensor, q, k, v, out, normalisers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return fused.attended_backward(grad, q, k, v, out, normalisers, self.forest)


def _attention_of(forest: Forest, window: int | None, x: Tensor, q: Tensor) -> _Blocks | _Tiles:
    wide = window is None or window > int(forest.positions.max())
    if wide and fused.multiplies(x.dtype, q.dtype, x.device) and fused.attends(forest, q.shape[-1]):
        return _Tiles(forest)
    return _Blocks(dense_blocks(forest, window, q.dtype))


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cos, sin, forest, module, config, dtype, keep, rows, x, *parameters):
        keeps = any(ctx.needs_input_grad)
        attention, operands = None, []

        def attend(packed):
            nonlocal attention
            q, k, v = layer.operands(x, packed, (cos, sin))
            attention = _attention_of(forest, layer.window, x, q)
            out, *kept = attention.forward(q, k, v, keeps=keeps)
            operands.extend([q, k, v, out, *kept])
            if keep is not None:
                keep(layer.attention, k, v)
            return out.flatten(1)

        with torch.autocast(x.device.type, enabled=False):
            make = partial(Layer, module, config, lambda linears: LeanLinear(linears, dtype))
            layer = made_of(parameters, (module, dtype), make)
            out, kept = layer(x, attend, rows)
        if keeps:
            ctx.layer, ctx.attention, ctx.rows, ctx.parameters = layer, attention, rows, parameters
            ctx.save_for_backward(cos, sin, x, *kept, *operands)
        return out

    @staticmethod
    def backward(ctx, grad):
        cos, sin, x, *saved = ctx.saved_tensors
        layer, kept, operands = ctx.layer, Kept(*saved[:4]), saved[4:]
        grad_middle, down, gates, middle_norm = _gated_backward(layer, grad, kept)
        grad_x, output, inputs, norm, head_norms = _attention_backward(
            layer, grad_middle, x, kept, (cos, sin), operands, ctx.attention, ctx.rows
        )
        groups = [*inputs, *output, *gates, *down, norm, middle_norm, *head_norms]
        to_parameters = zip(ctx.parameters, groups, strict=True)
        return *(None,) * 8, grad_x, *(None if added(p, part) else part.to(p.dtype) for p, part in to_parameters)


def _gated_backward(layer: Layer, grad: Tensor, kept: Kept) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Through the second half of a layer: gradients of its input, of the linear layers and of the norm."""
    between, weight, eps = layer.operations(kept.middle), layer.middle_norm.weight, layer.middle_norm.variance_epsilon
    dtype = kept.gate_up.dtype
    grad_product, *down = _through(layer.down, grad.to(dtype), between.gated(kept.gate_up))
    grad_gate_up = between.gated_backward(kept.gate_up, grad_product)
    states = between.normed(kept.middle, weight, eps).to(dtype)
    grad_states, *gates = _through(layer.gate_up, grad_gate_up, states)
    grad_middle, norm = between.norm_backward(grad_states, kept.middle, weight, eps, grad)
    return grad_middle, down, gates, norm


def _attention_backward(layer, grad, x, kept, turn, operands, attention, rows):
    """Through the first half: gradients of its input, of the linear layers, of the norm and of the heads' norms."""
    between, weight, eps = layer.operations(x), layer.norm.weight, layer.norm.variance_epsilon
    q, out = operands[0], operands[3]
    grad_out, *output = _through(layer.output, grad.to(q.dtype), kept.attended)
    if rows is not None:
        grad, grad_out = _placed(grad, rows, len(x)), _placed(grad_out, rows, len(x))
    grads = attention.backward(grad_out.view(out.shape), *operands)
    if layer.head_norms is None:
        grad_packed, head_norms = between.rotated_backward(*grads, turn, layer.scaling), []
    else:
        grad_packed, head_norms = _head_norms_backward(layer, packed_together(*grads, layer.scaling), kept.packed, turn)
    states = between.normed(x, weight, eps).to(q.dtype)
    grad_states, *inputs = _through(layer.inputs, grad_packed.flatten(1), states)
    grad_x, norm = between.norm_backward(grad_states, x, weight, eps, grad)
    return grad_x, output, inputs, norm, head_norms


def _head_norms_backward(layer: Layer, grad: Tensor, packed: Tensor, turn: Turn) -> tuple[Tensor, list[Tensor]]:
    """Through rotation and norms of heads: `grad`, laid out as `packed` and written over, and the norms' gradients."""
    sizes, norms = [layer.heads, layer.kv_heads, layer.kv_heads], []
    for part, before, norm in zip(grad.split(sizes, 1), packed.split(sizes, 1), layer.head_norms, strict=False):
        unrotated = turned_back(part.to(turn[0].dtype), turn)
        before = before.to(unrotated.dtype)
        grad_part, grad_norm = norm_backward(unrotated, before, norm.weight, norm.variance_epsilon, None)
        part.copy_(grad_part)
        norms.append(grad_norm)
    return grad, norms


def _placed(part: Tensor, rows: Tensor, num: int) -> Tensor:
    """(num, H), zero but for these rows."""
    whole = part.new_zeros(num, part.shape[1])
    whole[rows] = part
    return whole


def _through(linear: LeanLinear, grad: Tensor, x: Tensor) -> list[Tensor]:
    """Gradient of the input of linear layers, then those of their weights and biases."""
    grad_x, weights, biases = linear.backward(grad, x)
    return [grad_x, *weights, *biases]
