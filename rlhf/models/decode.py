"""Keys and values of the tokens before, and attention of one new token a row to them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.models import fused
from rlhf.models.attention import KeepingAttention

GROWTH = 64
"""Columns by which buffers of keys and values grow."""


def cache_of(prefill: KeepingAttention, lengths: list[int], num_samples: int, *, lean: bool) -> Cache | TiledCache:
    """The keys and values of prompts, each for so many samples.

    Args:
        prefill: after a pass over a forest of the prompts, of these lengths.
        lean: attention is asked for by `decode` alone.
    """
    key, _ = next(iter(prefill.layers.values()))
    in_tiles = fused.multiplies(torch.float32, key.dtype, key.device) and key.shape[-1] % fused.COLUMNS == 0
    return (TiledCache if lean and in_tiles else Cache)(prefill, lengths, num_samples)


class Cache:
    """Buffers of keys and values, right-aligned so that all rows write one column; from one step to the next, addresses
    and masks change.

    Buffers are (rows * kv_heads, columns, D), read whole: the columns that hold nothing yet are masked, since a part
    of a buffer would be copied before every product. Row b's tokens stand in columns starts[b] .. length - 1.
    """

    recordable = False

    def __init__(self, prefill: KeepingAttention, lengths: list[int], num_samples: int) -> None:
        self.length = max(lengths)
        device = prefill.forest.input_ids.device
        self.starts = torch.tensor([self.length - n for n in lengths for _ in range(num_samples)], device=device)
        self.room = self.length + GROWTH
        self.buffers = {
            layer: [self._laid_out(x, lengths, num_samples) for x in pair] for layer, pair in prefill.layers.items()
        }
        self.masks: dict[int | None, Tensor] = {}

    def _laid_out(self, x: Tensor, lengths: list[int], num_samples: int) -> Tensor:
        buffer = x.new_zeros(len(lengths), num_samples, x.shape[0], self.room, x.shape[2])
        for b, part in enumerate(x.split(lengths, dim=1)):
            buffer[b, :, :, self.length - lengths[b] : self.length] = part
        return buffer.flatten(0, 2)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(rows, 1, columns) additive mask of this step."""
        if window not in self.masks:
            columns = torch.arange(self.room, device=self.starts.device)
            first = self.starts if window is None else self.starts.clamp(min=self.length - window)
            hidden = (columns < first[:, None]) | (columns >= self.length)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[window] = mask.masked_fill_(hidden, float("-inf"))[:, None]
        return self.masks[window]

    def advance(self) -> None:
        """Open one more column, with new room where there is none."""
        self.length += 1
        self.masks.clear()
        if self.length > self.room:
            self.room += GROWTH
            for pair in self.buffers.values():
                pair[:] = [F.pad(buffer, (0, 0, 0, GROWTH)) for buffer in pair]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        num = len(self.starts)
        self.starts = self.starts[rows]
        self.masks.clear()
        for pair in self.buffers.values():
            pair[:] = [buffer.unflatten(0, (num, -1))[rows].flatten(0, 1) for buffer in pair]

    def __call__(self, layer, query, key, value, *, scaling, dropout, window, softcap) -> Tensor:
        """Attention of a model's own layer: (B, heads, 1, D) queries, (B, kv_heads, 1, D) keys and values."""
        b, heads, _, d = query.shape
        # The query heads of one key head are the rows of one product: nothing is repeated.
        scaled = query.reshape(b, key.shape[1], -1, d) * (d**-0.5 if scaling is None else scaling)
        out = self._attended(layer, scaled, key.squeeze(2), value.squeeze(2), window, softcap)
        return out.view(b, 1, heads, -1)

    def decode(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """(T, heads * E) from an attention layer, operands of `Layer.operands`, and its sliding window."""
        if fused.usable(torch.float32, q.dtype, q.device):
            keys, values = self.buffers[id(layer)]
            return fused.decoded(q, k, v, keys, values, self.starts, self.length, window)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return self._attended(layer, q, k, v, window, None).flatten(1)

    def _attended(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None
    ) -> Tensor:
        """(B, kv_heads, group, E) from scaled queries (B, kv_heads, group, D), keys and values (B, kv_heads, ..)."""
        keys, values = self.buffers[id(layer)]
        keys[:, self.length - 1] = key.flatten(0, 1)
        values[:, self.length - 1] = value.flatten(0, 1)
        scores = torch.bmm(query.flatten(0, 1), keys.transpose(1, 2))
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        scores.view(len(query), -1, self.room).add_(self._mask(window, query.dtype))
        return torch.bmm(scores.softmax(-1), values).view(*query.shape[:3], -1)


class TiledCache:
    """Buffers for `fused.decoded_in_tiles`, left-aligned; every step but the first on the same ones reads the same
    addresses, so a trunk may keep what it recorded of one (`rlhf/models/runtime.py`).

    Attributes:
        recorded: what a trunk keeps here for its next step; gone where the buffers are others.
    """

    recordable = True

    def __init__(self, prefill: KeepingAttention, lengths: list[int], num_samples: int) -> None:
        self.lengths = torch.tensor(lengths).repeat_interleave(num_samples)
        self.longest, self.blocks = max(lengths), -(-(max(lengths) + GROWTH) // fused.KEYS)
        self.buffers = {
            layer: fused.cached_in_tiles(key, value, lengths, num_samples, self.blocks)
            for layer, (key, value) in prefill.layers.items()
        }
        self.recorded: Any = None

    def advance(self) -> None:
        """Make place for one more token of each row, with new room where there is none."""
        self.lengths += 1
        self.longest += 1
        if self.longest > self.blocks * fused.KEYS:
            more = -(-GROWTH // fused.KEYS)
            self.blocks += more
            self.buffers = {
                layer: (
                    F.pad(keys, (0, 0, 0, 0, 0, 0, 0, more * fused.KEYS // 16)),
                    F.pad(values, (0, 0, 0, 0, 0, more * fused.KEYS // 2)),
                )
                for layer, (keys, values) in self.buffers.items()
            }
            self.recorded = None

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        num = len(self.lengths)
        self.lengths = self.lengths[rows]
        self.buffers = {
            layer: tuple(buffer.unflatten(0, (num, -1))[rows].flatten(0, 1) for buffer in pair)
            for layer, pair in self.buffers.items()
        }
        self.recorded = None

    def decode(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """As `Cache.decode`."""
        return fused.decoded_in_tiles(q, k, v, *self.buffers[id(layer)], self.lengths, window)
