"""Training Llama-like models on a CPU: a decoder layer as one autograd function over a forest.

Autograd over transformers' layers keeps every intermediate result, adds up the gradients of each projection's input
apart, and takes two or three passes over memory where one does. Here a layer keeps its input, the residual stream in
its middle, attention's operands and the gated layer's, and computes norms and activation again in the backward pass.
A training step then needs a quarter to nearly half less memory. The forward pass is `rlhf/models/layers.py`, that of
sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.models.layers import Kept, Layer, LeanLinear, linears_of, product_dtype, turn_of
from rlhf.models.products import attended, attended_backward, laid_out
from rlhf.trees.forest import Forest
from rlhf.trees.masks import dense_blocks

Keep = Callable[[nn.Module, Tensor, Tensor], None]
"""Takes an attention layer, and its keys and values, (kv_heads, T, D) each."""


def trained_states(trunk: nn.Module, forest: Forest, *, keep: Keep | None = None) -> Tensor:
    """(T, H) last hidden states of a forest's tokens, by tree attention.

    Args:
        trunk: one that `layers.is_lean`, on a CPU, its attention without dropout.
        keep: called with the keys and values of every layer.
    """
    x = trunk.embed_tokens(forest.input_ids)
    turn = tuple(part[0] for part in turn_of(trunk, x, forest.positions[None]))
    dtype = product_dtype(trunk)
    recompute = trunk.training and getattr(trunk, "gradient_checkpointing", False) and torch.is_grad_enabled()
    for layer in trunk.layers:
        run = partial(_DecoderLayer.apply, *turn, forest, layer, trunk.config, dtype, keep)
        parameters = _parameters(layer)
        x = checkpoint(run, x, *parameters, use_reentrant=False) if recompute else run(x, *parameters)
    return trunk.norm(x)


def _parameters(layer: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the linear layers, group by group, then the norms': the order of the gradients."""
    groups = [[*(linear.weight for linear in g), *(linear.bias for linear in g)] for g in linears_of(layer)]
    return [p for group in groups for p in group if p is not None] + [norm.weight for norm in _norms(layer)]


def _norms(layer: nn.Module) -> list[nn.Module]:
    attention = layer.self_attn
    heads = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    return [layer.input_layernorm, layer.post_attention_layernorm, *heads]


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cos, sin, forest, module, config, dtype, keep, x, *parameters):
        keeps = any(ctx.needs_input_grad)
        blocks, operands = None, []

        def attend(query, key, value):
            nonlocal blocks
            blocks = dense_blocks(forest, layer.window, query.dtype)
            q, k, v = laid_out(*(part[0].transpose(0, 1) for part in (query, key, value)), layer.attention.scaling)
            out, kept = attended(q, k, v, blocks, keeps=keeps)
            operands.extend([q, k, v, out, *kept])
            if keep is not None:
                keep(layer.attention, k, v)
            return out.flatten(1, 2)[None]

        with torch.autocast(x.device.type, enabled=False):
            layer = Layer(module, config, lambda linears: LeanLinear(linears, dtype))
            out, kept = layer(x[None], (cos, sin), attend)
        if keeps:
            ctx.layer, ctx.blocks = layer, blocks
            ctx.save_for_backward(cos, sin, x, *(part if part is None else part[0] for part in kept), *operands)
        return out[0]

    @staticmethod
    def backward(ctx, grad):
        cos, sin, x, *saved = ctx.saved_tensors
        layer, kept, operands = ctx.layer, Kept(*saved[:4]), saved[4:]
        grad_middle, down, gates, middle_norm = _gated_backward(layer, grad, kept)
        grad_x, output, inputs, norm, head_norms = _attention_backward(
            layer, grad_middle, x, kept, (cos, sin), operands, ctx.blocks
        )
        groups = [*inputs, *output, *gates, *down, norm, middle_norm, *head_norms]
        return *(None,) * 7, grad_x, *(part.to(x.dtype) for part in groups)


