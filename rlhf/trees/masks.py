"""Tree attention as a plan: which queries see which keys, in as few dense pieces as pay for themselves."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.trees.forest import Forest

# Below this many tokens a tree is one masked block: the scores that the mask throws away cost less than more calls.
WHOLE_TREE_TOKENS = 512
# Queries of one dense block: of the scores above the diagonal of a long trunk, most are then never computed.
DENSE_QUERIES = 256

Slices = tuple[tuple[int, int], ...]
"""Packed ranges [start, stop) of tokens."""


class Block(NamedTuple):
    """Queries [start, stop) of the packed row against the keys of `key_slices`, in path order.

    `mask` is an additive (queries, keys) mask, or None: then the keys are the queries, and attention plain causal.
    """

    start: int
    stop: int
    key_slices: Slices
    mask: Tensor | None


def visible(forest: Forest, window: int | None = None) -> Tensor:
    """(T, T) bool: whether packed token q (row) sees packed token k (column).

    A token sees its ancestors and itself; with a sliding `window`, only those less than `window` before it on
    its path (a distance in depth, not in packed positions).
    """
    return _visible(
        forest, slice(0, forest.num_tokens), torch.arange(forest.num_tokens, device=forest.end.device), window
    )


def _visible(forest: Forest, queries: slice, keys: Tensor, window: int | None) -> Tensor:
    q = torch.arange(queries.start, queries.stop, device=keys.device)[:, None]
    mask = (keys[None] <= q) & (q < forest.end[keys][None])
    if window is not None:
        mask &= forest.positions[queries][:, None] - forest.positions[keys][None] < window
    return mask


def attention_plan(forest: Forest, window: int | None, dtype: torch.dtype) -> list[Block]:
    """The blocks whose outputs, end to end, are the tree attention of `forest`; made once and kept on it.

    A tree without forks is plain causal attention; a small one a single masked block; a large one a block for
    each segment against its own path only, so that the work grows with the paths and not with their product.
    """
    key = (window, dtype)
    if key not in forest._cache:
        forest._cache[key] = _plan(forest, window, dtype)
    return forest._cache[key]


def dense_blocks(forest: Forest, window: int | None, dtype: torch.dtype) -> list[Block]:
    """The plan cut to at most `DENSE_QUERIES` queries a block, each with its mask; made once and kept on the forest."""
    key = ("dense", window, dtype)
    if key not in forest._cache:
        forest._cache[key] = [
            part for block in attention_plan(forest, window, dtype) for part in _dense(block, dtype, forest.end.device)
        ]
    return forest._cache[key]


def branch_blocks(forest: Forest, window: int | None, dtype: torch.dtype) -> list[Block]:
    """Dense blocks of the queries below the roots, whose keys are given; made once and kept on the forest."""
    key = ("branches", window, dtype)
    if key not in forest._cache:
        blocks = [
            _masked(forest, start, start + length, _path_slices(forest, s), window, dtype)
            for s, (start, length, parent, _) in enumerate(forest.segments)
            if length and parent >= 0
        ]
        forest._cache[key] = [part for block in blocks for part in _dense(block, dtype, forest.end.device)]
    return forest._cache[key]


def _dense(block: Block, dtype: torch.dtype, device: torch.device) -> list[Block]:
    parts = []
    for start in range(block.start, block.stop, DENSE_QUERIES):
        stop = min(start + DENSE_QUERIES, block.stop)
        if block.mask is None:
            # Added to the scores of every layer: a copy without gaps is made once.
            mask = causal_mask(stop - start, stop - block.start, dtype, device).contiguous()
            parts.append(Block(start, stop, ((block.start, stop),), mask))
        else:
            mask = block.mask[start - block.start : stop - block.start]
            parts.append(Block(start, stop, block.key_slices, mask))
    return parts


def causal_mask(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(queries, keys) additive causal mask; the queries are the last of the keys. A part of one that is kept."""
    mask = _causal_mask(_next_power(queries), _next_power(keys), dtype, device)
    return mask[mask.shape[0] - queries :, mask.shape[1] - keys :]


def _next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@lru_cache(maxsize=64)  # by powers of 2, so that runs of any length hold a few masks, whatever lengths they meet
def _causal_mask(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    future = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(future, float("-inf"))


def _plan(forest: Forest, window: int | None, dtype: torch.dtype) -> list[Block]:
    by_tree: list[list[int]] = [[] for _ in forest.trees]
    for s, (_, length, _, tree) in enumerate(forest.segments):
        if length:
            by_tree[tree].append(s)
    blocks = []
    for (start, stop), segments in zip(forest.trees, by_tree, strict=True):
        if start == stop:
            continue
        chain = all(forest.end[forest.segments[s][0]] == stop for s in segments)
        depth = int(forest.positions[start:stop].max()) + 1
        narrow = window if window is not None and window < depth else None
        if chain and narrow is None:
            blocks.append(Block(start, stop, ((start, stop),), None))
        elif stop - start <= WHOLE_TREE_TOKENS:
            blocks.append(_masked(forest, start, stop, ((start, stop),), narrow, dtype))
        else:
            for s in segments:
                first, length, _, _ = forest.segments[s]
                slices = _path_slices(forest, s)
                if len(slices) == 1 and slices[0] == (first, first + length) and narrow is None:
                    blocks.append(Block(first, first + length, slices, None))
                else:
                    blocks.append(_masked(forest, first, first + length, slices, narrow, dtype))
    return blocks


def _path_slices(forest: Forest, segment: int) -> Slices:
    """Packed ranges of the path from the root to `segment`, neighbours merged."""
    slices: list[tuple[int, int]] = []
    while segment >= 0:
        start, length, parent, _ = forest.segments[segment]
        if length:
            if slices and slices[-1][0] == start + length:
                slices[-1] = (start, slices[-1][1])
            else:
                slices.append((start, start + length))
        segment = parent
    return tuple(reversed(slices))


def _masked(forest: Forest, start: int, stop: int, slices: Slices, window: int | None, dtype: torch.dtype) -> Block:
    device = forest.end.device
    keys = torch.cat([torch.arange(a, b, device=device) for a, b in slices])
    seen = _visible(forest, slice(start, stop), keys, window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    return Block(start, stop, slices, mask)
