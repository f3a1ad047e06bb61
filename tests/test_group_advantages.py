"""Advantages within groups and weights of responses, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.advantages import token_rewards
from rlhf.group_advantages import (
    dr_grpo_advantages,
    group_means,
    grpo_advantages,
    reinforce_pp_advantages,
    response_weights,
    rloo_advantages,
    without_spread,
)

OF_GROUPS = (grpo_advantages, dr_grpo_advantages, rloo_advantages)
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 2.0], [3.0, 3.0, 3.0, 7.0]])


def test_grpo_by_hand():
    """Group 1: mean 0.75, deviations 0.25, -0.75, -0.75, 1.25; squares sum to 2.75; std = sqrt(2.75 / 3) = 0.957427.
    Group 2: mean 4, deviations -1, -1, -1, 3; std = sqrt(12 / 3) = 2.
    """
    found = grpo_advantages(REWARDS, eps=0.0)
    assert found[0].tolist() == pytest.approx([0.261116, -0.783349, -0.783349, 1.305582], abs=1e-6)
    assert found[1].tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5])
    assert grpo_advantages(REWARDS, eps=2.0)[1].tolist() == pytest.approx([-0.25, -0.25, -0.25, 0.75])
    assert grpo_advantages(REWARDS)[1, 3].item() == pytest.approx(3 / 2.0001, rel=1e-6)


def test_dr_grpo_by_hand():
    assert dr_grpo_advantages(REWARDS).tolist() == [[0.25, -0.75, -0.75, 1.25], [-1.0, -1.0, -1.0, 3.0]]


def test_rloo_by_hand():
    """Means of the others: (2, 3, 3, 1) / 3 and (13, 13, 13, 9) / 3."""
    found = rloo_advantages(REWARDS)
    assert found[0].tolist() == pytest.approx([1 - 2 / 3, -1.0, -1.0, 2 - 1 / 3])
    assert found[1].tolist() == pytest.approx([3 - 13 / 3, 3 - 13 / 3, 3 - 13 / 3, 7 - 3])


@pytest.mark.parametrize("advantages", OF_GROUPS)
@pytest.mark.parametrize("group", [2, 3, 7])
def test_equal_rewards_have_advantages_of_exactly_zero(advantages, group):
    """A reward of 0.1, which no sum of floats holds exactly, in groups of every size."""
    assert (advantages(torch.full((3, group), 0.1)) == 0).all()
    assert (advantages(torch.full((3, group), -1e6)) == 0).all()


@pytest.mark.parametrize("advantages", OF_GROUPS)
def test_groups_stand_apart(advantages):
    """Each group's advantages sum to 0, know nothing of the other groups, and don't see a shift of all rewards."""
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = advantages(rewards)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[3:4], advantages(rewards[3:4]))
    torch.testing.assert_close(advantages(rewards + 5), found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("advantages", OF_GROUPS[:2])
def test_one_response_is_no_group(advantages):
    with pytest.raises(ValueError, match="2 or more responses"):
        advantages(torch.ones(3, 1))


def test_one_response_has_no_others():
    with pytest.raises((ValueError, ZeroDivisionError)):
        rloo_advantages(torch.ones(3, 1))


def test_groups_without_spread():
    assert without_spread(torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.100001]])).tolist() == [True, False]
    assert without_spread(torch.ones(2, 1)).tolist() == [True, True]


def test_reinforce_pp_by_hand():
    """Scores 2 (3 tokens) and -1 (1 token), KL 0.5, -0.5, 1 and 2 a token, coefficient 0.5.

    Rewards: -0.25, 0.25, 2 - 0.5 and -1 - 1. To come: 1.5, 1.75, 1.5 and -2. Their mean is 0.6875, the mean square
    (2.25 + 3.0625 + 2.25 + 4) / 4 = 2.890625, the variance 2.890625 - 0.47265625 = 2.41796875.
    """
    mask = torch.tensor([[True, True, True], [True, False, False]])
    token_kl = torch.tensor([[0.5, -0.5, 1.0], [2.0, 0.0, 0.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), token_kl, mask, 0.5)
    found = reinforce_pp_advantages(rewards, mask)
    std = math.sqrt(2.41796875)
    expected = [(r - 0.6875) / std for r in (1.5, 1.75, 1.5, -2.0)]
    assert found[mask].tolist() == pytest.approx(expected, rel=1e-6)
    assert (found[~mask] == 0).all()
    assert found.dtype == torch.float32


def test_reinforce_pp_of_equal_rewards_is_zero():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = token_rewards(torch.tensor([0.1, 0.1]), torch.zeros(2, 3), mask, 0.0)
    assert (reinforce_pp_advantages(rewards, mask) == 0).all()


def test_reinforce_pp_without_any_token_is_finite():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert (reinforce_pp_advantages(torch.zeros(2, 3), mask) == 0).all()


def test_nothing_carries_a_gradient():
    rewards = REWARDS.clone().requires_grad_()
    mask = torch.ones(2, 4, dtype=torch.bool)
    for found in (*(f(rewards) for f in OF_GROUPS), reinforce_pp_advantages(rewards, mask)):
        assert not found.requires_grad


def test_group_means_by_hand():
    assert group_means(REWARDS).tolist() == [[0.75], [4.0]]


def test_weights_by_hand():
    """Lengths 2, 6, 4 and 0; the third is left out. Tokens of the step: 8; responses: 4; longest 10.

    token: 1/8. sequence: 1 / (4 * 2) and 1 / (4 * 6). constant: 1 / (4 * 10). The left out and the empty one: 0.
    """
    lengths, counted = torch.tensor([2, 6, 4, 0]), torch.tensor([True, True, False, True])
    expected = {"token": [1 / 8, 1 / 8], "sequence": [1 / 8, 1 / 24], "constant": [1 / 40, 1 / 40]}
    for normalization, first in expected.items():
        found = response_weights(lengths, counted, normalization=normalization, max_length=10)
        assert found.tolist() == pytest.approx([*first, 0.0, 0.0])


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_weights_of_nothing_are_zero(normalization):
    lengths = torch.tensor([4, 4])
    found = response_weights(lengths, torch.tensor([False, False]), normalization=normalization, max_length=4)
    assert found.tolist() == [0.0, 0.0]


def test_another_normalization_is_refused():
    with pytest.raises(ValueError, match="token, sequence or constant, not 'mean'"):
        response_weights(torch.ones(2), torch.ones(2, dtype=torch.bool), normalization="mean", max_length=4)
