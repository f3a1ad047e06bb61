"""The reward model's ranking loss and its three ways to take a score from a response."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlhf.losses.reward import (
    average_reward_loss,
    last_token_reward_loss,
    pairwise_reward_loss,
    per_sample_reward_loss,
)

NAN = float("nan")


def nll_of(difference: float) -> float:
    """-log sigmoid(difference), spelled out."""
    return math.log(1 + math.exp(-difference))


def random_pairs(seed: int = 0):
    """Scores (4, 6) and (4, 5), their masks, and where the responses part."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (torch.randn(4, width, generator=generator, dtype=torch.float64) for width in (6, 5))
    chosen_mask = torch.arange(6) < torch.tensor([[6], [2], [3], [1]])
    rejected_mask = torch.arange(5) < torch.tensor([[3], [5], [3], [4]])
    return chosen, chosen_mask, rejected, rejected_mask, torch.tensor([0, 1, 2, 0])


def test_r5_ln_2_at_equal_scores():
    """R5, in all three."""
    scores, mask = torch.tensor([[1.5, -0.5]]), torch.tensor([[True, True]])
    assert pairwise_reward_loss(scores, scores)[0].tolist() == pytest.approx([math.log(2)] * 2)
    assert last_token_reward_loss(scores[:, 0], scores[:, 0]).item() == pytest.approx(math.log(2))
    assert average_reward_loss(scores, mask, scores, mask).item() == pytest.approx(math.log(2))
    same = per_sample_reward_loss(scores, mask, scores, mask, torch.tensor([0]))
    assert same.item() == pytest.approx(math.log(2))


def test_r5_by_hand():
    """R5: 3 against 1: log(1 + e^-2); 1 against 3: log(1 + e^2), larger by exactly 2; finite far out."""
    loss = pairwise_reward_loss(torch.tensor([3.0, 1.0, -500.0]), torch.tensor([1.0, 3.0, 500.0]))
    assert loss.tolist() == pytest.approx([nll_of(2), nll_of(2) + 2, 1000.0])


def test_margin_is_what_the_chosen_must_lead_by():
    """A lead of 2 less a margin of 0.5 is a lead of 1.5."""
    chosen, rejected = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0])
    expected = [nll_of(1.5), nll_of(0)]
    assert pairwise_reward_loss(chosen, rejected, margin=torch.tensor([0.5, 2.0])).tolist() == pytest.approx(expected)
    assert pairwise_reward_loss(chosen, rejected, margin=0.5)[0].item() == pytest.approx(expected[0])


def test_last_token_is_the_plain_ranking_loss():
    chosen, _, rejected, _, _ = random_pairs()
    ours = last_token_reward_loss(chosen[:, 0], rejected[:, 0])
    torch.testing.assert_close(ours, pairwise_reward_loss(chosen[:, 0], rejected[:, 0]), rtol=0, atol=0)


def test_average_by_hand():
    """Means 2 (of 1, 3) and 0.5 (of 0, 1, 0.5): a difference of 1.5; what stands at the pads is not seen."""
    loss = average_reward_loss(
        torch.tensor([[1.0, 3.0, NAN, NAN]]),
        torch.tensor([[True, True, False, False]]),
        torch.tensor([[0.0, 1.0, 0.5]]),
        torch.tensor([[True, True, True]]),
    )
    assert loss.item() == pytest.approx(nll_of(1.5))


def test_per_sample_by_hand():
    """Chosen 5, 2, 3, 4; rejected 5, 1 and padding; they part at 1.

    Position 1: 2 - 1 = 1. Position 2: 3 - 1 = 2, the rejected's last score carried on. Position 3: 4 - 1 = 3.
    """
    loss = per_sample_reward_loss(
        torch.tensor([[5.0, 2.0, 3.0, 4.0]]),
        torch.tensor([[True, True, True, True]]),
        torch.tensor([[5.0, 1.0, NAN]]),
        torch.tensor([[True, True, False]]),
        torch.tensor([1]),
    )
    assert loss.item() == pytest.approx((nll_of(1) + nll_of(2) + nll_of(3)) / 3)


def test_per_sample_carries_a_short_chosen_on_too():
    """Chosen 2; rejected 1, 4: differences 1 and -2."""
    loss = per_sample_reward_loss(
        torch.tensor([[2.0, NAN, NAN]]),
        torch.tensor([[True, False, False]]),
        torch.tensor([[1.0, 4.0]]),
        torch.tensor([[True, True]]),
        torch.tensor([0]),
    )
    assert loss.item() == pytest.approx((nll_of(1) + nll_of(-2)) / 2)


