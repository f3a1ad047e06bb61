"""PPO's clipped losses, worked by hand on both sides of the clip, and what is logged beside them."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.losses.policy_gradient import (
    cispo_loss,
    explained_variance,
    explained_variance_from,
    grpo_loss,
    gspo_loss,
    policy_clipped,
    ppo_policy_loss,
    ppo_value_loss,
    response_log_ratios,
    value_clipped,
)
from rlhf.masked import moments


def random_tokens(seed: int = 0, *, num: int = 24):
    """New and old log-probabilities or values, and advantages or returns, (N,) each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, num, generator=generator, dtype=torch.float64).unbind()


RATIOS = [1.5, 1.5, 0.5, 0.5, 1.1, 1.1]
ADVANTAGES = [2.0, -2.0, 2.0, -2.0, 2.0, -2.0]


def test_l1_by_hand():
    """L1: ratio 1.5, 0.5 and 1.1 with advantage 2 and -2, clip 0.2.

    1.5: max(-3, -2.4) = -2.4, held; max(3, 2.4) = 3. 0.5: max(-1, -1.6) = -1; max(1, 1.6) = 1.6, held.
    1.1: inside, -2.2 and 2.2. The gradient in log-probability is -A * ratio, and 0 where held.
    """
    logps = torch.tensor(RATIOS, dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    loss = ppo_policy_loss(logps, torch.zeros_like(logps), advantages, clip_coef=0.2)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -2.2, 2.2])
    assert logps.grad.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, -2.2, 2.2])
    held = policy_clipped(logps, advantages, clip_low=0.2, clip_high=0.2)
    assert held.tolist() == [1, 0, 0, 1, 0, 0]
    assert not held.requires_grad


def test_l1_c2_at_ratio_one_nothing_is_clipped():
    """L1, C2: the loss is -A, its gradient that of -A * log-probability, whatever the clip."""
    logps, _, advantages = random_tokens()
    logps.requires_grad_()
    for clip_coef in (0.0, 0.2):
        loss = ppo_policy_loss(logps, logps.detach(), advantages, clip_coef=clip_coef)
        torch.testing.assert_close(loss, -advantages)
        held = policy_clipped(torch.zeros_like(logps), advantages, clip_low=clip_coef, clip_high=clip_coef)
        assert (held == 0).all()
    (grad,) = torch.autograd.grad(ppo_policy_loss(logps, logps.detach(), advantages, clip_coef=0.2).sum(), logps)
    torch.testing.assert_close(grad, -advantages)


def test_l1_loss_is_a_bound():
    """Never below the unclipped loss, and equal to it for a clip too wide to matter."""
    logps, old_logps, advantages = random_tokens()
    unclipped = -advantages * (logps - old_logps).exp()
    clipped = ppo_policy_loss(logps, old_logps, advantages, clip_coef=0.2)
    assert (clipped >= unclipped).all()
    assert (clipped > unclipped).any()
    torch.testing.assert_close(ppo_policy_loss(logps, old_logps, advantages, clip_coef=1e6), unclipped)


def test_grpo_has_room_of_its_own_on_either_side():
    """Low 0.1, high 0.4. Ratio 1.5: max(-3, -2.8) = -2.8, held; max(3, 2.8) = 3. Ratio 0.5: max(-1, -1.8) = -1;
    max(1, 1.8) = 1.8, held. Ratio 1.1: inside on both sides. With equal room it is PPO's.
    """
    logps = torch.tensor(RATIOS, dtype=torch.float64).log().requires_grad_()
    old, advantages = torch.zeros_like(logps), torch.tensor(ADVANTAGES, dtype=torch.float64)
    loss = grpo_loss(logps, old, advantages, clip_low=0.1, clip_high=0.4)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-2.8, 3.0, -1.0, 1.8, -2.2, 2.2])
    assert logps.grad.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, -2.2, 2.2])
    held = policy_clipped(logps.detach(), advantages, clip_low=0.1, clip_high=0.4)
    assert held.tolist() == [1, 0, 0, 1, 0, 0]
    same = grpo_loss(logps, old, advantages, clip_low=0.2, clip_high=0.2)
    assert torch.equal(same, ppo_policy_loss(logps, old, advantages, clip_coef=0.2))


