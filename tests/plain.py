"""The ordinary way, to hold the tree forward against: each path a padded row through an unchanged eager model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.trees.forest import Tree
from tests.tiny import make_model
from tests.trees import VOCABULARY


def eager(architecture: str, **options) -> PreTrainedModel:
    """`make_model` on transformers' own eager attention."""
    model = make_model(architecture, **options)
    model.set_attn_implementation("eager")
    return model


def leaf_rows(trees: list[Tree]) -> list[tuple[Tensor, Tensor]]:
    """Tokens and targets (bool) of every root-to-leaf path, in the order of the leaves."""
    rows = []
    for tree in trees:
        for leaf in range(len(tree.segments)):
            if leaf in tree.parents:
                continue
            path, s = [], leaf
            while s >= 0:
                path.insert(0, s)
                s = tree.parents[s]
            rows.append((torch.cat([tree.segments[s] for s in path]), torch.cat([tree.targets[s] for s in path])))
    return rows


def padded(rows: list[Tensor], *, left: int | None = None) -> dict[str, Tensor]:
    """Rows as a batch with a mask and positions: padded on the right, or on the left with `left` pads more.

    Under the padding stand random ids: a mask, not a pad token, has to keep them out.
    """
    longest = max(len(row) for row in rows) + (left or 0)
    ids = torch.randint(VOCABULARY, (len(rows), longest), generator=torch.Generator().manual_seed(9))
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if left is None else slice(longest - len(row), longest)
        ids[i, place], mask[i, place], positions[i, place] = row, 1, torch.arange(len(row))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def plain_logps(
    model: PreTrainedModel, trees: list[Tree], *, temperature: float = 1.0, left: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """For each path the log-probabilities of its targets, and the entropies there, from the full logits."""
    rows = leaf_rows(trees)
    inputs = padded([tokens for tokens, _ in rows], left=left)
    logits = _forward(model, inputs).float() / temperature
    found = []
    for i, (tokens, targets) in enumerate(rows):
        start = 0 if left is None else logits.shape[1] - len(tokens)
        log_probabilities = logits[i, start : start + len(tokens)].log_softmax(-1)
        at = [t for t in range(1, len(tokens)) if targets[t]]
        before = log_probabilities[[t - 1 for t in at]]
        found.append(
            (before[range(len(at)), tokens[at]] if at else before.sum(-1), torch.special.entr(before.exp()).sum(-1))
        )
    return found


def _forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    if model.config.model_type == "bloom":  # positions are in the mask alone
        inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
    return model(**inputs, use_cache=False).logits