def test_per_sample_of_responses_that_never_part_is_zero_with_a_finite_gradient():
    """Equal responses (2 tokens, first difference 2) and two empty ones: no position, loss 0, gradient 0."""
    scores = torch.tensor([[1.0, 2.0], [NAN, NAN]], requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    loss = per_sample_reward_loss(scores, mask, torch.zeros(2, 2), mask, torch.tensor([2, 0]))
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert (scores.grad == 0).all()


def test_an_empty_response_scores_zero():
    """Chosen 2 against nothing: a difference of 2, in both reductions."""
    chosen, empty = torch.tensor([[2.0]]), torch.tensor([[NAN]])
    real, nothing = torch.tensor([[True]]), torch.tensor([[False]])
    average = average_reward_loss(chosen, real, empty, nothing)
    per_sample = per_sample_reward_loss(chosen, real, empty, nothing, torch.tensor([0]))
    assert average.item() == pytest.approx(nll_of(2))
    assert per_sample.item() == pytest.approx(nll_of(2))


def test_one_token_each_makes_the_three_losses_one():
    chosen, rejected = torch.tensor([[1.0], [0.5]]), torch.tensor([[0.25], [2.0]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    expected = last_token_reward_loss(chosen[:, 0], rejected[:, 0])
    torch.testing.assert_close(average_reward_loss(chosen, mask, rejected, mask), expected)
    start = torch.tensor([0, 0])
    torch.testing.assert_close(per_sample_reward_loss(chosen, mask, rejected, mask, start), expected)


@pytest.mark.parametrize("reduction", ["average", "per_sample"])
def test_padding_and_order_change_nothing(reduction):
    """Wider rows, NaN at the pads in value and gradient, and a permutation of the pairs."""

    def loss_of(chosen, chosen_mask, rejected, rejected_mask, first):
        if reduction == "average":
            return average_reward_loss(chosen, chosen_mask, rejected, rejected_mask)
        return per_sample_reward_loss(chosen, chosen_mask, rejected, rejected_mask, first)

    chosen, chosen_mask, rejected, rejected_mask, first = random_pairs()
    plain = chosen.clone().requires_grad_()
    expected = loss_of(plain, chosen_mask, rejected, rejected_mask, first)
    expected.sum().backward()
    poisoned = torch.cat([chosen, chosen], dim=1)
    wide_mask = torch.cat([chosen_mask, torch.zeros_like(chosen_mask)], dim=1)
    poisoned = poisoned.masked_fill(~wide_mask, NAN).requires_grad_()
    loss = loss_of(poisoned, wide_mask, rejected.masked_fill(~rejected_mask, NAN), rejected_mask, first)
    loss.sum().backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(poisoned.grad[:, : chosen.shape[1]], plain.grad)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = loss_of(*(x[order] for x in (chosen, chosen_mask, rejected, rejected_mask, first)))
    torch.testing.assert_close(shuffled, expected[order])


def test_swapping_chosen_and_rejected_negates_the_difference():
    """-log sigmoid(x) + log sigmoid(-x) = -x, so loss less swapped loss is minus the difference."""
    chosen, chosen_mask, rejected, rejected_mask, _ = random_pairs()
    there = average_reward_loss(chosen, chosen_mask, rejected, rejected_mask)
    back = average_reward_loss(rejected, rejected_mask, chosen, chosen_mask)
    means = [
        torch.stack([row[real].mean() for row, real in zip(x, m, strict=True)])
        for x, m in ((chosen, chosen_mask), (rejected, rejected_mask))
    ]
    torch.testing.assert_close(there - back, means[1] - means[0])


def test_gradients():
    chosen, chosen_mask, rejected, rejected_mask, first = random_pairs()
    leaves = chosen.requires_grad_(), rejected.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda c, r: pairwise_reward_loss(c[:, :5], r, margin=0.3), leaves)
    assert check(lambda c, r: average_reward_loss(c, chosen_mask, r, rejected_mask), leaves)
    assert check(lambda c, r: per_sample_reward_loss(c, chosen_mask, r, rejected_mask, first), leaves)


@pytest.mark.peer
@pytest.mark.parametrize("margin", [None, [0.5, 0.0, 1.5, 0.1]])
def test_r5_equal_to_trl(margin):
    """R5: TRL's own RewardTrainer.compute_loss on a stub model that returns the given scores."""
    trainer_class = pytest.importorskip("trl").RewardTrainer

    def same(x):
        return x

    scores = torch.randn(8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = scores.clone().requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    inputs = {} if margin is None else {"margin": torch.tensor(margin, dtype=torch.float64)}
    expected = trainer_class.compute_loss(trainer, lambda **_: SimpleNamespace(logits=theirs), inputs)
    expected.backward()

    ours = scores.clone().requires_grad_()
    chosen, rejected = ours.squeeze(-1).chunk(2)
    loss = pairwise_reward_loss(chosen, rejected, margin=inputs.get("margin")).mean()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
