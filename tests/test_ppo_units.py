"""The parts of rlhf_ppo.py and experience.py: hand-worked numbers, and what each must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rlhf.advantages import RunningMoments
from rlhf.errors import UserError
from rlhf.experience import Experience, stack
from rlhf.experiment.optimizers import TensorFlowAdam
from rlhf.experiment.steps import Step
from rlhf.losses.policy_gradient import ppo_policy_loss
from rlhf.monitoring import measure_rollout
from rlhf.rlhf_ppo import (
    PPOFlags,
    advantages_of,
    pack,
    policy_losses,
    shaped_scores,
    targets_of,
)
from tests.ppo import flags_of, make_world, set_up


def flags(**changes) -> PPOFlags:
    return PPOFlags(**{"data_dir": "data", "rollout_size": 8, "mini_batch_size": 8, **changes})


def experience(position=0, *, prompt=2, kl=(), values=(), score=0.0, ended=True, old=None) -> Experience:
    """A response with these token KLs (k1) and values; its tokens are 10, 11, …"""
    num = len(kl)
    old = torch.full((num,), -1.0) if old is None else torch.tensor(old)
    return Experience(
        position=position,
        prompt=torch.arange(prompt),
        response=torch.arange(10, 10 + num),
        old_logps=old,
        ref_logps=old - torch.tensor(kl),
        values=torch.tensor(values),
        score=score,
        ended=ended,
    )


def table() -> list[Experience]:
    """Lengths 1, T - 1 and T for T = 3."""
    return [
        experience(0, prompt=1, kl=[0.5], values=[0.3, 0.7], score=2.0),
        experience(1, prompt=3, kl=[0.5, -1.0], values=[0.1, 0.2, 0.4], score=3.0),
        experience(2, prompt=2, kl=[0.0, 0.0, 1.0], values=[0.5, 0.6, 0.7, 0.9], score=1.0, ended=False),
    ]


def random_experiences(num: int, *, width: int, seed: int = 0) -> list[Experience]:
    """Responses of 1 to `width` tokens with random numbers."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(num):
        length = int(torch.randint(1, width + 1, (1,), generator=draw))
        kl, values = torch.randn(length, generator=draw), torch.randn(length + 1, generator=draw)
        score = float(torch.randn(1, generator=draw))
        found.append(experience(i, kl=kl.tolist(), values=values.tolist(), score=score, ended=length < width))
    return found


def test_rewards_values_and_masks_against_a_hand_table():
    """P11, P12, K2: with gamma = lambda = 1 and beta 0.1, returns are the rewards still to come.

    Length 1:      rewards -0.05 | 2.0          the score stands on the end state, which the critic has a value for
    Length T - 1:  rewards -0.05, 0.1 | 3.0
    Length T:      rewards 0, 0, -0.1 + 1.0     no room for the end state: the score stands on the last token
    """
    rollout = stack(table(), 3)
    settings = flags(gae_lambd=1.0, normalize_advantages=False)
    targets = targets_of(rollout, rollout.scores, 0.1, settings, 1)
    assert rollout.response_mask.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert targets.value_mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    torch.testing.assert_close(targets.returns, torch.tensor([[1.95, 2.0, 0.0], [3.05, 3.1, 3.0], [0.9, 0.9, 0.9]]))
    advantages = torch.tensor([[1.65, 0.0, 0.0], [2.95, 2.9, 0.0], [0.4, 0.3, 0.2]])
    torch.testing.assert_close(targets.advantages, advantages)
    total_kl = torch.tensor([0.5, -0.5, 1.0])
    torch.testing.assert_close(targets.returns[:, 0], rollout.scores - 0.1 * total_kl)


