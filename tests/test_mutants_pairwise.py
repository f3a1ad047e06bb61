"""Mutants of the wider family of pairwise losses, and of how a pair is fed to them; see test_mutants.py."""

from __future__ import annotations

import os

import pytest

from tests.test_mutants import PREFERENCE, Mutant, assert_not_stale, assert_noticed

PAIRWISE = "tests/test_pairwise.py::"
LOGPS = "tests/test_logps.py::"

MUTANTS = [
    # A lost factor, a side, a target, an order, a constant that is not one.
    Mutant(
        "rlhf/losses/preference.py",
        "/ (1.0 - 2.0 * label_smoothing)",
        "/ (1.0 - label_smoothing)",
        (PREFERENCE + "test_robust_by_hand",),
    ),
    Mutant(
        "rlhf/losses/preference.py",
        "math.log1p(-label_smoothing)",
        "math.log1p(label_smoothing)",
        (PREFERENCE + "test_exo_by_hand",),
    ),
    Mutant(
        "rlhf/losses/preference.py",
        "torch.sigmoid(-logits / tau)",
        "torch.sigmoid(logits / tau)",
        (PREFERENCE + "test_discopop_by_hand",),
    ),
    Mutant(
        "rlhf/losses/anchored.py",
        "F.logsigmoid(-beta * rejected_log_ratios)",
        "F.logsigmoid(beta * rejected_log_ratios)",
        (PREFERENCE + "test_bco_by_hand",),
    ),
    Mutant(
        "rlhf/losses/anchored.py",
        "F.logsigmoid(-chosen) + F.logsigmoid(-rejected)",
        "F.logsigmoid(chosen) + F.logsigmoid(-rejected)",
        (PREFERENCE + "test_nca_by_hand",),
    ),
    Mutant(
        "rlhf/losses/anchored.py",
        "torch.sigmoid(-beta * margin)",
        "torch.sigmoid(beta * margin)",
        (PREFERENCE + "test_apo_by_hand",),
    ),
    Mutant(
        "rlhf/losses/anchored.py",
        "target = 0.5 / beta",
        "target = 1.0 / beta",
        (PREFERENCE + "test_sppo_by_hand",),
    ),
    Mutant(
        "rlhf/losses/transport.py",
        "values.argsort().argsort()",
        "values.argsort()",
        (PREFERENCE + "test_aot_is_dpo_where_ranks_agree", PREFERENCE + "test_aot_unpaired_by_hand"),
    ),
    Mutant(
        "rlhf/losses/transport.py",
        "(rejected_side - rejected_side.detach())",
        "rejected_side",
        (PREFERENCE + "test_aot_unpaired_by_hand",),
    ),
    Mutant(
        "rlhf/losses/reference_free.py",
        "rejected_mean_logps + gamma / beta",
        "rejected_mean_logps + gamma",
        (PREFERENCE + "test_simpo_by_hand",),
    ),
    Mutant(
        "rlhf/losses/reference_free.py",
        "return logps - torch.where(",
        "return logps + torch.where(",
        (PREFERENCE + "test_orpo_by_hand",),
    ),
    Mutant(
        "rlhf/losses/log_ratios.py",
        "torch.expm1(exponents) / (alpha - 1.0)",
        "torch.expm1(exponents) / alpha",
        (PREFERENCE + "test_divergences_by_hand",),
    ),
    Mutant(
        "rlhf/losses/log_ratios.py",
        "position <= other_lengths",
        "position < other_lengths",
        (PREFERENCE + "test_ld_weights_by_hand",),
    ),
    Mutant(
        "rlhf/losses/log_ratios.py",
        "(token_logps - log_collisions)",
        "(token_logps + log_collisions)",
        (PREFERENCE + "test_wpo_weights_by_hand",),
    ),
    # Feeding them: a likelihood without its weight, a response's own length, prompts that count, ranks of a part.
    Mutant(
        "rlhf/pairwise.py",
        'self.weights.get("cpo", 0.0) * self.cpo_alpha',
        "self.cpo_alpha",
        (PAIRWISE + "test_weights_multiply_losses_and_likelihoods",),
    ),
    Mutant(
        "rlhf/pairwise.py",
        "policy_sums=(logps * is_response).sum(1)",
        "policy_sums=logps.sum(1)",
        (PAIRWISE + "test_prompts_are_in_the_path_alone",),
    ),
    Mutant(
        "rlhf/pairwise.py",
        "partners = partners or match_sides(table)",
        "partners = match_sides(table)",
        (PAIRWISE + "test_c3_partners_of_the_whole_are_independent_of_the_cut",),
    ),
    Mutant(
        "rlhf/pairwise.py",
        "chosen, rejected = means if flags.length_normalize else sums",
        "chosen, rejected = sums",
        (PAIRWISE + "test_length_normalised_losses_look_at_means",),
    ),
    Mutant(
        "rlhf/models/logps.py",
        "logits.square_().sum(-1).log_() - 2 * total.log()",
        "logits.square_().sum(-1).log_() - total.log()",
        (LOGPS + "test_collisions_are_those_of_the_full_matrix",),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}-{mutant.new.strip()}")
def test_rows_are_not_stale(mutant):
    assert_not_stale(mutant)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each mutant")
def test_every_mutant_is_noticed(tmp_path):
    assert_noticed(MUTANTS, tmp_path)
