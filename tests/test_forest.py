"""Packing: every index of a forest against the tree it came from, walked segment by segment."""

from __future__ import annotations

import pytest
import torch

from rlhf.trees.forest import Forest, Tree
from tests.trees import random_tree


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


def random_trees(seed: int, num: int = 4) -> list[Tree]:
    generator = torch.Generator().manual_seed(seed)
    return [random_tree(generator) for _ in range(num)]


def leaf_paths(tree: Tree) -> list[list[int]]:
    """The segments of each root-to-leaf path, leaves in their order."""
    paths = []
    for leaf in range(len(tree.segments)):
        if leaf not in tree.parents:
            path = [leaf]
            while tree.parents[path[0]] >= 0:
                path.insert(0, tree.parents[path[0]])
            paths.append(path)
    return paths


def test_by_hand():
    """The forest of DESIGN.md, two pairs with their prompts:

    tokens     p p p p | c c c | r r   q q q | c c | r r r r
    packed     0 1 2 3   4 5 6   7 8   9 0 1   2 3   4 5 6 7
    position   0 1 2 3   4 5 6   4 5   0 1 2   3 4   3 4 5 6
    """
    forest = Forest(
        [
            Tree.of(ids(1, 2, 3, 4), ids(5, 6, 7), ids(8, 9)),
            Tree.of(ids(11, 12, 13), ids(14, 15), ids(16, 17, 18, 19)),
        ]
    )
    assert forest.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert forest.end.tolist() == [9] * 4 + [7] * 3 + [9] * 2 + [18] * 3 + [14] * 2 + [18] * 4
    assert forest.predecessor.tolist() == [-1, 0, 1, 2, 3, 4, 5, 3, 7, -1, 9, 10, 11, 12, 11, 14, 15, 16]
    assert forest.target_index.tolist() == [4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17]
    assert forest.branch_last.tolist() == [6, 8, 13, 17]
    assert forest.branch_targets.tolist() == [[0, 1, 2, -1], [3, 4, -1, -1], [5, 6, -1, -1], [7, 8, 9, 10]]
    assert (forest.num_tokens, forest.num_targets, forest.num_trees, forest.num_branches) == (18, 11, 2, 4)
    assert forest.trees == [(0, 9), (9, 18)]


@pytest.mark.parametrize("seed", range(30))
def test_indices_are_those_of_the_paths(seed):
    """Every path, packed anyhow, is a sequence: depths 0, 1, 2, …, each token after its predecessor."""
    trees = random_trees(seed)
    forest = Forest(trees)
    assert forest.num_tokens == sum(tree.num_tokens for tree in trees)
    rows, mask = forest.rows()
    branch = 0
    for t, tree in enumerate(trees):
        first = sum(len(earlier.segments) for earlier in trees[:t])
        for path in leaf_paths(tree):
            tokens = torch.cat([tree.segments[s] for s in path])
            packed = [k for s in path for k in range(*_range_of(forest, first + s))]
            assert rows[branch][mask[branch]].tolist() == packed
            assert torch.equal(forest.input_ids[packed], tokens)
            assert forest.positions[packed].tolist() == list(range(len(tokens)))
            assert forest.predecessor[packed].tolist() == [-1, *packed][: len(packed)]
            assert int(forest.branch_last[branch]) == (packed[-1] if packed else -1)
            root = len(tree.segments[0])
            targets = [k for depth, k in enumerate(packed) if depth >= max(root, 1)]
            found = forest.branch_targets[branch]
            assert forest.target_index[found[found >= 0]].tolist() == targets
            branch += 1
    assert branch == forest.num_branches == len(rows)


def _range_of(forest: Forest, segment: int) -> tuple[int, int]:
    start, length, _, _ = forest.segments[segment]
    return start, start + length


@pytest.mark.parametrize("seed", range(10))
def test_end_is_one_past_the_subtree(seed):
    trees = random_trees(seed)
    forest = Forest(trees)
    children = [[] for _ in forest.segments]
    for s, (_, _, parent, _) in enumerate(forest.segments):
        if parent >= 0:
            children[parent].append(s)

    def subtree(s: int) -> list[int]:
        return [s, *(below for child in children[s] for below in subtree(child))]

    for s in range(len(forest.segments)):
        start, stop = _range_of(forest, s)
        last = max(_range_of(forest, below)[1] for below in subtree(s))
        assert forest.end[start:stop].tolist() == [last] * (stop - start)


