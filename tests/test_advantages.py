"""Token rewards, generalised advantage estimation, missing-EOS scores, reward scaling."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from rlhf.advantages import RunningMoments, end_state_mask, gae, score_missing_eos, token_rewards
from rlhf.masked import masked_whiten, moments

NAN = float("nan")


def lengths_mask(lengths: list[int], width: int) -> torch.Tensor:
    """(B, T) bool, True at the first `lengths[b]` positions of row b."""
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def random_rollout(seed: int, *, width: int = 12, dtype: torch.dtype = torch.float64):
    """Rewards and values (6, T) and the mask of responses of every sort of length, the empty one included."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, width - 1, width, 0, *torch.randint(1, width, (2,), generator=generator).tolist()]
    rewards, values = torch.randn(2, len(lengths), width, generator=generator, dtype=dtype).unbind()
    return rewards, values, lengths_mask(lengths, width)


# ---------------------------------------------------------------------------------------------- token rewards


def test_k1_k2_token_rewards_by_hand():
    """K1, K2: kl 0.5, -1 at coefficient 0.1 gives -0.05, +0.1; the score 2 joins the last real token."""
    rewards = token_rewards(
        torch.tensor([2.0, -3.0]),
        torch.tensor([[0.5, -1.0, NAN], [0.25, 0.5, 0.75]]),
        torch.tensor([[True, True, False], [True, True, True]]),
        kl_coef=0.1,
    )
    expected = torch.tensor([[-0.05, 2.1, 0.0], [-0.025, -0.05, -3.075]])
    torch.testing.assert_close(rewards, expected)


def test_process_rewards_by_hand():
    """Of the score 2, tokens earn 0.5 and 3, so -1.5 is left for the end: 0.5 - 0.05 | 3 + 0.1 - 1.5; where the end
    state has a place of its own, 3.1 | -1.5. Nothing is earned at a pad, and the sum stays 2.05.
    """
    given = (torch.tensor([2.0]), torch.tensor([[0.5, -1.0, NAN]]), torch.tensor([[True, True, False]]), 0.1)
    process = torch.tensor([[0.5, 3.0, NAN]])
    rewards = token_rewards(*given, process_rewards=process)
    torch.testing.assert_close(rewards, torch.tensor([[0.45, 1.6, 0.0]]))
    rewards = token_rewards(*given, process_rewards=process, value_mask=end_state_mask(given[2]))
    torch.testing.assert_close(rewards, torch.tensor([[0.45, 3.1, -1.5]]))


def test_k1_a_policy_surer_than_the_reference_is_charged():
    """K1: log-probability -1 against the reference's -2 is kl +1, and a negative reward."""
    token_kl = torch.tensor([[-1.0]]) - torch.tensor([[-2.0]])
    rewards = token_rewards(torch.zeros(1), token_kl, torch.tensor([[True]]), kl_coef=0.05)
    assert rewards.item() == pytest.approx(-0.05)


@pytest.mark.parametrize("with_end_state", [False, True])
def test_k2_k7_score_and_penalty_add_up(with_end_state):
    """K2, K7: sum of rewards - score = -beta * sum of kl, and one position differs from the bare penalty."""
    token_kl, _, mask = random_rollout(0)
    value_mask = end_state_mask(mask) if with_end_state else None
    scores = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    rewards = token_rewards(scores, token_kl, mask, 0.3, value_mask=value_mask)
    penalty = token_rewards(torch.zeros_like(scores), token_kl, mask, 0.3, value_mask=value_mask)
    real = mask.any(dim=1)  # the empty row gets nothing
    kl = (token_kl * mask).sum(dim=1)
    torch.testing.assert_close(penalty.sum(dim=1), -0.3 * kl)
    torch.testing.assert_close(rewards.sum(dim=1), torch.where(real, scores, 0.0) - 0.3 * kl)
    assert ((rewards != penalty).sum(dim=1) == real.int()).all()


def test_p13_padding_gets_no_reward():
    """P13: whatever the KL says there, and also in a row that is all padding."""
    mask = lengths_mask([2, 0], 4)
    rewards = token_rewards(torch.tensor([1.0, 1.0]), torch.full((2, 4), NAN).masked_fill(mask, 0.5), mask, 0.1)
    assert (rewards[~mask] == 0).all()
    assert rewards[0, 1].item() == pytest.approx(0.95)


def test_score_stands_at_the_last_real_token_of_any_mask():
    """Left padding and holes: the last True of the row, wherever it is."""
    mask = torch.tensor([[False, True, True, False], [True, False, True, True], [True, True, False, False]])
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 4), mask, 0.1)
    assert rewards.tolist() == [[0, 0, 1, 0], [0, 0, 0, 2], [0, 3, 0, 0]]