def test_process_rewards_say_where_a_score_is_earned():
    """Of the score 3 of the second response, its tokens earn 1 and 4, so the end earns -2: with beta 0 and
    gamma = lambda = 1 the returns are 3, 2 | -2. Divided by a deviation of 2, all of it halves.
    """
    experiences = table()
    experiences[1].process_rewards = torch.tensor([1.0, 4.0])
    rollout = stack(experiences, 3)
    settings = flags(gae_lambd=1.0, normalize_advantages=False)
    assert rollout.process_rewards.tolist() == [[0, 0, 0], [1, 4, 0], [0, 0, 0]]
    targets = targets_of(rollout, rollout.scores, 0.0, settings, 1)
    torch.testing.assert_close(targets.returns[1], torch.tensor([3.0, 2.0, -2.0]))
    torch.testing.assert_close(targets.returns[[0, 2], 0], torch.tensor([2.0, 1.0]))
    halved = targets_of(rollout, rollout.scores / 2, 0.0, settings, 1, scale=2.0)
    torch.testing.assert_close(halved.returns, targets.returns / 2)


def test_stack_refuses_a_response_that_does_not_fit():
    with pytest.raises(ValueError, match="3 tokens does not fit 2 columns"):
        stack(table(), 2)


def test_packed_batches_line_up_with_the_hand_table():
    """P11, P12: each value is read one position before its token, the end state's at the last token."""
    experiences = table()
    rollout = stack(experiences, 3)
    targets = targets_of(rollout, rollout.scores, 0.1, flags(gae_lambd=1.0, normalize_advantages=False), 1)
    batch = pack(experiences, targets, targets.advantages, [2, 0, 1])
    # Prompts of 2, 1 and 3 tokens, responses of 3, 1 and 2: the position of the token before each response token,
    # then the last token of the two responses whose end state has a column.
    assert batch.forest.positions[batch.value_index].tolist() == [1, 2, 3, 0, 2, 3, 1, 4]
    torch.testing.assert_close(batch.old_values, torch.tensor([0.5, 0.6, 0.7, 0.3, 0.1, 0.2, 0.7, 0.4]))
    torch.testing.assert_close(batch.returns, torch.tensor([0.9, 0.9, 0.9, 1.95, 3.05, 3.1, 2.0, 3.0]))
    torch.testing.assert_close(batch.advantages, torch.tensor([0.4, 0.3, 0.2, 1.65, 2.95, 2.9]))
    assert len(batch.old_logps) == batch.forest.num_targets == 6


def test_scores_of_responses_without_eos():
    """P10: replaced by exactly -1 by default; lowered by the penalty, or kept, on request."""
    rollout = stack(table(), 3)

    def shaped(**changes):
        return shaped_scores(rollout, flags(**changes), RunningMoments()).tolist()

    assert shaped() == [2.0, 3.0, -1.0]
    assert shaped(missing_eos_value=-4.0) == [2.0, 3.0, -4.0]
    assert shaped(missing_eos="subtract", missing_eos_value=0.25) == [2.0, 3.0, 0.75]
    assert shaped(missing_eos="keep") == [2.0, 3.0, 1.0]


def test_running_scale_of_scores():
    """K5: scores over the running deviation of all so far; the mean goes and the clip comes only on request."""
    batches = [stack(random_experiences(6, width=4, seed=s), 4) for s in range(3)]
    seen, moments = [], RunningMoments()
    centred, clipped = RunningMoments(), RunningMoments()
    for rollout in batches:
        settings = {"missing_eos": "keep", "normalize_rewards": True}
        scaled = shaped_scores(rollout, flags(**settings), moments)
        seen.extend(rollout.scores.tolist())
        std = np.std(np.array(seen, dtype=np.float64), ddof=1)
        torch.testing.assert_close(scaled, (rollout.scores / std).float())
        normal = shaped_scores(rollout, flags(**settings, center_rewards=True), centred)
        torch.testing.assert_close(normal, ((rollout.scores - np.mean(seen)) / std).float())
        short = shaped_scores(rollout, flags(**settings, clip_rewards=True, reward_clip_value=0.5), clipped)
        torch.testing.assert_close(short, scaled.clamp(-0.5, 0.5))
    assert moments.count == 18
    plain = shaped_scores(batches[0], flags(missing_eos="keep"), RunningMoments())
    assert torch.equal(plain, batches[0].scores)


