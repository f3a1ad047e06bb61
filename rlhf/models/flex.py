"""Tree attention on CUDA: one fused kernel over the whole forest (FlexAttention, Dong et al. 2024, arXiv 2412.05496).

A forest's mask is `visible(q, k) = (k <= q) & (q < end[k])`, with a sliding window also `depth[q] - depth[k] < window`:
FlexAttention skips the blocks of 128 x 128 in which nothing is visible, and masks the others inside its kernel. The
kernel needs a compiler on the machine (Triton). Before the first use on a device a small forest is put through it,
forward and backward, beside plain attention; where that fails or differs, the plan of dense blocks serves instead, and
a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from rlhf.trees.forest import Forest, Tree
from rlhf.trees.masks import visible

TOLERANCE = 2e-2
"""Largest difference from plain attention in the check, of the largest value; bf16 and TF32 stay well within."""


def fused_attention(
    forest: Forest,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Tree attention without dropout.

    Args:
        query: (1, heads, T, D); key, value: (1, kv_heads, T, D), of one floating type.
        window: sliding window, a distance in depth, or None.
        scaling: factor of the scores; 1 / sqrt(D) unless set.
        softcap: bound c of the scores, as c * tanh(score / c), or None.

    Returns:
        (1, T, heads, D).
    """
    capped = None if softcap is None else _capped(float(softcap))
    attend = _compiled() if query.device.type == "cuda" else flex_attention
    out = attend(
        query,
        key,
        value,
        score_mod=capped,
        block_mask=block_mask(forest, window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


def block_mask(forest: Forest, window: int | None) -> BlockMask:
    """The forest's mask in FlexAttention's form; made once and kept on the forest."""
    key = ("flex", window)
    if key not in forest._cache:
        end, depth = forest.end, forest.positions

        def sees(batch, head, q, k):
            seen = (k <= q) & (q < end[k])
            return seen if window is None else seen & (depth[q] - depth[k] < window)

        num = forest.num_tokens
        forest._cache[key] = create_block_mask(sees, None, None, num, num, device=end.device)
    return forest._cache[key]


@lru_cache(maxsize=8)
def works_on(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernel gives plain attention's numbers and gradients on this device; found out once."""
    try:
        difference = _difference(device, dtype, head_size)
    except Exception as error:  # whatever a compiler or a driver raises, there is another way
        reason = f"fails ({type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''})"
    else:
        if difference < TOLERANCE:
            return True
        reason = f"differs from plain attention by {difference:.1e}"
    warnings.warn(f"FlexAttention {reason} on {device}; attention runs in dense blocks", stacklevel=2)
    return False


def _difference(device: torch.device, dtype: torch.dtype, head_size: int) -> float:
    """The largest difference of outputs and gradients, of each one's largest value, on a forest of 400 tokens."""
    generator = torch.Generator().manual_seed(0)
    segments = [[torch.zeros(n, dtype=torch.long) for n in lengths] for lengths in ((150, 40, 60), (150,))]
    forest = Forest([Tree.of(*parts) for parts in segments]).to(device)
    num = forest.num_tokens
    shapes = (1, 4, num, head_size), (1, 2, num, head_size), (1, 2, num, head_size)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)
    weights = torch.randn(1, num, 4, head_size, generator=generator).to(device, dtype)
    fused = fused_attention(forest, query, key, value, window=None, scaling=None, softcap=None)
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    plain = F.scaled_dot_product_attention(query, *repeated, attn_mask=visible(forest)).transpose(1, 2)
    worst = 0.0
    for one, other in zip(
        (fused, *torch.autograd.grad(fused, (query, key, value), weights)),
        (plain, *torch.autograd.grad(plain, (query, key, value), weights)),
        strict=True,
    ):
        worst = max(worst, ((one - other).abs().max() / other.abs().max()).item())
    return worst


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=8)
def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score, batch, head, q, k):
        return softcap * torch.tanh(score / softcap)

    return capped