def test_targets_carry_no_gradient():
    """Rewards, advantages and returns are constants of the losses."""
    mask = lengths_mask([2], 3)
    leaf = torch.ones(1, 3, requires_grad=True)
    assert not token_rewards(torch.ones(1), leaf, mask, 0.1).requires_grad
    assert not any(part.requires_grad for part in gae(leaf, leaf, mask, gamma=1.0, lam=0.95))


# ------------------------------------------------------------------------------------------------ end states


def test_p12_two_masks_by_hand():
    """P12: T = 4, lengths 1, 3, 4 and 0. Policy: idx < length. Critic: one more where it fits."""
    mask = lengths_mask([1, 3, 4, 0], 4)
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert end_state_mask(mask).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_p12_k2_g1_score_on_the_end_state_by_hand():
    """P12, K2, G1 with a value at the end state: T = 3, gamma 1, lambda 0.5, no KL, scores 4.

    Length 1, values 1, 2, (9): score at index 1. delta_1 = 4 - 2 = 2; delta_0 = 2 - 1 = 1; A_0 = 1 + 0.5 * 2.
    Length 2, values 1, 2, 3: score at index 2. delta = 1, 1, 1; A = 1.75, 1.5, 1.
    Length 3, values 1, 2, 3: no room, score on the last token: the same numbers.
    """
    mask = lengths_mask([1, 2, 3], 3)
    value_mask = end_state_mask(mask)
    values = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    rewards = token_rewards(torch.full((3,), 4.0), torch.zeros(3, 3), mask, 0.1, value_mask=value_mask)
    assert rewards.tolist() == [[0, 4, 0], [0, 0, 4], [0, 0, 4]]
    advantages, returns = gae(rewards, values, value_mask, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[2, 2, 0], [1.75, 1.5, 1], [1.75, 1.5, 1]]
    assert returns.tolist() == [[3, 4, 0], [2.75, 3.5, 4], [2.75, 3.5, 4]]


# ------------------------------------------------------------------------------------------------------- GAE


def test_g1_by_hand():
    """G1: rewards 0, 1 and values 0.5, 0.25 with gamma 0.5, lambda 0.5.

    delta_1 = 1 + 0.5 * 0 - 0.25 = 0.75 (value 0 past the end); delta_0 = 0.5 * 0.25 - 0.5 = -0.375.
    A_1 = 0.75; A_0 = -0.375 + 0.25 * 0.75 = -0.1875; returns 0.3125 and 1.
    """
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(
        torch.tensor([[0.0, 1.0, NAN]]), torch.tensor([[0.5, 0.25, NAN]]), mask, gamma=0.5, lam=0.5
    )
    assert advantages.tolist() == [[-0.1875, 0.75, 0.0]]
    assert returns.tolist() == [[0.3125, 1.0, 0.0]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_g1_equals_the_double_sum(seed, gamma, lam):
    """G1: A_t = sum over l of (gamma lambda)^l delta_{t+l}, term by term, for random lengths."""
    rewards, values, mask = random_rollout(seed)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum((gamma * lam) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s]) for s in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
    assert (advantages[~mask] == 0).all()


def test_lambda_one_returns_are_the_discounted_rewards_to_go():
    """lambda 1: the critic cancels out of the returns."""
    rewards, values, mask = random_rollout(0)
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    togo = torch.zeros(mask.shape[0], dtype=torch.float64)
    for t in reversed(range(mask.shape[1])):
        togo = torch.where(mask[:, t], rewards[:, t] + 0.9 * togo, 0.0)
        torch.testing.assert_close(returns[:, t], togo)


