"""Rows of the data as trees: the prompt is the trunk, each response a branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf.data.splits import IGNORE_INDEX
from rlhf.trees.forest import Tree


def finetune_tree(row: Mapping[str, Any], use_targets: bool = True) -> Tree:
    """A row of `finetune_*.pt` as a trunk with one branch.

    Its targets are the tokens that the loss counts: those of the row's `targets` that are not ignored, or all.
    """
    n, ids = row["prompt_len"], row["input_ids"]
    counted = row["targets"] != IGNORE_INDEX if use_targets else torch.ones_like(ids, dtype=torch.bool)
    return Tree([ids[:n], ids[n:]], [-1, 0], [counted[:n], counted[n:]])


def pair_tree(row: Mapping[str, Any], *, prompt_targets: bool = False) -> Tree:
    """A row of `preference_*.pt` as a trunk with two branches: chosen first.

    With `prompt_targets`, the prompt's tokens are targets too.
    """
    n = row["prompt_len"]
    chosen, rejected = row["chosen_input_ids"], row["rejected_input_ids"]
    segments = [chosen[:n], chosen[n:], rejected[n:]]
    targets = [torch.full_like(s, prompt_targets or i > 0, dtype=torch.bool) for i, s in enumerate(segments)]
    return Tree(segments, [-1, 0, 0], targets)


def feedback_tree(row: Mapping[str, Any], response_of: Mapping[str, Any] | None = None) -> Tree:
    """The prompt of a row of `feedback_*.pt` with one branch: its own response, or that of another row."""
    n, other = row["prompt_len"], row if response_of is None else response_of
    return Tree.of(row["input_ids"][:n], other["input_ids"][other["prompt_len"] :])


def first_difference(row: Mapping[str, Any]) -> int:
    """Index in the responses of the first token in which they differ; the shorter's length where one begins the other.

    >>> first_difference({"prompt_len": 1, "chosen_input_ids": torch.tensor([9, 4, 5]),
    ...                   "rejected_input_ids": torch.tensor([9, 4, 6, 7])})
    1
    """
    n = row["prompt_len"]
    chosen, rejected = row["chosen_input_ids"][n:], row["rejected_input_ids"][n:]
    shorter = min(len(chosen), len(rejected))
    different = (chosen[:shorter] != rejected[:shorter]).nonzero()
    return int(different[0]) if len(different) else shorter


def halves(per_branch: Tensor) -> tuple[Tensor, Tensor]:
    """Split what stands once a branch, (2B, ...), into chosen and rejected, (B, ...) each."""
    return per_branch[0::2], per_branch[1::2]


def pair_tokens(prompt_lens: Tensor, chosen_lens: Tensor, rejected_lens: Tensor) -> Tensor:
    """(N,) distinct tokens of each pair, from the lengths of its columns."""
    return chosen_lens + rejected_lens - prompt_lens