def _gated_backward(layer: Layer, grad: Tensor, kept: Kept) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Through the second half of a layer: gradients of its input, of the linear layers and of the norm."""
    gate, up = kept.gate_up.chunk(2, -1)
    activated = F.silu(gate)
    grad_product, *down = _through(layer.down, grad.to(gate.dtype), activated * up)
    grad_gate_up = torch.empty_like(kept.gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, -1)
    torch.mul(grad_product, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_product.mul_(up), gate, grad_input=grad_gate)
    states, scale = _standardised(kept.middle, layer.middle_norm)
    grad_states, *gates = _through(layer.gate_up, grad_gate_up, (states * layer.middle_norm.weight).to(gate.dtype))
    grad_middle, norm = _norm_backward(grad_states, states, scale, layer.middle_norm)
    return grad_middle.add_(grad), down, gates, norm


def _attention_backward(layer, grad, x, kept, turn, operands, blocks):
    """Through the first half: gradients of its input, of the linear layers, of the norm and of the heads' norms."""
    q, k, v, out, *weights = operands
    grad_out, *output = _through(layer.output, grad.to(q.dtype), kept.attended)
    grad_q, grad_k, grad_v = attended_backward(grad_out.view(out.shape), q, k, v, out, weights, blocks)
    heads, kv_heads = layer.heads, layer.kv_heads
    grad_packed = q.new_empty(len(x), heads + 2 * kv_heads, q.shape[-1])
    grad_query, grad_key, grad_value = grad_packed.split([heads, kv_heads, kv_heads], 1)
    torch.mul(grad_q.transpose(0, 1), layer.attention.scaling, out=grad_query.unflatten(1, (kv_heads, -1)))
    grad_key.copy_(grad_k.transpose(0, 1))
    grad_value.copy_(grad_v.transpose(0, 1))
    rotated = grad_packed[:, : heads + kv_heads]
    cos, sin = turn
    # The swap of halves in `turned` is its own inverse.
    unrotated = (rotated * sin).roll(sin.shape[-1] // 2, -1).addcmul_(rotated, cos)
    head_norms = []
    if layer.head_norms is not None:
        before = kept.packed[:, : heads + kv_heads].to(x.dtype)
        for part, states, norm in zip(
            unrotated.split([heads, kv_heads], 1), before.split([heads, kv_heads], 1), layer.head_norms, strict=True
        ):
            grad_part, grad_norm = _norm_backward(part, *_standardised(states, norm), norm)
            part.copy_(grad_part)
            head_norms.append(grad_norm)
    rotated.copy_(unrotated)
    states, scale = _standardised(x, layer.norm)
    grad_states, *inputs = _through(layer.inputs, grad_packed.flatten(1), (states * layer.norm.weight).to(q.dtype))
    grad_x, norm = _norm_backward(grad_states, states, scale, layer.norm)
    return grad_x.add_(grad), output, inputs, norm, head_norms


def _through(linear: LeanLinear, grad: Tensor, x: Tensor) -> list[Tensor]:
    """Gradient of the input of linear layers, then those of their weights and biases."""
    grad_x, weights, biases = linear.backward(grad, x)
    return [grad_x, *weights, *biases]


def _standardised(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a norm's weight multiplies, (.., H), and by what the input was divided to get there, inverted, (.., 1)."""
    scale = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt_()
    return x * scale, scale


def _norm_backward(grad: Tensor, states: Tensor, scale: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Gradients of a norm's input and weight from that of its output, what `_standardised` gave, in its dtype."""
    grad = grad.to(states.dtype)
    product = grad * states
    grad_weight = product.flatten(0, -2).sum(0)
    mean = (product @ norm.weight).unsqueeze(-1) / states.shape[-1]
    grad_x = (grad * norm.weight).addcmul_(states, mean, value=-1).mul_(scale)
    return grad_x, grad_weight
