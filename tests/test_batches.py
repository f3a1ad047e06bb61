"""Which rows make which step and micro-batch, and preference rows as trees."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.seeds import seed_of_step
from rlhf.trees.batches import cut, epoch_order, mismatched, num_steps, rows_of_rank, rows_of_step
from rlhf.trees.forest import Forest
from rlhf.trees.rows import feedback_tree, finetune_tree, first_difference, halves, pair_tokens, pair_tree


def log_normal_lengths(num: int = 400, seed: int = 0) -> torch.Tensor:
    """Lengths with a median of 200 tokens and a long tail, up to 2,048."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(num, generator=generator) * 0.8 + math.log(200)).long().clamp(1, 2048)


def test_c39_batches_by_tokens_are_full():
    """C39: a budget of 4,096 tokens is filled to 90 % and more, on lengths of a log-normal mix; no row is lost."""
    tokens = log_normal_lengths()
    rows = list(range(len(tokens)))
    bins = cut(rows, micro_batch_size=1, micro_batch_tokens=4096, tokens=tokens)
    sizes = [int(tokens[b].sum()) for b in bins]
    assert sorted(row for b in bins for row in b) == rows
    assert max(sizes) <= 4096
    assert sum(sizes) / (4096 * len(bins)) >= 0.9


def test_c39_a_row_over_the_budget_goes_alone():
    assert cut([0, 1, 2], micro_batch_size=1, micro_batch_tokens=5, tokens=torch.tensor([9, 2, 3])) == [[0], [2, 1]]


def test_a_row_is_paired_with_the_one_before_it_in_its_step():
    """The first with the last; a lone row with the next of the split, around its end."""
    assert mismatched([4, 0, 9], 10) == [9, 4, 0]
    assert mismatched(range(3), 10) == [2, 0, 1]
    assert (mismatched([3], 10), mismatched([9], 10)) == ([4], [0])


def test_a_feedback_row_is_a_prompt_with_one_branch():
    """Its own response, or that of a row whose prompt has another length."""
    row = {"prompt_len": 2, "input_ids": torch.tensor([1, 2, 3]), "label": True}
    other = {"prompt_len": 1, "input_ids": torch.tensor([7, 8, 9]), "label": False}
    assert [s.tolist() for s in feedback_tree(row).segments] == [[1, 2], [3]]
    assert [s.tolist() for s in feedback_tree(row, other).segments] == [[1, 2], [8, 9]]


def test_c39_order_is_seeded_and_depends_on_nothing_else():
    """C39, C27: the same rows for the same seed and step, whatever was drawn before; others for another seed."""
    first = [rows_of_step(step, 10, 4, seed=1, shuffle=True) for step in range(6)]
    torch.manual_seed(99)
    torch.rand(7)
    assert [rows_of_step(step, 10, 4, seed=1, shuffle=True) for step in reversed(range(6))] == first[::-1]
    assert [rows_of_step(step, 10, 4, seed=2, shuffle=True) for step in range(6)] != first


def test_c27_neighbouring_seeds_and_purposes_share_no_stream():
    """C27: of 20 seeds, 3 purposes and 50 steps no two meet, also as torch's generator on a CPU sees them: 32 bits."""
    purposes = ("sampling", "order of a rollout", "device 0")
    found = [seed_of_step(s, step, what) for s in range(20) for step in range(50) for what in purposes]
    assert len({seed % 2**32 for seed in found}) == len(found)
    assert all(0 <= seed < 2**63 for seed in found)
    assert seed_of_step(7, 3, "sampling") == seed_of_step(7, 0, "sampling") + 3


def test_every_epoch_visits_every_row_once_in_a_new_order():
    """R4, A10: windows of 4, 4 and 2 of ten rows; the next pass is another order of the same ten."""
    passes = [[rows_of_step(3 * e + w, 10, 4, seed=0, shuffle=True) for w in range(3)] for e in range(2)]
    assert [[len(window) for window in windows] for windows in passes] == [[4, 4, 2]] * 2
    flat = [[row for window in windows for row in window] for windows in passes]
    assert [sorted(rows) for rows in flat] == [list(range(10))] * 2
    assert flat[0] != flat[1]