def test_whitened_rewards_keep_their_mean():
    """K4: variance 1 over the real positions, mean kept, off by default, refused under 8 responses."""
    rollout = stack(random_experiences(16, width=6, seed=2), 6)
    rollout.values.zero_()
    plain = flags(gae_lambd=1.0, normalize_advantages=False)
    white = flags(gae_lambd=1.0, normalize_advantages=False, whiten_rewards=True)
    found = []
    for settings in (plain, white):
        targets = targets_of(rollout, rollout.scores, 0.05, settings, 1)
        following = torch.cat([targets.returns[:, 1:], torch.zeros(16, 1)], 1)
        found.append((targets.returns - following)[targets.value_mask])  # the rewards, as V = 0 and lambda = 1
    assert not flags().whiten_rewards
    assert abs(found[1].mean() - found[0].mean()) < 1e-6
    assert abs(found[1].var(correction=0) - 1) < 1e-4
    with pytest.raises(UserError, match="--whiten_rewards needs --rollout_size of 8 or more, not 4"):
        flags(rollout_size=4, mini_batch_size=4, whiten_rewards=True)


def test_returns_do_not_know_of_whitening():
    """G2: returns come from raw advantages; every switch of the whitening leaves them bit-equal."""
    rollout = stack(random_experiences(8, width=5), 5)

    def returns(**changes):
        return targets_of(rollout, rollout.scores, 0.05, flags(**changes), 2).returns

    raw = returns(normalize_advantages=False)
    for scope in ("rollout", "rank", "mini_batch"):
        assert torch.equal(raw, returns(advantage_scope=scope, advantage_clip_value=0.1))


def whitened(rollout, rows, world_size=1, **changes):
    """The advantages that the mini-batch `rows` trains on."""
    settings = flags(**changes)
    targets = targets_of(rollout, rollout.scores, 0.05, settings, world_size)
    return advantages_of(targets, rollout, rows, settings)


def test_scopes_of_advantage_whitening():
    """G3, G4: mean 0 and population variance 1 over the rollout, over each device's rows, or over the mini-batch.

    The rollout's scope does not know of devices; the mini-batch's knows its rows alone, so neither depends on how
    these are cut into micro-batches.
    """
    rollout = stack(random_experiences(8, width=5), 5)

    def is_white(values, mask):
        return abs(values[mask].mean()) < 1e-5 and abs(values[mask].var(correction=0) - 1) < 1e-4

    everywhere = whitened(rollout, [0, 1])
    assert is_white(everywhere, rollout.response_mask)
    assert not everywhere[~rollout.response_mask].any()
    assert torch.equal(everywhere, whitened(rollout, [0, 1], 2))
    of_ranks = whitened(rollout, [0, 1], 2, advantage_scope="rank")
    for rank in range(2):
        assert is_white(of_ranks[rank::2], rollout.response_mask[rank::2])
    mini = whitened(rollout, [6, 1, 3], advantage_scope="mini_batch")
    assert is_white(mini[[6, 1, 3]], rollout.response_mask[[6, 1, 3]])
    assert torch.equal(mini, whitened(rollout, [6, 1, 3], 2, advantage_scope="mini_batch"))


@pytest.mark.parametrize("scope", ["rollout", "rank", "mini_batch"])
def test_advantage_clip(scope):
    """G5: off by default; on, no whitened advantage is larger than the bound, and smaller ones are as they were."""
    rollout, rows = stack(random_experiences(8, width=5), 5), [0, 2, 4, 5]
    free = whitened(rollout, rows, advantage_scope=scope)
    clipped = whitened(rollout, rows, advantage_scope=scope, advantage_clip_value=0.7)
    assert flags().advantage_clip_value == 0
    assert free[rows].abs().max() > 0.7
    torch.testing.assert_close(clipped[rows], free[rows].clamp(-0.7, 0.7))


