"""Prompt trees packed end to end: the one form in which token sequences reach a model.

A training example is a tree: a trunk (the prompt) and branches (the responses); a micro-batch is a forest. All
tokens of a forest stand in one row, each tree depth first, without padding. Packed so, the whole attention mask
is one integer a token: `end[k]`, one past the last packed position of the subtree that token k's segment roots:

    visible(q, k)  =  k <= q  and  q < end[k]

A token's position is its depth: its distance from the root along the path. Nothing here assumes two levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Tree:
    """Token segments, parents before children and depth first.

    Args:
        segments: 1-D int64 tensors of token ids; empty ones are allowed.
        parents: for each segment the index of its parent, -1 for a root; one root a tree, and it comes first.
        targets: for each segment a bool tensor of its shape: True where the token's log-probability is asked for.
            Unless given, every token but the root segment's.
    """

    __slots__ = ("parents", "segments", "targets")

    def __init__(
        self, segments: Sequence[Tensor], parents: Sequence[int], targets: Sequence[Tensor] | None = None
    ) -> None:
        if not segments or parents[0] != -1 or any(not -1 < parents[i] < i for i in range(1, len(segments))):
            raise ValueError("a tree has one root, first, and every parent stands before its children")
        for i in range(1, len(segments)):
            ancestor = i - 1
            while ancestor not in (parents[i], -1):
                ancestor = parents[ancestor]
            if ancestor == -1:
                raise ValueError(f"segment {i} is not in depth-first order")
        self.segments = list(segments)
        self.parents = list(parents)
        self.targets = (
            list(targets)
            if targets is not None
            else [
                torch.full(s.shape, p != -1, dtype=torch.bool) for s, p in zip(self.segments, self.parents, strict=True)
            ]
        )

    @classmethod
    def of(cls, prompt: Tensor, *responses: Tensor) -> Tree:
        """A trunk and its branches."""
        return cls([prompt, *responses], [-1] + [0] * len(responses))

    @property
    def num_tokens(self) -> int:
        return sum(len(segment) for segment in self.segments)


class Forest:
    """Packed trees, with the indices that masks, log-probabilities and scores need.

    With T packed tokens, S segments, B branches (root-to-leaf paths, one for each leaf, in packed order) and R
    targets:

    Attributes:
        input_ids: (T,) token ids.
        positions: (T,) depth of each token.
        end: (T,) one past the last packed position of the token's subtree.
        predecessor: (T,) packed index of the token before it on its path, -1 at a root's first.
        target_index: (R,) packed indices of the targets that have a predecessor.
        target_in_root: (R,) True where the target lies in its tree's root segment.
        branch_last: (B,) packed index of the last token of each path.
        branch_targets: (B, L) indices into the R targets along each path, left-aligned; -1 where a path has fewer.
        num_trees, num_branches: counts.
        segments: list of (start, length, parent, tree) of each segment.
        trees: list of (start, stop) of each tree.
    """

    def __init__(self, trees: Sequence[Tree]) -> None:
        segments: list[tuple[int, int, int, int]] = []
        ids, targets = [], []
        self.trees: list[tuple[int, int]] = []
        offset = 0
        for t, tree in enumerate(trees):
            first, tree_start = len(segments), offset
            for segment, parent, target in zip(tree.segments, tree.parents, tree.targets, strict=True):
                segments.append((offset, len(segment), parent + first if parent >= 0 else -1, t))
                ids.append(segment)
                targets.append(target)
                offset += len(segment)
            self.trees.append((tree_start, offset))
        num = len(segments)
        parents = [parent for _, _, parent, _ in segments]

        depth, last, is_leaf, stop = [0] * num, [-1] * num, [True] * num, [0] * num
        for s, (start, length, parent, _) in enumerate(segments):
            depth[s] = depth[parent] + segments[parent][1] if parent >= 0 else 0
            last[s] = start + length - 1 if length else (last[parent] if parent >= 0 else -1)
            if parent >= 0:
                is_leaf[parent] = False
            stop[s] = start + length
        for s in range(num - 1, -1, -1):
            if parents[s] >= 0:
                stop[parents[s]] = max(stop[parents[s]], stop[s])

        self.segments = segments
        self.input_ids = torch.cat(ids) if ids else torch.empty(0, dtype=torch.long)
        lengths = torch.tensor([length for _, length, _, _ in segments], dtype=torch.long)
        starts = torch.tensor([start for start, _, _, _ in segments], dtype=torch.long)
        index = torch.arange(offset)
        self.positions = index - torch.repeat_interleave(starts - torch.tensor(depth, dtype=torch.long), lengths)
        self.end = torch.repeat_interleave(torch.tensor(stop, dtype=torch.long), lengths)
        self.predecessor = index - 1
        for start, length, parent, _ in segments:
            if length:
                self.predecessor[start] = last[parent] if parent >= 0 else -1

        is_target = (torch.cat(targets) if targets else torch.empty(0, dtype=torch.bool)) & (self.predecessor >= 0)
        self.target_index = is_target.nonzero().squeeze(1)
        is_root = torch.tensor([parent < 0 for parent in parents], dtype=torch.bool)
        self.target_in_root = torch.repeat_interleave(is_root, lengths)[self.target_index]
        leaves = [s for s in range(num) if is_leaf[s]]
        self.branch_last = torch.tensor([last[s] for s in leaves], dtype=torch.long)
        self.branch_targets = self._paths_of_targets(leaves, parents, is_target)
        self.num_trees, self.num_branches = len(self.trees), len(leaves)
        self._cache: dict = {}

    def _paths_of_targets(self, leaves: list[int], parents: list[int], is_target: Tensor) -> Tensor:
        """(B, L): indices into the targets along each root-to-leaf path."""
        before = torch.cat([torch.zeros(1, dtype=torch.long), is_target.cumsum(0)]).tolist()
        paths = []
        for leaf in leaves:
            parts, s = [], leaf
            while s >= 0:
                start, length, _, _ = self.segments[s]
                parts.append(torch.arange(before[start], before[start + length]))
                s = parents[s]
            paths.append(torch.cat(parts[::-1]))
        return (
            torch.nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=-1) if paths else torch.empty(0, 0)
        )

    def to(self, device: torch.device | str) -> Forest:
        """Move every index tensor to `device`, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device, non_blocking=True))
        self._cache.clear()
        return self

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        return len(self.target_index)

    @property
    def target_predecessor(self) -> Tensor:
        """(R,) packed index of the token whose hidden state predicts each target."""
        return self.predecessor[self.target_index]

    @property
    def target_mask(self) -> Tensor:
        """(B, L) True where `branch_targets` holds a target."""
        return self.branch_targets >= 0

    @property
    def root_lengths(self) -> list[int]:
        """Tokens of each tree's root."""
        return [length for _, length, parent, _ in self.segments if parent < 0]

    @property
    def root_index(self) -> Tensor:
        """Packed indices of the tokens of all roots (the prompts)."""
        return self._tokens_of(lambda parent: parent < 0)

    @property
    def fresh_index(self) -> Tensor:
        """Packed indices of all other tokens."""
        return self._tokens_of(lambda parent: parent >= 0)

    def _tokens_of(self, wanted: Callable[[int], bool]) -> Tensor:
        ranges = [torch.arange(start, start + n) for start, n, parent, _ in self.segments if wanted(parent)]
        return torch.cat(ranges or [torch.empty(0, dtype=torch.long)]).to(self.input_ids.device)

    def per_branch(self, per_target: Tensor) -> Tensor:
        """Sum a per-target quantity along each root-to-leaf path: (R,) -> (B,).

        For log-probabilities this is the log-probability of each response. A segment that several paths share
        counts in each of them.

        >>> forest = Forest([Tree.of(torch.tensor([5, 6]), torch.tensor([1, 2]), torch.tensor([3]))])
        >>> forest.per_branch(torch.tensor([0.5, 1.0, 2.0]))
        tensor([1.5000, 2.0000])
        """
        return self.dense(per_target).sum(1)

    def dense(self, per_target: Tensor, fill: float = 0.0) -> Tensor:
        """Lay a per-target quantity out as one row a branch: (R,) -> (B, L), `fill` where `target_mask` is False."""
        mask = self.target_mask
        if per_target.numel() == 0:
            return per_target.new_full(mask.shape, fill)
        rows = per_target[self.branch_targets.clamp(min=0)]
        return torch.where(mask, rows, torch.full((), fill, dtype=rows.dtype, device=rows.device))

    def flat(self, dense: Tensor) -> Tensor:
        """The inverse of `dense` where no target is shared between branches: (B, L) -> (R,)."""
        out = dense.new_zeros(self.num_targets)
        mask = self.target_mask
        out[self.branch_targets[mask]] = dense[mask]
        return out

    def rows(self) -> tuple[Tensor, Tensor]:
        """Every root-to-leaf path as a right-padded row of packed indices: (B, P) and its bool mask (B, P)."""
        paths = []
        leaf_of = self.branch_last.tolist()
        predecessor = self.predecessor.tolist()
        for last in leaf_of:
            path, k = [], last
            while k >= 0:
                path.append(k)
                k = predecessor[k]
            paths.append(torch.tensor(path[::-1], dtype=torch.long))
        rows = torch.nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=-1)
        rows = rows.to(self.input_ids.device)
        return rows.clamp(min=0), rows >= 0
