"""Tree attention behind transformers' attention interface.

Importing this module registers the attention implementation "tree". Inside `attending(plan)` a model set to it
computes what the plan says; outside it behaves as the ordinary `sdpa` implementation, so that the same model
still serves `generate` and plain forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.flex import fused_attention, works_on
from rlhf.models.products import forest_attention
from rlhf.trees.forest import Forest
from rlhf.trees.masks import Block, Slices, attention_plan, branch_blocks, causal_mask, dense_blocks

IMPLEMENTATION = "tree"


class Attending(Protocol):
    """What one forward pass wants from every attention layer."""

    def __call__(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: float | int | None
    ) -> Tensor:
        """(1 or B, heads, Q, D) queries and (.., kv_heads, K, D) new keys and values to (.., Q, heads, D)."""


class UnsupportedAttention(Exception):
    """An attention layer passes something that tree attention does not know (sinks, biases)."""


_active: ContextVar[Attending | None] = ContextVar("active", default=None)


@contextmanager
def attending(plan: Attending | None) -> Iterator[None]:
    """Make `plan` what the "tree" implementation computes in this context."""
    token = _active.set(plan)
    try:
        yield
    finally:
        _active.reset(token)


def active_plan() -> Attending | None:
    return _active.get()


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


class TreeAttention:
    """Attention of every packed token to its ancestors: the training forward.

    `windows` collects the sliding windows that the layers asked for.
    """

    def __init__(self, forest: Forest) -> None:
        self.forest = forest
        self.windows: set[int | None] = set()

    def __call__(self, layer, query, key, value, *, scaling, dropout, window, softcap) -> Tensor:
        self.windows.add(window)
        if on_cpu(query) and not dropout and softcap is None:
            blocks = dense_blocks(self.forest, window, query.dtype)
            return forest_attention(blocks, query, key, value, scaling=scaling)
        if not on_cpu(query) and not dropout and works_on(query.device, query.dtype, query.shape[-1]):
            options = {"window": window, "scaling": scaling, "softcap": softcap}
            return fused_attention(self.forest, query, key, value, **options)
        blocks = attention_plan(self.forest, window, query.dtype)
        return _attend_blocks(blocks, query, key, value, scaling=scaling, dropout=dropout, softcap=softcap)


class KeepingAttention(TreeAttention):
    """Tree attention that keeps every layer's keys and values, (kv_heads, T, D) each, without their graph."""

    def __init__(self, forest: Forest) -> None:
        super().__init__(forest)
        self.layers: dict[int, tuple[Tensor, Tensor]] | None = {}

    def release(self) -> None:
        """Forget them, and keep none of a pass that checkpointing runs again."""
        self.layers = None

    def keep(self, layer: nn.Module, key: Tensor, value: Tensor) -> None:
        """Take the keys and values of an attention layer."""
        if self.layers is not None:
            self.layers[id(layer)] = (key.detach(), value.detach())

    def __call__(self, layer, query, key, value, **options) -> Tensor:
        self.keep(layer, key[0], value[0])
        return super().__call__(layer, query, key, value, **options)


class BranchAttention:
    """Attention of the tokens below the roots of a forest, where the roots' keys and values are known.

    Args:
        layers: keys and values of each layer, (kv_heads, T, D) each, of a pass in which the roots stood at `known`.
    """

    def __init__(self, forest: Forest, layers: dict[int, tuple[Tensor, Tensor]], known: Tensor) -> None:
        self.forest, self.layers, self.known = forest, layers, known
        self.roots, self.fresh = forest.root_index, forest.fresh_index

    def _placed(self, new: Tensor, known: Tensor | None) -> Tensor:
        whole = new.new_zeros(1, new.shape[1], self.forest.num_tokens, new.shape[3])
        whole[:, :, self.fresh] = new
        if known is not None:
            whole[0, :, self.roots] = known[:, self.known]
        return whole

    def __call__(self, layer, query, key, value, *, scaling, dropout, window, softcap) -> Tensor:
        keys, values = self.layers[id(layer)]
        query, key, value = self._placed(query, None), self._placed(key, keys), self._placed(value, values)
        blocks = branch_blocks(self.forest, window, query.dtype)
        if on_cpu(query) and not dropout and softcap is None:
            return forest_attention(blocks, query, key, value, scaling=scaling)[:, self.fresh]
        return _attend_blocks(blocks, query, key, value, scaling=scaling, dropout=dropout, softcap=softcap)


def _attend_blocks(blocks: Sequence[Block], query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """(1, Q, heads, D): `attend` of every block's queries, end to end."""
    outputs = []
    for block in blocks:
        q = query[:, :, block.start : block.stop]
        k, v = (_gather(x, block.key_slices) for x in (key, value))
        outputs.append(attend(q, k, v, block.mask, **options))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _gather(x: Tensor, slices: Slices) -> Tensor:
    parts = [x[:, :, start:stop] for start, stop in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention with an additive mask (None: causal), grouped heads, and an optional cap of the scores.

    Args:
        query: (B, heads, Q, D); key, value: (B, kv_heads, K, D).
        mask: broadcastable to (B, heads, Q, K), in the query's dtype.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (_repeat(x, groups) for x in (key, value))
    if softcap is None:
        causal = mask is None and query.shape[2] > 1
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
    scores = (query @ key.transpose(-1, -2)) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores + (causal_mask(*scores.shape[-2:], scores.dtype, scores.device) if mask is None else mask)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32), dropout).to(value.dtype)
    return weights @ value


def _repeat(x: Tensor, groups: int) -> Tensor:
    """(B, kv_heads, K, D) to (B, kv_heads * groups, K, D); each head stands `groups` times in a row."""
    b, h, k, d = x.shape
    return x[:, :, None].expand(b, h, groups, k, d).reshape(b, h * groups, k, d)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    plan = active_plan()
    if plan is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(
                ~attention_mask, torch.finfo(query.dtype).min
            )
        out = attend(query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap)
        return out.transpose(1, 2).contiguous(), None
    for name in ("s_aux", "position_bias", "sinks"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"its attention passes {name!r}")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave queries and keys in float32; cast them once, not in every block's products.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = plan(module, query, key, value, scaling=scaling, dropout=dropout, window=sliding_window, softcap=softcap)
    return out.contiguous(), None


def _mask(*args, **kwargs) -> Tensor | None:
    """No mask inside `attending`: the plan holds it. Outside, the ordinary one, always spelled out."""
    if active_plan() is not None:
        return None
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
