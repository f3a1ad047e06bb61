"""Which rows make which step: pure functions of (seed, step), so that a step never depends on what ran before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def epoch_order(num_rows: int, *, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """(num_rows,) the order in which an epoch visits the rows: seeded and new in each epoch, or the file's."""
    if not shuffle:
        return torch.arange(num_rows)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_rows, generator=generator)


_order_in_use = lru_cache(maxsize=2)(epoch_order)
"""The order of the epoch in hand, which nobody changes: drawn anew for each step, a million rows cost 9 ms a step."""


def num_steps(num_rows: int, global_batch: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimiser steps of a run: the last, short window of an epoch counts as a step.

    >>> num_steps(10, 4, 2), num_steps(10, 4, 0.5), num_steps(10, 4, 2, max_steps=5)
    (6, 2, 5)
    """
    steps = max(1, math.ceil(epochs * math.ceil(num_rows / global_batch) - 1e-9))
    return steps if max_steps is None else min(steps, max_steps)


def rollout_sizes(num_prompts: int, global_batch: int, num_steps: int) -> dict[int, int]:
    """Number of steps of each size of rollout, in prompts: the last of an epoch is short where they don't divide.

    >>> rollout_sizes(10, 4, num_steps=5)
    {4: 4, 2: 1}
    """
    whole, rest = divmod(num_prompts, global_batch)
    epochs, steps = divmod(num_steps, whole + (rest > 0))
    sizes = {global_batch: epochs * whole + min(steps, whole), rest: epochs * (rest > 0)}
    return {size: number for size, number in sizes.items() if number}


def rows_of_step(step: int, num_rows: int, global_batch: int, *, seed: int, shuffle: bool) -> list[int]:
    """The rows, over all devices, of step `step` (from 0): the next window of its epoch's order."""
    epoch, window = divmod(step, math.ceil(num_rows / global_batch))
    order = _order_in_use(num_rows, seed=seed, epoch=epoch, shuffle=shuffle)
    return order[window * global_batch : (window + 1) * global_batch].tolist()


def mismatched(rows: Sequence[int], num_rows: int) -> list[int]:
    """For each row of a step another one, whose response its prompt is paired with: the one before it in the step.

    So the step's mismatched pairs hold the responses of its own rows, each once. A row that is alone in its step takes
    the response of the split's next row.

    Args:
        num_rows: of the split; with a single one, a row is paired with itself.

    >>> mismatched([7, 2, 5], 9), mismatched([8], 9)
    ([5, 7, 2], [0])
    """
    return [(rows[0] + 1) % num_rows] if len(rows) == 1 else [*rows[-1:], *rows[:-1]]


def mismatched_of_run(num_rows: int, global_batch: int, *, seed: int, shuffle: bool) -> list[int]:
    """For each row of the split its `mismatched` row in all epochs of a run: that of its step in the first one.

    So there are as many pairs as rows, however many epochs there are.

    >>> mismatched_of_run(5, 2, seed=0, shuffle=False)
    [1, 0, 3, 2, 0]
    """
    order = epoch_order(num_rows, seed=seed, epoch=0, shuffle=shuffle).tolist()
    found = [0] * num_rows
    for start in range(0, num_rows, global_batch):
        rows = order[start : start + global_batch]
        for row, other in zip(rows, mismatched(rows, num_rows), strict=True):
            found[row] = other
    return found


def rows_of_rank(rows: Sequence[int], rank: int, world_size: int) -> list[int]:
    """This device's share of a step's rows."""
    return list(rows[rank::world_size])


def cut(
    rows: Sequence[int], *, micro_batch_size: int, micro_batch_tokens: int | None = None, tokens: Tensor | None = None
) -> list[list[int]]:
    """Cut a device's rows into micro-batches, by number or by a budget of distinct tokens.

    Args:
        tokens: (num_rows,) distinct tokens of each row of the split; needed with `micro_batch_tokens`.

    By tokens, rows go longest first into the first micro-batch with room (first-fit decreasing), so micro-batches
    are full; a row over the budget goes alone.

    >>> cut([0, 1, 2], micro_batch_size=2)
    [[0, 1], [2]]
    >>> cut([0, 1, 2], micro_batch_size=1, micro_batch_tokens=10, tokens=torch.tensor([3, 8, 7]))
    [[1], [2, 0]]
    """
    if micro_batch_tokens is None:
        return [list(rows[i : i + micro_batch_size]) for i in range(0, len(rows), micro_batch_size)]
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda r: -int(tokens[r])):
        need = int(tokens[row])
        fit = next((b for b, free in enumerate(room) if free >= need), None)
        if fit is None:
            bins.append([row])
            room.append(micro_batch_tokens - need)
        else:
            bins[fit].append(row)
            room[fit] -= need
    return bins


def largest_micro_batch(
    tokens: Tensor, *, total_steps: int, mini_batch: int, world_size: int, micro_batch_size: int,
    micro_batch_tokens: int | None, seed: int, shuffle: bool,
) -> list[int]:  # fmt: skip
    """The rows of the run's micro-batch with the most distinct tokens, over all steps and devices.

    Args:
        tokens: (num_rows,) distinct tokens of each row of the split.
        mini_batch: rows of a step on one device.

    With a budget of tokens, instead the largest rows of the split that fit into it together, or the largest alone.

    >>> options = {"world_size": 1, "micro_batch_size": 2, "seed": 0, "shuffle": False}
    >>> rows = torch.tensor([5, 1, 3, 4, 2])
    >>> largest_micro_batch(rows, total_steps=3, mini_batch=2, micro_batch_tokens=None, **options)
    [2, 3]
    >>> largest_micro_batch(rows, total_steps=3, mini_batch=3, micro_batch_tokens=8, **options)
    [0, 2]
    """
    if micro_batch_tokens is not None:
        sizes, by_size = tokens.sort(descending=True, stable=True)
        found, room, place = [], micro_batch_tokens, 0
        while place < len(sizes) and len(found) < mini_batch:
            found.append(int(by_size[place]))
            room -= int(sizes[place])
            place = max(place + 1, int((sizes > room).sum()))  # the next that still fits
        return found
    best, most, num_rows = [], -1, len(tokens)
    global_batch = mini_batch * world_size
    windows = math.ceil(num_rows / global_batch)
    for epoch in range(math.ceil(total_steps / windows)):
        order = epoch_order(num_rows, seed=seed, epoch=epoch, shuffle=shuffle)
        order = order[: (total_steps - epoch * windows) * global_batch]
        padded = torch.cat([order, order.new_full((-len(order) % global_batch,), -1)]).view(-1, mini_batch, world_size)
        for cut_rows in padded.split(micro_batch_size, 1):
            sums = torch.where(cut_rows >= 0, tokens[cut_rows], 0).sum(1)
            if int(sums.max()) > most:
                most, at = int(sums.max()), divmod(int(sums.argmax()), world_size)
                best = [row for row in cut_rows[at[0], :, at[1]].tolist() if row >= 0]
    return best
