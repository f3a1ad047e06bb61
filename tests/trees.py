"""Random prompt trees; nothing here imports more than torch."""

from __future__ import annotations

import torch

from rlhf.trees.forest import Tree

VOCABULARY = 97


def random_tree(
    generator: torch.Generator, *, max_depth: int = 4, max_children: int = 3, max_length: int = 4, trunk: int = 0
) -> Tree:
    """A tree of random shape, up to `max_depth` segments deep, with empty and one-token segments among them.

    `trunk`: least tokens of the root.
    """

    def draw(high: int) -> int:
        return int(torch.randint(high + 1, (1,), generator=generator))

    segments, parents = [], []

    def grow(parent: int, depth: int) -> None:
        length = draw(max_length) + (trunk if parent < 0 else 0)
        segments.append(torch.randint(VOCABULARY, (length,), generator=generator))
        parents.append(parent)
        me = len(segments) - 1
        if depth < max_depth:
            for _ in range(draw(max_children)):
                grow(me, depth + 1)

    grow(-1, 1)
    return Tree(segments, parents)
