"""Attention of a forest on a CPU as plain matrix products, forward and backward.

torch's fused kernel for CPUs multiplies in float32 blocks, pads nothing away between trees, and repeats grouped keys;
autograd over slices of one packed row fills a whole gradient with zeros for each slice. Here every block of the plan
is two products forward and five backward, the query heads of one key head are rows of one product, and gradients go
straight to their places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.trees.masks import Block, Slices

KEPT_KEYS = 512
"""Attention weights over more keys than this are computed again in the backward pass instead of being kept."""


def forest_attention(
    blocks: Sequence[Block], query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None
) -> Tensor:
    """Tree attention without dropout or caps.

    Args:
        blocks: of `dense_blocks` or `branch_blocks`. What they leave out of the queries is not computed: those rows of
            the result hold anything.
        query: (1, heads, T, D); key: (1, kv_heads, T, D); value: (1, kv_heads, T, E), of one floating type.
        scaling: factor of the scores; 1 / sqrt(D) unless set.

    Returns:
        (1, T, heads, E), contiguous.
    """
    return _ForestAttention.apply(query, key, value, blocks, scaling)


class _ForestAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, blocks, scaling):
        ctx.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = laid_out(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), ctx.scaling)
        keeps = any(ctx.needs_input_grad)
        out, kept = attended(q, k, v, blocks, keeps=keeps)
        if keeps:
            ctx.save_for_backward(q, k, v, out, *kept)
            ctx.blocks = blocks
        return out.flatten(1, 2)[None]

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, *kept = ctx.saved_tensors
        grad_q, grad_k, grad_v = attended_backward(grad_out[0].view(out.shape), q, k, v, out, kept, ctx.blocks)
        grad_q = grad_q.mul_(ctx.scaling).transpose(1, 2).flatten(0, 1)
        return grad_q[None], grad_k.to(k.dtype)[None], grad_v.to(v.dtype)[None], None, None


def laid_out(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, heads, D), scaled, as (kv_heads, T, groups, D); keys and values (T, kv_heads, ..) heads first.

    So the queries of one key head and block are the rows of one matrix.
    """
    grouped = query.unflatten(1, (key.shape[1], -1)).transpose(0, 1)
    q = query.new_empty(grouped.shape)
    torch.mul(grouped, scaling, out=q)
    return q, key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()


def attended(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], *, keeps: bool) -> tuple[Tensor, list[Tensor]]:
    """Attention of what `laid_out` returns.

    Returns:
        (T, kv_heads, groups, E); and, with `keeps`, the attention weights of the blocks of up to `KEPT_KEYS` keys.
    """
    kv_heads, num_tokens, groups, _ = q.shape
    out = v.new_empty(num_tokens, kv_heads, groups, v.shape[-1])
    kept = []
    for block in blocks:
        keys, rows = _taken(k, block.key_slices), slice(block.start, block.stop)
        weights = _weights(q[:, rows], keys, block.mask)
        out[rows] = (weights @ _taken(v, block.key_slices)).view(kv_heads, -1, groups, v.shape[-1]).transpose(0, 1)
        if keeps and keys.shape[1] <= KEPT_KEYS:
            kept.append(weights)
    return out, kept


def attended_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Sequence[Tensor], blocks: Sequence[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attended`'s q, k and v from that of its output; those of k and v in float32 or wider."""
    kv_heads, _, _, d = q.shape
    # What the softmax takes off every score's gradient: the product of a row's output and its gradient.
    offset = (grad.float() * out).sum(-1).to(q.dtype).transpose(0, 1).contiguous()
    grad = grad.transpose(0, 1).contiguous()
    grad_q = torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    kept = iter(kept)
    for block in blocks:
        rows, slices = slice(block.start, block.stop), block.key_slices
        keys, values = _taken(k, slices), _taken(v, slices)
        queries = q[:, rows].reshape(kv_heads, -1, d)
        grads = grad[:, rows].reshape(kv_heads, -1, v.shape[-1])
        weights = next(kept) if keys.shape[1] <= KEPT_KEYS else _weights(q[:, rows], keys, block.mask)
        _put(grad_v, slices, weights.transpose(1, 2) @ grads)
        scores = (grads @ values.transpose(1, 2)).sub_(offset[:, rows].reshape(kv_heads, -1, 1)).mul_(weights)
        grad_q[:, rows] = (scores @ keys).view(grad_q[:, rows].shape)
        _put(grad_k, slices, scores.transpose(1, 2) @ queries)
    return grad_q, grad_k, grad_v


def _weights(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """(kv_heads, Q * groups, K) softmax weights of scaled queries (kv_heads, Q, groups, D)."""
    kv_heads, num, groups, d = queries.shape
    scores = queries.reshape(kv_heads, num * groups, d) @ keys.transpose(1, 2)
    scores.view(kv_heads, num, groups, -1).add_(mask[:, None])
    return scores.softmax(-1)


def _taken(x: Tensor, slices: Slices) -> Tensor:
    """The tokens (axis 1) of these packed ranges."""
    parts = [x[:, start:stop] for start, stop in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _put(total: Tensor, slices: Slices, parts: Tensor) -> None:
    """Add to these packed ranges."""
    for (start, stop), part in zip(slices, parts.split([stop - start for start, stop in slices], 1), strict=True):
        total[:, start:stop] += part
