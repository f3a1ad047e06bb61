"""Losses of policies that learn from their own samples, per token, and what is watched beside them.

All take tensors of one shape: (B, T), or (N,) with the real tokens alone; GSPO, whose ratio is that of a whole
response, takes (B, T) and its mask. At positions that don't count the new and the old log-probability must be equal,
whatever they are; the caller's mask leaves them out of the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.masked import masked_mean, mean_var_from, moments


def ppo_policy_loss(token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, *, clip_coef: float) -> Tensor:
    """PPO's clipped surrogate: no reward for moving a token's probability further than the clip.

        max(-A * ratio, -A * clip(ratio, 1 - c, 1 + c)),    ratio = exp(token_logps - old_token_logps)

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, negated. At ratio 1 its gradient is that of
    -A * token_logps. The ratio overflows where the log-ratio passes 88 in float32: clamp the log-ratio first if it
    may.

    Args:
        token_logps: log-probabilities of the sampled tokens under the policy that learns.
        old_token_logps: under the policy that sampled them; a constant.
        advantages: a constant.
        clip_coef: c.

    Returns:
        The loss of each token.

    >>> old = torch.zeros(2)
    >>> ppo_policy_loss(torch.tensor([0.5, 0.5]), old, torch.tensor([1.0, -1.0]), clip_coef=0.2)
    tensor([-1.2000,  1.6487])
    """
    return grpo_loss(token_logps, old_token_logps, advantages, clip_low=clip_coef, clip_high=clip_coef)


def grpo_loss(
    token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """GRPO: PPO's clipped surrogate, with room of its own on either side of ratio 1.

        max(-A * ratio, -A * clip(ratio, 1 - low, 1 + high)),    ratio = exp(token_logps - old_token_logps)

    Shao et al. 2024 (arXiv 2402.03300), eq. 3, without its KL term and before its means; with `clip_high` above
    `clip_low` the "clip-higher" of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 8 and 10), which lets unlikely tokens
    grow. The ratio overflows where the log-ratio passes 88 in float32: clamp the log-ratio first if it may.

    Args:
        token_logps: log-probabilities of the sampled tokens under the policy that learns.
        old_token_logps: under the policy that sampled them; a constant.
        advantages: a constant.
        clip_low, clip_high: low and high; the ratio is held in [1 - low, 1 + high].

    Returns:
        The loss of each token.

    >>> old, advantages = torch.zeros(2), torch.tensor([1.0, -1.0])
    >>> grpo_loss(torch.tensor([0.5, -0.5]), old, advantages, clip_low=0.2, clip_high=0.28)
    tensor([-1.2800,  0.8000])
    """
    unclipped, clipped = _policy_losses(torch.exp(token_logps - old_token_logps), advantages, clip_low, clip_high)
    return torch.maximum(unclipped, clipped)


def gspo_loss(
    token_logps: Tensor,
    old_token_logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """GSPO: the clipped surrogate with one ratio for the whole response, the geometric mean of its tokens' ratios.

        s = exp(mean over t of (token_logps - old_token_logps))
        max(-A * s_t, -A * clip(s_t, 1 - low, 1 + high)),    s_t = sg[s] * exp(token_logps - sg[token_logps])

    Zheng et al. 2025 (arXiv 2507.18071), eq. 13-14 (GSPO-token), sg = detached. Where a response has one advantage
    the mean over its tokens is GSPO's own objective (eq. 5 and 7), in value and gradient.

    Args:
        token_logps, old_token_logps, advantages: (B, T), as for `grpo_loss`.
        response_mask: (B, T) bool, True at response tokens. The log-ratio elsewhere must be 0.
        clip_low, clip_high: low and high, of the size of 3e-4 and 4e-4: a mean over tokens hardly moves.

    Returns:
        (B, T)

    >>> new, old, mask = torch.tensor([[0.3, 0.1, 0.0]]), torch.zeros(1, 3), torch.tensor([[True, True, False]])
    >>> gspo_loss(new, old, torch.ones(1, 3), mask, clip_low=0.2, clip_high=0.2)[mask]
    tensor([-1.2000, -1.2000])
    >>> gspo_loss(new, old, torch.ones(1, 3), mask, clip_low=0.2, clip_high=0.3)[mask]
    tensor([-1.2214, -1.2214])
    """
    log_ratios = response_log_ratios(token_logps.detach(), old_token_logps, response_mask)
    ratios = torch.exp(log_ratios + token_logps - token_logps.detach())
    unclipped, clipped = _policy_losses(ratios, advantages, clip_low, clip_high)
    return torch.maximum(unclipped, clipped)


def cispo_loss(
    token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """CISPO: REINFORCE with a clipped, detached importance weight, so that no token loses its gradient.

        -sg[clip(ratio, 1 - low, 1 + high)] * A * token_logps,    ratio = exp(token_logps - old_token_logps)

    MiniMax 2025 (arXiv 2506.13585), eq. 4 and 5, sg = detached. With `clip_low` of 1 or more nothing is clipped from
    below, as in that paper's runs and in TRL, whose `epsilon_high` is `1 + clip_high` here.

    Args:
        token_logps, old_token_logps, advantages, clip_low, clip_high: as for `grpo_loss`.

    Returns:
        The loss of each token. Its value says nothing; its gradient is -weight * A times that of `token_logps`.

    >>> new = torch.tensor([-1.0, -1.0], requires_grad=True)
    >>> cispo_loss(new, torch.tensor([-3.0, -1.5]), torch.ones(2), clip_low=1.0, clip_high=4.0).sum().backward()
    >>> new.grad
    tensor([-5.0000, -1.6487])
    """
    weights = torch.exp(token_logps.detach() - old_token_logps).clamp(1.0 - clip_low, 1.0 + clip_high)
    return -weights * advantages * token_logps


def response_log_ratios(token_logps: Tensor, old_token_logps: Tensor, response_mask: Tensor) -> Tensor:
    """Mean log-ratio of each response's tokens, (B, 1); 0 for an empty response.

    >>> mask = torch.tensor([[True, True], [False, False]])
    >>> response_log_ratios(torch.tensor([[0.3, 0.1], [9.0, 9.0]]), torch.zeros(2, 2), mask)
    tensor([[0.2000],
            [0.0000]])
    """
    return masked_mean(token_logps - old_token_logps, response_mask, dim=1).unsqueeze(1)


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_coef: float | None) -> Tensor:
    """Half the squared error of the critic, which gains nothing by moving further than the clip.

        0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

    "The N Implementation Details of RLHF with PPO", policy detail 10. Without a clip, `0.5 * (V - R)^2`.

    Args:
        values: the critic's values now.
        old_values: its values at the rollout; a constant.
        returns: what it should say; a constant.
        clip_coef: c, in the units of the values; None for no clip.

    Returns:
        The loss of each token.

    >>> values, old_values, returns = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([2.5])
    >>> ppo_value_loss(values, old_values, returns, clip_coef=0.5)
    tensor([0.5000])
    >>> ppo_value_loss(values, old_values, returns, clip_coef=None)
    tensor([0.1250])
    """
    if clip_coef is None:
        return 0.5 * (values - returns).square()
    unclipped, clipped = _value_losses(values, old_values, returns, clip_coef)
    return torch.maximum(unclipped, clipped)


@torch.no_grad()
def policy_clipped(log_ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """1.0 for each token whose clip holds back the policy (`ppo_policy_loss`, `grpo_loss`), else 0.0; detached.

    Its mean over the real tokens is the clip fraction.

    Args:
        log_ratios: log pi(y_t) - log pi_old(y_t), or what stands for it (`response_log_ratios`).
        advantages: of a shape that broadcasts with it.

    >>> policy_clipped(torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0]), clip_low=0.2, clip_high=0.2)
    tensor([1., 0.])
    """
    unclipped, clipped = _policy_losses(torch.exp(log_ratios), advantages, clip_low, clip_high)
    return (clipped > unclipped).to(log_ratios.dtype)


@torch.no_grad()
def value_clipped(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_coef: float) -> Tensor:
    """1.0 for each token whose clip holds back the critic (`ppo_value_loss`), else 0.0; detached.

    >>> value_clipped(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([2.5]), clip_coef=0.5)
    tensor([1.])
    """
    unclipped, clipped = _value_losses(values, old_values, returns, clip_coef)
    return (clipped > unclipped).to(values.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """How much of the returns' variance the critic predicts: `1 - Var(R - V) / Var(R)`; detached.

    1 is perfect, 0 no better than a constant, below 0 worse than one.

    Args:
        values, returns, mask: of one shape; mask is True at the real tokens.

    Returns:
        A float64 scalar; 0 where the returns don't vary, and the question has no answer.

    >>> returns, mask = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])
    >>> explained_variance(torch.tensor([1.5, 2.5, 0.0]), returns, mask)
    tensor(0.7500, dtype=torch.float64)
    """
    return explained_variance_from(moments(returns - values, mask), moments(returns, mask))


def explained_variance_from(error_moments: Tensor, return_moments: Tensor) -> Tensor:
    """`explained_variance` from `rlhf.masked.moments` of `returns - values` and of `returns`, (3,) each.

    The moments may be sums over micro-batches or devices.

    >>> explained_variance_from(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([2.0, 4.0, 10.0]))
    tensor(0.5000)
    """
    _, error_var = mean_var_from(error_moments)
    _, return_var = mean_var_from(return_moments)
    return torch.where(return_var > 0, 1.0 - error_var / return_var, torch.zeros_like(return_var))


def _policy_losses(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    return -advantages * ratio, -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)


def _value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> tuple[Tensor, Tensor]:
    clipped = torch.clamp(values, old_values - clip_coef, old_values + clip_coef)
    return 0.5 * (values - returns).square(), 0.5 * (clipped - returns).square()
