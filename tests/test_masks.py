"""Tree masks: the `end` rule against ancestry itself, and attention plans against the mask."""

from __future__ import annotations

import pytest
import torch

from rlhf.trees import masks
from rlhf.trees.forest import Forest, Tree
from rlhf.trees.masks import attention_plan, visible
from tests.trees import random_tree


def random_forest(seed: int, **shape: int) -> Forest:
    generator = torch.Generator().manual_seed(seed)
    return Forest([random_tree(generator, **shape) for _ in range(4)])


def ancestry(forest: Forest, window: int | None = None) -> torch.Tensor:
    """(T, T) bool by walking back from each token, at most `window` tokens, itself included."""
    seen = torch.zeros(forest.num_tokens, forest.num_tokens, dtype=torch.bool)
    for q in range(forest.num_tokens):
        k, distance = q, 0
        while k >= 0 and (window is None or distance < window):
            seen[q, k] = True
            k, distance = int(forest.predecessor[k]), distance + 1
    return seen


def as_mask(forest: Forest, window: int | None) -> torch.Tensor:
    """What a plan lets each token see, spelled out."""
    seen = torch.zeros(forest.num_tokens, forest.num_tokens, dtype=torch.bool)
    for block in attention_plan(forest, window, torch.float32):
        keys = torch.cat([torch.arange(start, stop) for start, stop in block.key_slices])
        queries = block.stop - block.start
        if block.mask is None:
            assert keys.tolist() == list(range(block.start, block.stop))
            allowed = torch.ones(queries, queries, dtype=torch.bool).tril()
        else:
            assert set(block.mask.unique().tolist()) <= {0.0, float("-inf")}
            allowed = block.mask == 0
        seen[block.start : block.stop, keys] = allowed
    return seen


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_c5_a_token_sees_its_ancestors_alone(seed, window):
    """C5: `visible(q, k) = k <= q < end[k]` is ancestry, in trees of any depth; a window counts along the path."""
    forest = random_forest(seed)
    assert torch.equal(visible(forest, window), ancestry(forest, window))


def test_a_window_is_a_distance_in_depth():
    """Trunk 0 1, branches 2 3 and 4 5 with a window of 3: token 4, at depth 2, sees 0, 1 and itself.

    In packed positions the trunk would be 4 and 3 away.
    """
    forest = Forest([Tree.of(*torch.arange(6).split(2))])
    assert visible(forest, 3)[4].nonzero().squeeze(1).tolist() == [0, 1, 4]
    assert visible(forest, 3)[5].nonzero().squeeze(1).tolist() == [1, 4, 5]


@pytest.mark.parametrize("whole_tree_tokens", [512, 4, 0])
@pytest.mark.parametrize("window", [None, 2, 5])
def test_c5_a_plan_is_the_mask(monkeypatch, whole_tree_tokens, window):
    """C5: for small trees (one block) and large ones (a block for each segment), blocks end to end are the mask."""
    monkeypatch.setattr(masks, "WHOLE_TREE_TOKENS", whole_tree_tokens)
    for seed in range(8):
        forest = random_forest(seed)
        plan = attention_plan(forest, window, torch.float32)
        edges = [0, *(block.stop for block in plan)]
        assert [block.start for block in plan] == edges[:-1]
        assert edges[-1] == forest.num_tokens
        assert torch.equal(as_mask(forest, window), ancestry(forest, window))


@pytest.mark.parametrize("whole_tree_tokens", [512, 0])
def test_no_query_is_left_without_keys(monkeypatch, whole_tree_tokens):
    """A row of -inf alone would be NaN after the softmax."""
    monkeypatch.setattr(masks, "WHOLE_TREE_TOKENS", whole_tree_tokens)
    for seed in range(8):
        for block in attention_plan(random_forest(seed), 2, torch.float32):
            assert block.mask is None or (block.mask == 0).any(-1).all()


def test_sequences_need_no_mask():
    """SFT's one response on a prompt, and a trunk alone, are plain causal attention; so is a window they fit in."""
    chain = Tree.of(torch.arange(5), torch.arange(3))
    forest = Forest([chain, Tree.of(torch.arange(4))])
    for window in (None, 8):
        assert [block.mask for block in attention_plan(forest, window, torch.float32)] == [None, None]
    assert attention_plan(forest, 7, torch.float32)[0].mask is not None


def test_work_on_a_large_tree_grows_with_its_paths(monkeypatch):
    """A trunk of 10 and 20 branches of 10: each branch meets 20 keys, so 100 + 20 x 200 scores and not 210 x 210."""
    monkeypatch.setattr(masks, "WHOLE_TREE_TOKENS", 100)
    forest = Forest([Tree.of(torch.arange(10), *[torch.arange(10)] * 20)])
    plan = attention_plan(forest, None, torch.float32)
    assert sum((b.stop - b.start) * sum(y - x for x, y in b.key_slices) for b in plan) == 100 + 20 * 200


def test_a_plan_is_made_once_for_all_layers():
    forest = random_forest(0)
    plan = attention_plan(forest, None, torch.float32)
    assert attention_plan(forest, None, torch.float32) is plan
    assert attention_plan(forest, 2, torch.float32) is not plan
    half = attention_plan(Forest([Tree.of(*torch.arange(6).split(2))]), None, torch.bfloat16)
    assert half[0].mask.dtype == torch.bfloat16