class FakeActor(nn.Module):
    """Log-probabilities and entropies that were chosen for it."""

    def __init__(self, logps: torch.Tensor) -> None:
        super().__init__()
        self.logps = nn.Parameter(logps)

    def forward(self, forest, *, temperature, entropy):
        return self.logps, -self.logps.square()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def step(world, tmp_path_factory):
    """Makes steps with empty metrics."""
    run = set_up(flags_of(world, tmp_path_factory.mktemp("run") / "run")).run
    return lambda: Step(run, [0])


def batch_of(experiences, rows):
    rollout = stack(experiences, 6)
    targets = targets_of(rollout, rollout.scores, 0.05, flags(), 1)
    return pack(experiences, targets, targets.advantages, rows)


def losses_of(step, batch, logps, **changes):
    """Summed loss, its gradient, and what was logged."""
    actor, now = FakeActor(logps), step()
    loss = policy_losses(actor, batch, flags(**changes), now, now.run.metrics())
    loss.backward()
    return loss.detach(), actor.logps.grad, now.metrics.reduce()


def test_no_entropy_bonus_unless_asked(step):
    """L9: coefficient 0 is the clipped surrogate alone, bit for bit; a coefficient takes its share of the entropy."""
    batch = batch_of(random_experiences(4, width=6), [0, 1, 2, 3])
    logps = batch.old_logps + torch.linspace(-0.5, 0.5, len(batch.old_logps))
    loss, grad, _ = losses_of(step, batch, logps)
    actor = FakeActor(logps)
    new_logps = batch.old_logps + (actor.logps - batch.old_logps)
    plain = ppo_policy_loss(new_logps, batch.old_logps, batch.advantages, clip_coef=0.2).sum()
    plain.backward()
    assert flags().entropy_coef == 0
    assert torch.equal(loss, plain.detach())
    assert torch.equal(grad, actor.logps.grad)
    with_bonus, _, _ = losses_of(step, batch, logps, entropy_coef=0.3)
    torch.testing.assert_close(with_bonus, loss + 0.3 * logps.square().sum())


def test_padding_reaches_no_loss_and_no_metric(step):
    """P13, W2: a batch of unequal rows is the sum of its rows alone: loss, entropy, KL and clip fraction."""
    experiences = random_experiences(5, width=6, seed=4)
    whole = batch_of(experiences, [0, 1, 2, 3, 4])
    lengths = [len(e.response) for e in experiences]
    logps = whole.old_logps + torch.linspace(-0.5, 0.5, len(whole.old_logps))
    loss, _, logged = losses_of(step, whole, logps)
    parts = [losses_of(step, batch_of(experiences, [i]), part) for i, part in enumerate(logps.split(lengths))]
    torch.testing.assert_close(loss, sum(part[0] for part in parts))
    for name in ("entropy", "approx_kl", "clip_fraction", "ratio"):
        alone = sum(n * part[2][f"train/{name}"] for n, part in zip(lengths, parts, strict=True)) / sum(lengths)
        assert logged[f"train/{name}"] == pytest.approx(alone, rel=1e-5)