def test_gspo_by_hand():
    """Log-ratios (0.5, 0.1) and, shorter, (-0.4): s = e^0.3 = 1.3499 and e^-0.4 = 0.6703. Clip [0.8, 1.4].

    Response 1, A = 2: -2 s at each token, gradient -2 s at each: the mean over its two tokens has the gradient
    -2 s / 2 of GSPO's own objective -A exp(mean of the log-ratios). Response 2, A = -1: max(0.6703, 0.8) = 0.8, held.
    The token behind its end, with log-ratio 0, has no say.
    """
    logps = torch.tensor([[0.5, 0.1], [-0.4, 0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([[2.0], [-1.0]], dtype=torch.float64).expand(2, 2)
    loss = gspo_loss(logps, torch.zeros_like(logps), advantages, mask, clip_low=0.2, clip_high=0.4)
    s = math.exp(0.3)
    assert loss[mask].tolist() == pytest.approx([-2 * s, -2 * s, 0.8])
    (grad,) = torch.autograd.grad((loss * mask).sum(), logps)
    assert grad[0].tolist() == pytest.approx([-2 * s, -2 * s])
    assert grad[1].tolist() == [0.0, 0.0]
    objective = -2 * torch.exp(response_log_ratios(logps[:1], torch.zeros(1, 2), mask[:1])).sum()
    torch.testing.assert_close(torch.autograd.grad(objective, logps)[0][0], grad[0] / 2)


def test_gspo_of_an_empty_response_is_finite():
    logps = torch.zeros(1, 2, requires_grad=True)
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    loss = gspo_loss(logps, torch.zeros(1, 2), torch.ones(1, 2), nothing, clip_low=0.2, clip_high=0.2)
    (loss * nothing).sum().backward()
    assert logps.grad.tolist() == [[0.0, 0.0]]
    assert response_log_ratios(logps, torch.zeros(1, 2), nothing).item() == 0.0


def test_cispo_by_hand():
    """Weights 1.5 -> 1.3, 0.5 -> 0.9 and 1.1, inside: the gradient is -A times the weight, never 0; the weight is
    a constant."""
    logps = torch.tensor(RATIOS, dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    loss = cispo_loss(logps, torch.zeros_like(logps), advantages, clip_low=0.1, clip_high=0.3)
    loss.sum().backward()
    assert logps.grad.tolist() == pytest.approx([-2.6, 2.6, -1.8, 1.8, -2.2, 2.2])
    assert loss.tolist() == pytest.approx((logps.grad * logps.detach()).tolist())
    with torch.no_grad():
        open_below = cispo_loss(logps, torch.zeros_like(logps), advantages, clip_low=1.0, clip_high=0.3)
    assert open_below[2].item() == pytest.approx(-0.5 * 2 * math.log(0.5))


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo"])
def test_at_ratio_one_all_are_reinforce(loss):
    """Equal policies: the gradient is that of -A * log-probability, whatever the clips."""
    logps, _, advantages = (x.view(4, 6) for x in random_tokens())
    logps = logps.clone().requires_grad_()
    advantages = advantages[:, :1].expand(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    clips = {"clip_low": 0.1, "clip_high": 0.2}
    losses = {
        "grpo": lambda: grpo_loss(logps, logps.detach(), advantages, **clips),
        "gspo": lambda: gspo_loss(logps, logps.detach(), advantages, mask, **clips),
        "cispo": lambda: cispo_loss(logps, logps.detach(), advantages, **clips),
    }
    (grad,) = torch.autograd.grad(losses[loss]().sum(), logps)
    torch.testing.assert_close(grad, -advantages)


def test_l2_by_hand():
    """L2: old value 1, clip 0.5, so the clipped value is in [0.5, 1.5].

    Value 2, return 2.5: max(0.25, 1) / 2 = 0.5, held. Value 2, return 0: max(4, 2.25) / 2 = 2.
    Value 0, return -1: max(1, 2.25) / 2 = 1.125, held. Value 1.2, return 3: 3.24 / 2 = 1.62, inside.
    The gradient in the value is V - R, and 0 where held.
    """
    values = torch.tensor([2.0, 2.0, 0.0, 1.2], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([2.5, 0.0, -1.0, 3.0], dtype=torch.float64)
    loss = ppo_value_loss(values, torch.ones_like(values), returns, clip_coef=0.5)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.5, 2.0, 1.125, 1.62])
    assert values.grad.tolist() == pytest.approx([0.0, 2.0, 0.0, -1.8])
    held = value_clipped(values, torch.ones_like(values), returns, clip_coef=0.5)
    assert held.tolist() == [1, 0, 1, 0]
    assert not held.requires_grad


def test_l2_without_a_clip_it_is_half_the_squared_error():
    """L2: off equals plain MSE, halved; and so does a clip too wide to matter."""
    values, old_values, returns = random_tokens()
    expected = 0.5 * torch.nn.functional.mse_loss(values, returns, reduction="none")
    torch.testing.assert_close(ppo_value_loss(values, old_values, returns, clip_coef=None), expected)
    torch.testing.assert_close(ppo_value_loss(values, old_values, returns, clip_coef=1e6), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda *x: ppo_policy_loss(*x, clip_coef=0.2),
        lambda *x: ppo_value_loss(*x, clip_coef=0.2),
        lambda *x: grpo_loss(*x, clip_low=0.2, clip_high=0.3),
        lambda *x: cispo_loss(*x, clip_low=0.2, clip_high=0.3),
        lambda new, old, advantages: policy_clipped(new - old, advantages, clip_low=0.2, clip_high=0.3),
        lambda *x: value_clipped(*x, clip_coef=0.2),
    ],
)
def test_flat_tokens_and_rows_are_the_same(function):
    """(N,) with the real tokens alone equals (B, T) at them: f(x[mask]) == f(x)[mask]."""
    rows = [x.view(4, 6) for x in random_tokens()]
    mask = torch.arange(6) < torch.tensor([[6], [2], [3], [1]])
    torch.testing.assert_close(function(*(x[mask] for x in rows)), function(*rows)[mask])


def test_gradients():
    leaf, old, target = random_tokens()
    leaf.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: ppo_policy_loss(x, old, target, clip_coef=0.2), leaf)
    assert check(lambda x: grpo_loss(x, old, target, clip_low=0.2, clip_high=0.3), leaf)
    assert check(lambda x: ppo_value_loss(x, old, target, clip_coef=0.2), leaf)
    assert check(lambda x: ppo_value_loss(x, old, target, clip_coef=None), leaf)


def test_c33_explained_variance_by_hand():
    """C33: returns 1, 3 (variance 1); errors -0.5, 0.5 (variance 0.25): 0.75. A constant error costs nothing."""
    returns = torch.tensor([1.0, 3.0, 50.0])
    mask = torch.tensor([True, True, False])
    assert explained_variance(torch.tensor([1.5, 2.5, math.nan]), returns, mask).item() == 0.75
    assert explained_variance(returns + 7, returns, mask).item() == 1.0
    assert explained_variance(torch.zeros(3), returns, mask).item() == 0.0
    assert explained_variance(-returns, returns, mask).item() == -3.0


def test_c33_explained_variance_without_an_answer():
    """C33: returns that don't vary, or none at all, give 0 rather than NaN or minus infinity."""
    returns, values = torch.ones(3), torch.tensor([0.0, 1.0, 5.0])
    assert explained_variance(values, returns, torch.ones(3, dtype=torch.bool)).item() == 0.0
    assert explained_variance(values, returns, torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_c20_c33_explained_variance_over_ranks():
    """C20, C33: from the summed moments of two uneven shards as from all tokens; no gradient."""
    values, noise, returns = random_tokens()
    values = (returns + noise).requires_grad_()
    mask = torch.rand(24, generator=torch.Generator().manual_seed(0)) < 0.7
    whole = explained_variance(values, returns, mask)
    shards = list(zip(values.split([5, 19]), returns.split([5, 19]), mask.split([5, 19]), strict=True))
    errors = sum(moments(r - v, m) for v, r, m in shards)
    totals = sum(moments(r, m) for _, r, m in shards)
    torch.testing.assert_close(explained_variance_from(errors, totals), whole)
    real_error, real = (returns - values)[mask], returns[mask]
    assert whole.item() == pytest.approx(1 - (real_error.var() / real.var()).item())
    assert not whole.requires_grad