def test_an_epoch_of_many_steps_draws_its_order_once(monkeypatch):
    """A step costs its own rows, not all those of the split: 600 steps of three epochs draw three orders."""
    drawn = []

    def counted(num_rows, **options):
        drawn.append(num_rows)
        return randperm(num_rows, **options)

    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", counted)
    num_rows, size = 100_000, 400
    rows = [row for step in range(600) for row in rows_of_step(step, num_rows, size, seed=11, shuffle=True)]
    assert drawn == [num_rows] * 3
    assert sorted(rows[:num_rows]) == sorted(rows[num_rows : 2 * num_rows]) == list(range(num_rows))


def test_file_order_without_shuffling():
    assert rows_of_step(1, 5, 2, seed=3, shuffle=False) == [2, 3]
    assert rows_of_step(3, 5, 2, seed=3, shuffle=False) == [0, 1]
    assert epoch_order(3, seed=3, epoch=1, shuffle=False).tolist() == [0, 1, 2]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_c27_devices_share_a_step_and_its_rows_do_not_depend_on_them(world_size):
    """C27: 12 rows a step, on however many devices, are the same 12 rows, each on one device."""
    rows = rows_of_step(2, 50, 12, seed=0, shuffle=True)
    shares = [rows_of_rank(rows, rank, world_size) for rank in range(world_size)]
    assert sorted(row for share in shares for row in share) == sorted(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_c21_steps_by_hand():
    """C21: 10 rows in windows of 4 are 3 steps an epoch; half an epoch is 2, at least one is done."""
    assert [num_steps(10, 4, epochs) for epochs in (1, 2, 0.5, 0.01, 1 / 3)] == [3, 6, 2, 1, 1]
    assert [num_steps(10, 4, 1, max_steps=m) for m in (1, 3, 9)] == [1, 3, 3]


def test_micro_batches_by_number():
    assert cut([5, 1, 4], micro_batch_size=2) == [[5, 1], [4]]
    assert cut([], micro_batch_size=2) == []


def test_c38_a_pair_is_one_prompt_with_two_branches():
    """C38: prompt 1 2; chosen 3 4, rejected 3 5 6: the prompt stands once, and 7 tokens go through the model."""
    row = {
        "prompt_len": 2,
        "chosen_input_ids": torch.tensor([1, 2, 3, 4]),
        "rejected_input_ids": torch.tensor([1, 2, 3, 5, 6]),
    }
    forest = Forest([pair_tree(row)])
    assert forest.input_ids.tolist() == [1, 2, 3, 4, 3, 5, 6]
    assert pair_tokens(torch.tensor([2]), torch.tensor([4]), torch.tensor([5])).tolist() == [7]
    chosen, rejected = halves(forest.branch_last)
    assert (chosen.tolist(), rejected.tolist()) == ([3], [6])
    assert first_difference(row) == 1


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"), [([7], [8], 0), ([7, 8], [7], 1), ([7], [7, 8], 1), ([7, 8, 1], [7, 8, 2], 2)]
)
def test_first_difference_by_hand(chosen, rejected, expected):
    row = {
        "prompt_len": 1,
        "chosen_input_ids": torch.tensor([0, *chosen]),
        "rejected_input_ids": torch.tensor([0, *rejected]),
    }
    assert first_difference(row) == expected


def test_c10_turns_that_are_not_targets_do_not_count():
    """C10: in a conversation, user turns inside the response part are masked; only the assistant's count."""
    row = {
        "prompt_len": 2,
        "input_ids": torch.arange(10, 18),
        "targets": torch.tensor([-100, -100, 12, 13, -100, -100, 16, 17]),
    }
    assert Forest([finetune_tree(row)]).target_index.tolist() == [2, 3, 6, 7]
