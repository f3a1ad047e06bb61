"""Mutants of prompt trees and log-probabilities; see test_mutants.py."""

from __future__ import annotations

import os

import pytest

from tests.test_mutants import Mutant, assert_not_stale, assert_noticed

FOREST = "tests/test_forest.py::"
MASKS = "tests/test_masks.py::"
BATCHES = "tests/test_batches.py::"
ACCUMULATION = "tests/test_accumulation.py::"
LOGPS = "tests/test_logps.py::"
TREES = "tests/test_tree_forward.py::"

MUTANTS = [
    # Packing: a predecessor across branches, a subtree cut short, two levels only, a token that nothing predicts, a
    # path backwards, masks that are multiplied.
    Mutant(
        "rlhf/trees/forest.py",
        "self.predecessor[start] = last[parent] if parent >= 0 else -1",
        "self.predecessor[start] = start - 1",
        (FOREST + "test_by_hand",),
    ),
    Mutant(
        "rlhf/trees/forest.py",
        "stop[parents[s]] = max(stop[parents[s]], stop[s])",
        "stop[parents[s]] = stop[parents[s]]",
        (FOREST + "test_end_is_one_past_the_subtree",),
    ),
    Mutant(
        "rlhf/trees/forest.py",
        "depth[parent] + segments[parent][1] if parent >= 0 else 0",
        "segments[parent][1] if parent >= 0 else 0",
        (FOREST + "test_indices_are_those_of_the_paths",),
    ),
    Mutant(
        "rlhf/trees/forest.py",
        "dtype=torch.bool)) & (self.predecessor >= 0)",
        "dtype=torch.bool))",
        (FOREST + "test_an_empty_prompt_predicts_no_first_token",),
    ),
    Mutant(
        "rlhf/trees/forest.py",
        "torch.cat(parts[::-1])",
        "torch.cat(parts)",
        (FOREST + "test_sums_and_rows_of_a_shared_segment_by_hand",),
    ),
    Mutant(
        "rlhf/trees/forest.py",
        "last[s] = start + length - 1 if length else (last[parent] if parent >= 0 else -1)",
        "last[s] = start + length - 1",
        (FOREST + "test_an_empty_response_ends_where_its_prompt_does",),
    ),
    # Masks: not oneself, one too far, a window one too wide or in packed positions, causal where it is not.
    Mutant(
        "rlhf/trees/masks.py",
        "(keys[None] <= q)",
        "(keys[None] < q)",
        (MASKS + "test_c5_a_token_sees_its_ancestors_alone",),
    ),
    Mutant(
        "rlhf/trees/masks.py",
        "(q < forest.end[keys][None])",
        "(q <= forest.end[keys][None])",
        (MASKS + "test_c5_a_token_sees_its_ancestors_alone",),
    ),
    Mutant(
        "rlhf/trees/masks.py",
        "forest.positions[keys][None] < window",
        "forest.positions[keys][None] <= window",
        (MASKS + "test_c5_a_token_sees_its_ancestors_alone",),
    ),
    Mutant(
        "rlhf/trees/masks.py",
        "forest.positions[queries][:, None] - forest.positions[keys][None]",
        "q - keys[None]",
        (MASKS + "test_a_window_is_a_distance_in_depth",),
    ),
    Mutant(
        "rlhf/trees/masks.py",
        "if chain and narrow is None:",
        "if chain:",
        (MASKS + "test_sequences_need_no_mask",),
    ),
    Mutant(
        "rlhf/trees/masks.py",
        "slices[0] == (first, first + length) and narrow is None",
        "slices[0] == (first, first + length)",
        (MASKS + "test_c5_a_plan_is_the_mask",),
    ),
    Mutant(
        "rlhf/trees/masks.py",
        "if length:\n            by_tree",
        "if length > 1:\n            by_tree",
        (MASKS + "test_c5_a_plan_is_the_mask",),
    ),
    # Batches and rows: every device the same rows, one order for all epochs, a bin that is full too early; chosen and
    # rejected exchanged, a mask inverted.
    Mutant(
        "rlhf/trees/batches.py",
        "rows[rank::world_size]",
        "rows[::world_size]",
        (BATCHES + "test_c27_devices_share_a_step_and_its_rows_do_not_depend_on_them",),
    ),
    Mutant(
        "rlhf/trees/batches.py",
        "seed * 1_000_003 + epoch",
        "seed * 1_000_003",
        (BATCHES + "test_every_epoch_visits_every_row_once_in_a_new_order",),
    ),
    Mutant(
        "rlhf/trees/batches.py",
        "room[fit] -= need",
        "room[fit] -= 1",
        (BATCHES + "test_c39_batches_by_tokens_are_full",),
    ),
    Mutant(
        "rlhf/trees/rows.py",
        "per_branch[0::2], per_branch[1::2]",
        "per_branch[1::2], per_branch[0::2]",
        (BATCHES + "test_c38_a_pair_is_one_prompt_with_two_branches",),
    ),
    Mutant(
        "rlhf/trees/rows.py",
        "(chosen[:shorter] != rejected[:shorter])",
        "(chosen[:shorter] == rejected[:shorter])",
        (BATCHES + "test_first_difference_by_hand",),
    ),
    Mutant(
        "rlhf/trees/rows.py",
        'row["targets"] != IGNORE_INDEX',
        'row["targets"] == IGNORE_INDEX',
        (BATCHES + "test_c10_turns_that_are_not_targets_do_not_count",),
    ),
    # Feedback: a row with its own response, the other row's prompt length. Branches beside: a prompt's own queries,
    # keys at another place.
    Mutant(
        "rlhf/trees/batches.py",
        "[*rows[-1:], *rows[:-1]]",
        "[*rows]",
        (BATCHES + "test_a_row_is_paired_with_the_one_before_it_in_its_step",),
    ),
    Mutant(
        "rlhf/trees/rows.py",
        'other["input_ids"][other["prompt_len"] :]',
        'other["input_ids"][n:]',
        (BATCHES + "test_a_feedback_row_is_a_prompt_with_one_branch",),
    ),
    Mutant(
        "rlhf/models/attention.py",
        "whole[0, :, self.roots] = known[:, self.known]",
        "whole[0, :, self.roots] = known[:, self.roots]",
        (TREES + "test_branches_beside_are_those_of_a_pass_of_their_own[llama-branched]",),
    ),
    Mutant(
        "rlhf/models/forward.py",
        "whole[roots] = states.detach()[known]",
        "whole[roots] = 0",
        (TREES + "test_branches_beside_are_those_of_a_pass_of_their_own[llama-branched]",),
    ),
    # Log-probabilities: signs, a scale or a cap without its derivative, the last chunk alone.
    Mutant(
        "rlhf/models/logps.py",
        "normalisers - exps.mul_(logits)",
        "normalisers + exps.mul_(logits)",
        (LOGPS + "test_by_hand",),
    ),
    Mutant(
        "rlhf/models/logps.py",
        ".mul_(-grad_entropies[rows, None])",
        ".mul_(grad_entropies[rows, None])",
        (LOGPS + "test_gradients_are_those_of_the_full_matrix",),
    ),
    Mutant(
        "rlhf/models/logps.py",
        "grad.mul_(1 - (capped / ctx.softcap).square_())",
        "grad.mul_(1 - (capped / ctx.softcap).abs_())",
        (LOGPS + "test_gradients_are_those_of_the_full_matrix",),
    ),
    Mutant(
        "rlhf/models/logps.py",
        "grad.mul_(ctx.scale)",
        "grad.mul_(1.0)",
        (LOGPS + "test_gradients_are_those_of_the_full_matrix",),
    ),
    Mutant(
        "rlhf/models/logps.py",
        "scatter_add_(-1, targets[rows, None], grad_logps[rows, None])",
        "scatter_add_(-1, targets[rows, None], -grad_logps[rows, None])",
        (LOGPS + "test_gradients_are_those_of_the_full_matrix",),
    ),
    Mutant(
        "rlhf/models/logps.py",
        "grad_weight = _plus(grad_weight, part.to(wide))",
        "grad_weight = part.to(wide)",
        (LOGPS + "test_gradients_are_those_of_the_full_matrix",),
    ),
    Mutant(
        "rlhf/models/logps.py",
        "ctx.kept.pop(0)",
        "ctx.kept.pop()",
        (LOGPS + "test_gradients_of_halves_do_not_depend_on_the_chunks",),
    ),
    Mutant(
        "rlhf/models/accumulation.py",
        "if kept is None or kept[0] != versions:",
        "if kept is None:",
        (ACCUMULATION + "test_an_update_between_two_micro_batches_is_seen",),
    ),
    Mutant(
        "rlhf/models/accumulation.py",
        "parameter.grad[places] += ",
        "parameter.grad[places] = ",
        (ACCUMULATION + "test_the_gradients_are_those_that_autograd_adds_up",),
    ),
    Mutant(
        "rlhf/models/trained.py",
        "if ctx.padding is not None:",
        "if False:",
        (ACCUMULATION + "test_the_padding_tokens_embedding_gets_no_gradient",),
    ),
    Mutant(
        "rlhf/models/logps.py",
        "for chunk in _slices(0, len(hidden), chunk_rows):",
        "for chunk in _slices(0, len(hidden), len(hidden)):",
        (LOGPS + "test_c18_only_a_few_chunks_of_logits_exist",),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}-{mutant.new.strip()}")
def test_rows_are_not_stale(mutant):
    assert_not_stale(mutant)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each mutant")
def test_every_mutant_is_noticed(tmp_path):
    assert_noticed(MUTANTS, tmp_path)