@pytest.mark.parametrize(
    ("segments", "parents"),
    [
        ([], []),
        ([ids(1)], [0]),
        ([ids(1), ids(2)], [-1, -1]),
        ([ids(1), ids(2)], [-1, 1]),
        ([ids(1), ids(2), ids(3)], [-1, 2, 0]),
        ([ids(1), ids(2), ids(3), ids(4)], [-1, 0, 0, 1]),
    ],
    ids=["nothing", "no root", "two roots", "its own parent", "parent after child", "not depth first"],
)
def test_a_tree_that_is_none_is_refused(segments, parents):
    with pytest.raises(ValueError, match=r"root|depth-first|parent"):
        Tree(segments, parents)


def test_an_empty_prompt_predicts_no_first_token():
    """Nothing comes before the first token of each response, so it has no log-probability; the others do."""
    forest = Forest([Tree.of(ids(), ids(5, 6), ids(7))])
    assert forest.target_index.tolist() == [1]
    assert forest.branch_targets.tolist() == [[0], [-1]]
    assert forest.target_predecessor.tolist() == [0]


def test_an_empty_response_ends_where_its_prompt_does():
    forest = Forest([Tree.of(ids(1, 2), ids(), ids(3), ids())])
    assert forest.branch_last.tolist() == [1, 2, 1]
    assert forest.target_mask.tolist() == [[False], [True], [False]]


def test_a_trunk_alone_is_a_path_without_targets():
    forest = Forest([Tree.of(ids(1, 2, 3))])
    assert (forest.num_branches, forest.num_targets, forest.branch_last.tolist()) == (1, 0, [2])
    assert forest.dense(torch.empty(0)).shape == (1, 0)


def test_nothing_at_all():
    forest = Forest([])
    assert (forest.num_tokens, forest.num_targets, forest.num_branches) == (0, 0, 0)


def test_targets_may_be_any_tokens_with_a_predecessor():
    """Asked for everywhere, also in the prompt (SFT on all tokens): all but the very first."""
    tree = Tree.of(ids(1, 2), ids(3, 4))
    everywhere = Tree(tree.segments, tree.parents, [torch.ones(2, dtype=torch.bool)] * 2)
    assert Forest([everywhere]).target_index.tolist() == [1, 2, 3]
    some = Tree(tree.segments, tree.parents, [torch.tensor([False, True]), torch.tensor([True, False])])
    assert Forest([some]).target_index.tolist() == [1, 2]


def test_sums_and_rows_of_a_shared_segment_by_hand():
    """Root 1, then 2 3, which forks into 4 and 5 6: targets 2 3 4 5 6 with values 1 10 100 1000 10000.

    The paths sum to 1 + 10 + 100 and 1 + 10 + 1000 + 10000.
    """
    forest = Forest([Tree([ids(1), ids(2, 3), ids(4), ids(5, 6)], [-1, 0, 1, 1])])
    values = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    assert forest.per_branch(values).tolist() == [111.0, 11011.0]
    assert forest.dense(values, fill=-1.0).tolist() == [[1, 10, 100, -1], [1, 10, 1000, 10000]]


@pytest.mark.parametrize("seed", range(5))
def test_flat_undoes_dense_where_nothing_is_shared(seed):
    generator = torch.Generator().manual_seed(seed)
    trees = [random_tree(generator, max_depth=2, max_length=6, trunk=1) for _ in range(5)]
    forest = Forest(trees)
    values = torch.randn(forest.num_targets, generator=generator)
    assert torch.equal(forest.flat(forest.dense(values, fill=7.0)), values)


def test_a_nan_in_one_branch_stays_there():
    """C5: sums are gathered, not multiplied by a mask."""
    forest = Forest([Tree.of(ids(1), ids(2, 3), ids(4))])
    sums = forest.per_branch(torch.tensor([float("nan"), 1.0, 2.0]))
    assert sums[0].isnan()
    assert sums[1] == 2.0


def test_moving_keeps_every_index():
    forest = Forest(random_trees(0))
    before = {name: value.clone() for name, value in vars(forest).items() if isinstance(value, torch.Tensor)}
    assert forest.to("cpu") is forest
    assert all(torch.equal(getattr(forest, name), value) for name, value in before.items())