@pytest.mark.parametrize("seed", range(3))
def test_g1_positions_that_dont_count_are_stepped_over(seed):
    """gae(x, mask) at the real positions == gae(x[mask]): right pads, left pads and holes, NaN at all of them."""
    rewards, values, _ = random_rollout(seed)
    mask = torch.rand(rewards.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    advantages, returns = gae(rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, gamma=0.9, lam=0.8)
    for row in range(mask.shape[0]):
        real = mask[row]
        dense = (x[row, real].unsqueeze(0) for x in (rewards, values, mask))
        expected = gae(*dense, gamma=0.9, lam=0.8)
        torch.testing.assert_close(advantages[row, real], expected[0][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(returns[row, real], expected[1][0], rtol=0, atol=1e-12)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_gae_rows_are_independent_of_order_and_padding():
    rewards, values, mask = random_rollout(1)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    shuffled = gae(rewards[order], values[order], mask[order], gamma=1.0, lam=0.95)
    assert torch.equal(shuffled[0], advantages[order])
    assert torch.equal(shuffled[1], returns[order])
    wide = [torch.cat([x, x], dim=1) for x in (rewards, values)]
    wide_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    padded = gae(*wide, wide_mask, gamma=1.0, lam=0.95)
    width = mask.shape[1]
    assert torch.equal(padded[0][:, :width], advantages)
    assert torch.equal(padded[1][:, :width], returns)


def test_g2_returns_are_raw_advantages_plus_values():
    """G2: whitening the advantages afterwards leaves the returns bit-equal."""
    rewards, values, mask = random_rollout(2)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(returns, (advantages + values).masked_fill(~mask, 0), rtol=0, atol=0)
    before = returns.clone()
    whitened = masked_whiten(advantages, mask)
    assert not torch.allclose(whitened, advantages)
    assert torch.equal(returns, before)


# ----------------------------------------------------------------------------------------------- missing EOS


def test_p10_missing_eos():
    """P10: rows without EOS get exactly -1 (replace), their score less 1 (subtract), or what they had."""
    scores = torch.tensor([0.5, 2.0, -7.0])
    ended = torch.tensor([True, False, False])
    assert score_missing_eos(scores, ended, mode="replace", value=-1.0).tolist() == [0.5, -1.0, -1.0]
    assert score_missing_eos(scores, ended, mode="subtract", value=1.0).tolist() == [0.5, 1.0, -8.0]
    assert score_missing_eos(scores, ended, mode="subtract", value=-1.0).tolist() == [0.5, 1.0, -8.0]
    assert score_missing_eos(scores, ended, mode="keep", value=-1.0).tolist() == [0.5, 2.0, -7.0]
    assert scores.tolist() == [0.5, 2.0, -7.0]
    with pytest.raises(ValueError, match="replace, subtract or keep"):
        score_missing_eos(scores, ended, mode="punish", value=-1.0)


# -------------------------------------------------------------------------------------------- reward scaling


def test_k5_running_moments_match_the_plain_ones():
    """K5: after batches of 3, 1 and 6 scores, mean and standard deviation of all ten."""
    scores = torch.randn(10, generator=torch.Generator().manual_seed(0)) * 2 + 5
    running = RunningMoments()
    for batch in scores.split([3, 1, 6]):
        running.update(batch)
    running.update(torch.tensor([]))
    assert running.count == 10
    assert running.mean == pytest.approx(statistics.fmean(scores.tolist()), rel=1e-12)
    assert running.std == pytest.approx(statistics.stdev(scores.tolist()), rel=1e-12)


def test_k5_over_all_ranks():
    """K5: moments summed over two uneven ranks, twice, match one process that saw every score."""
    scores = torch.randn(14, generator=torch.Generator().manual_seed(1)) + 3
    one, ranks = RunningMoments(), RunningMoments()
    for batch in scores.split(7):
        one.update(batch)
        shards = batch.split([5, 2])
        ranks.update_from(sum(moments(shard, torch.ones_like(shard, dtype=torch.bool)) for shard in shards))
    assert ranks.count == one.count == 14
    assert ranks.mean == pytest.approx(one.mean, rel=1e-12)
    assert ranks.std == pytest.approx(one.std, rel=1e-10)
    ranks.update_from(torch.zeros(3, dtype=torch.float64))
    assert ranks.count == 14


def test_k5_scaling_keeps_the_mean_and_normalising_removes_it():
    """K5: scores 1, 3, 5 have mean 3 and deviation 2."""
    running = RunningMoments()
    running.update(torch.tensor([1.0, 3.0, 5.0]))
    x = torch.tensor([3.0, 7.0])
    assert running.scale(x).tolist() == [1.5, 3.5]
    assert running.normalize(x).tolist() == [0.0, 2.0]


def test_k5_two_scores_are_enough_and_small_ones_count():
    """K5: 0.0001 and 0.0003, one at a time: deviation 0.0001 * sqrt 2."""
    for update in ("update", "update_from"):
        running = RunningMoments()
        for score in (1e-4, 3e-4):
            x = torch.tensor([score])
            batch = x if update == "update" else moments(x, torch.tensor([True]))
            getattr(running, update)(batch)
        assert running.mean == pytest.approx(2e-4)
        assert running.std == pytest.approx(1e-4 * 2**0.5, rel=1e-5)


@pytest.mark.parametrize("scores", [[], [4.0], [0.1] * 7, [1e6] * 5])
def test_k5_without_spread_nothing_is_scaled(scores):
    """No score, one score, or equal ones (up to rounding): the deviation counts as 1."""
    for update in ("update", "update_from"):
        running = RunningMoments()
        x = torch.tensor(scores)
        batch = x if update == "update" else moments(x, torch.ones_like(x, dtype=torch.bool))
        getattr(running, update)(batch)
        assert running.std == 1.0


def test_k5_state_survives_a_checkpoint():
    """K5: through JSON and back, then on to the same numbers bit for bit."""
    running, resumed = RunningMoments(), RunningMoments()
    running.update(torch.tensor([1.0, 2.5, -3.0]))
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    for each in (running, resumed):
        each.update(torch.tensor([0.3, 9.0]))
    assert resumed.state_dict() == running.state_dict()
    with pytest.raises(KeyError):
        resumed.load_state_dict({"count": 1.0})