def test_wider_rollouts_change_no_metric_and_no_target(step):
    """P13, W2, G3: twice the columns, all padding, and every logged number and every target is the same."""
    experiences = random_experiences(8, width=5)
    logged, targets = [], []
    for width in (6, 12):
        rollout, now = stack(experiences, width), step()
        targets.append(targets_of(rollout, rollout.scores, 0.05, flags(), 1))
        measure_rollout(now, rollout, rollout.scores, targets[-1], 0.05)
        logged.append(now.metrics.reduce())
        assert not targets[-1].advantages[~rollout.response_mask].any()
        assert not (rollout.old_logps - rollout.ref_logps)[~rollout.response_mask].any()
    assert logged[0] == pytest.approx(logged[1], rel=1e-6)
    torch.testing.assert_close(targets[0].advantages, targets[1].advantages[:, :6])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_score_penalty_and_sum_are_logged_apart(step, estimator):
    """K1, K7: reward = score - penalty, and the penalty is the one that the token rewards hold."""
    settings = flags(gae_lambd=1.0, normalize_advantages=False, kl_estimator=estimator)
    rollout, now = stack(random_experiences(8, width=5), 5), step()
    rollout.values.zero_()
    targets = targets_of(rollout, rollout.scores, 0.2, settings, 1)
    measure_rollout(now, rollout, rollout.scores, targets, 0.2)
    logged = now.metrics.reduce()
    assert logged["train/shaped_score"] == pytest.approx(rollout.scores.mean().item())
    assert logged["train/reward"] == pytest.approx(logged["train/shaped_score"] - logged["train/kl_penalty"])
    assert logged["train/reward"] == pytest.approx(targets.returns[:, 0].mean().item(), rel=1e-5)
    log_ratio = (rollout.old_logps - rollout.ref_logps)[rollout.response_mask].double()
    k3 = (torch.expm1(-log_ratio) + log_ratio).mean().item()
    assert logged["train/kl_per_token"] == pytest.approx(log_ratio.mean().item(), rel=1e-5)
    assert logged["train/kl_k3_per_token"] == pytest.approx(k3, rel=1e-4)
    assert k3 > 0


def test_log_ratios_are_clamped(step):
    """L14: a log-ratio of 300 gives a finite loss and gradient; the clamp at +-20 leaves smaller ones alone."""
    batch = batch_of([experience(kl=[0.0] * 3, values=[0.0] * 4, score=1.0)], [0])
    batch.advantages = torch.tensor([-1.0, 1.0, -1.0])
    loss, grad, logged = losses_of(step, batch, batch.old_logps + torch.tensor([300.0, -300.0, 1.0]))
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()
    assert all(np.isfinite(value) for value in logged.values())
    e = np.exp([20.0, -20.0, 1.0])
    assert loss.item() == pytest.approx(e[0] - e[1] + e[2], rel=1e-6)


def test_tensorflow_adam_against_a_hand_table():
    """L7: gradient 1, lr 1, beta2 0.99, eps 0.1: with m / (1 - beta1^t) = 1, step t is s / (s + eps) for
    s = sqrt(1 - 0.99^t) = 0.1, 0.141067, 0.172337, 0.198504, 0.221382. PyTorch's Adam takes 1 / 1.1 each time.
    """
    ours, theirs = nn.Parameter(torch.zeros(1, dtype=torch.float64)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    tensorflow = TensorFlowAdam([ours], lr=1.0, betas=(0.9, 0.99), eps=0.1)
    pytorch = torch.optim.Adam([theirs], lr=1.0, betas=(0.9, 0.99), eps=0.1)
    moves = []
    for _ in range(5):
        before = (ours.item(), theirs.item())
        for parameter, optimizer in ((ours, tensorflow), (theirs, pytorch)):
            parameter.grad = torch.ones(1, dtype=torch.float64)
            optimizer.step()
        moves.append((before[0] - ours.item(), before[1] - theirs.item()))
    assert [m[0] for m in moves] == pytest.approx([0.5, 0.585178, 0.632803, 0.664996, 0.688844], abs=2e-5)
    assert [m[1] for m in moves] == pytest.approx([1 / 1.1] * 5)


@pytest.mark.parametrize(("rollout_size", "nearest"), [(10, 8), (14, 16), (3, 8)])
def test_sizes_that_do_not_divide_are_refused_with_the_nearest(rollout_size, nearest):
    """C21: the sentence names the nearest rollout size that does."""
    with pytest.raises(UserError, match=f"--rollout_size={rollout_size} is no multiple .* the nearest is {nearest}$"):
        flags(rollout_size=rollout_size)


def test_dropout_cannot_be_asked_for():
    """P4: the flag that would leave dropout on is refused."""
    with pytest.raises(UserError, match="leave --disable_dropout=True"):
        flags(disable_dropout=False)
