"""Means over all rows of a step, whatever the micro-batches and devices that they were cut over."""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from torch import Tensor

from rlhf.masked import widest


def _wide(x: Tensor | float) -> Tensor | float:
    """Float64, in which a step may have any number of tokens, and without a graph; Apple's devices have float32."""
    return x.detach().to(widest(x.device)) if isinstance(x, Tensor) else x


class Metrics:
    """Sums and counts, reduced once: `reduce()` gives sum / count over every device and micro-batch."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._values: dict[str, float] = {}
        self._differences: dict[str, tuple[str, str]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a sum over `count` rows or tokens; tensors stay where they are until `reduce`."""
        self._sums[name] = self._sums.get(name, 0.0) + _wide(total)
        self._counts[name] = self._counts.get(name, 0.0) + _wide(count)

    def mean(self, name: str, values: Tensor, weight: float = 1.0) -> None:
        """Add every element of `values`; `weight` 0 adds nothing but keeps the name on every device."""
        self.add(name, values.sum() * weight, values.numel() * weight)

    def difference(self, name: str, one: str, other: str) -> None:
        """Set the mean `one` less the mean `other`, where both are there."""
        self._differences[name] = one, other

    def put(self, name: str, value: float) -> None:
        """Set a value that is the same on every device (a rate, a norm)."""
        self._values[name] = value

    def get(self, name: str) -> float:
        """A value that was `put`."""
        return self._values[name]

    def reduce(self) -> dict[str, float]:
        """Means over all devices, in the order in which the names came; names must agree between devices.

        A mean over nothing (of the bad responses of a step that has none) is left out.
        """
        names = list(self._sums)
        pairs = torch.tensor(
            [[float(self._sums[n]) for n in names], [float(self._counts[n]) for n in names]],
            dtype=torch.float64,
            device="cpu" if self._fabric.device.type == "mps" else self._fabric.device,
        )
        if self._fabric.world_size > 1:
            torch.distributed.all_reduce(pairs)
        sums, counts = pairs.tolist()
        means = {n: s / c for n, s, c in zip(names, sums, counts, strict=True) if c}
        there = {n: pair for n, pair in self._differences.items() if means.keys() >= set(pair)}
        return {**means, **{n: means[a] - means[b] for n, (a, b) in there.items()}, **self._values}
