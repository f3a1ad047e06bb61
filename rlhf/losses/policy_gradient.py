"""PPO's two losses, per token, and what is watched beside them.

All take tensors of one shape: (B, T), or (N,) with the real tokens alone. At positions that don't count the new
and the old log-probability must be equal, whatever they are; the caller's mask leaves them out of the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.masked import mean_var_from, moments


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
    unclipped, clipped = _policy_losses(token_logps, old_token_logps, advantages, clip_coef)
    return torch.maximum(unclipped, clipped)


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
def policy_clipped(token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, *, clip_coef: float) -> Tensor:
    """1.0 for each token whose clip holds back the policy (`ppo_policy_loss`), else 0.0; detached.

    Its mean over the real tokens is the clip fraction.

    >>> policy_clipped(torch.tensor([0.5, 0.5]), torch.zeros(2), torch.tensor([1.0, -1.0]), clip_coef=0.2)
    tensor([1., 0.])
    """
    unclipped, clipped = _policy_losses(token_logps, old_token_logps, advantages, clip_coef)
    return (clipped > unclipped).to(token_logps.dtype)


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


def _policy_losses(
    token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, clip_coef: float
) -> tuple[Tensor, Tensor]:
    ratio = torch.exp(token_logps - old_token_logps)
    return -advantages * ratio, -advantages * ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef)


def _value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> tuple[Tensor, Tensor]:
    clipped = torch.clamp(values, old_values - clip_coef, old_values + clip_coef)
    return 0.5 * (values - returns).square(), 0.5 * (clipped - returns).square()
