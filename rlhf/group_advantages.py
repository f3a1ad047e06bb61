"""Advantages of responses that were sampled in groups, and the weight of each in the loss.

Shapes: `P` prompts with `G` responses each, `N = P * G` responses in the same order, `T` token positions. No gradient
flows through any of it. Sums run in float64, so that a group whose rewards are all equal has advantages of exactly 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf.advantages import gae
from rlhf.masked import masked_whiten

Normalization = Literal["token", "sequence", "constant"]


@torch.no_grad()
def grpo_advantages(rewards: Tensor, *, eps: float = 1e-4) -> Tensor:
    """GRPO: each reward against its group, in standard deviations of the group.

        A_i = (r_i - mean(r)) / (std(r) + eps)

    Shao et al. 2024 (arXiv 2402.03300), section 4.1.2. The deviation is the sample's (divisor G - 1), and eps 1e-4, as
    in TRL; the paper names neither.

    Args:
        rewards: (P, G), G of 2 or more.
        eps: keeps a group without spread finite.

    Returns:
        (P, G) float32; a row of zeros where a group's rewards are all equal.

    Raises:
        ValueError: G is below 2.

    >>> grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]), eps=0.0).nan_to_num()
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = _centred(rewards)
    std = (centred.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)).sqrt()
    return (centred / (std + eps)).float()


@torch.no_grad()
def dr_grpo_advantages(rewards: Tensor) -> Tensor:
    """Dr. GRPO: each reward less the mean of its group, without the division that favours groups of little spread.

        A_i = r_i - mean(r)

    Liu et al. 2025 (arXiv 2503.20783), section 3.2.

    Args:
        rewards: (P, G), G of 2 or more.

    Returns:
        (P, G) float32.

    Raises:
        ValueError: G is below 2.

    >>> dr_grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000]])
    """
    return _centred(rewards).float()


@torch.no_grad()
def rloo_advantages(rewards: Tensor) -> Tensor:
    """RLOO: each reward less the mean of the *other* rewards of its group, an unbiased baseline.

        A_i = r_i - 1 / (G - 1) * sum over j != i of r_j

    Ahmadian et al. 2024 (arXiv 2402.14740), eq. 8. It is G / (G - 1) times Dr. GRPO's.

    Args:
        rewards: (P, G), G of 2 or more.

    Returns:
        (P, G) float32.

    Raises:
        ValueError: G is below 2.

    >>> rloo_advantages(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    tensor([[ 0.3333, -1.0000, -1.0000,  1.6667]])
    """
    num = rewards.shape[1]
    return (_centred(rewards) * (num / (num - 1))).float()


@torch.no_grad()
def reinforce_pp_advantages(token_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """REINFORCE++: what is still to come at each token, whitened over all tokens of the rollout.

        A_t = (R_t - mean(R)) / std(R),    R_t = sum over s >= t of r_s

    Hu et al. 2025 (arXiv 2501.03262), section 3: no critic, and no group either, so one response a prompt is enough.
    Its variant with a baseline gives `token_rewards` whose scores have had their group's mean taken off.

    Args:
        token_rewards: (N, T), `rlhf.advantages.token_rewards`: minus the KL at each token, the score at the last.
        response_mask: (N, T) bool.

    Returns:
        (N, T) float32 of mean 0 and variance 1 over the real tokens, or 0 where the rewards to come are all equal;
        0 at the positions that don't count.

    >>> mask = torch.tensor([[True, True], [True, True]])
    >>> reinforce_pp_advantages(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), mask)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    rewards = token_rewards.double()
    returns, _ = gae(rewards, torch.zeros_like(rewards), response_mask, gamma=1.0, lam=1.0)
    return masked_whiten(returns, response_mask).float()


def group_means(rewards: Tensor) -> Tensor:
    """(P, 1) float64 mean reward of each group of (P, G), exact where the rewards of a group are all equal."""
    return rewards.double().mean(1, keepdim=True)


def without_spread(rewards: Tensor) -> Tensor:
    """(P,) bool: groups of (P, G) whose rewards are all equal, from which a group advantage learns nothing.

    >>> without_spread(torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2]]))
    tensor([ True, False])
    """
    return rewards.amax(1) == rewards.amin(1)


@torch.no_grad()
def response_weights(lengths: Tensor, counted: Tensor, *, normalization: Normalization, max_length: int) -> Tensor:
    """The weight of one token's loss in each response of an optimiser step: their weighted sum is the step's loss.

    | normalization | weight | so that |
    |---|---|---|
    | `token` | 1 / tokens of the step | every token counts alike (DAPO, arXiv 2503.14476, eq. 8) |
    | `sequence` | 1 / (N * length) | every response counts alike (GRPO, arXiv 2402.03300, eq. 3) |
    | `constant` | 1 / (N * max_length) | no length in the weight (Dr. GRPO, arXiv 2503.20783, section 3.2) |

    Args:
        lengths: (N,) tokens of each response of the step, on all devices; 0 is allowed.
        counted: (N,) bool: False leaves a response out of the loss. Its tokens are no tokens of the step, but N
            counts it, as TRL does: leaving a response out never raises the weight of the others' tokens in
            `sequence` and `constant`.
        max_length: the longest response that sampling allows, in tokens.

    Returns:
        (N,) float32, 0 where a response is left out or empty.

    Raises:
        ValueError: for another normalization.

    >>> lengths, counted = torch.tensor([1, 3, 8]), torch.tensor([True, True, False])
    >>> response_weights(lengths, counted, normalization="token", max_length=8)
    tensor([0.2500, 0.2500, 0.0000])
    >>> response_weights(lengths, counted, normalization="sequence", max_length=8)
    tensor([0.3333, 0.1111, 0.0000])
    >>> response_weights(lengths, counted, normalization="constant", max_length=8)
    tensor([0.0417, 0.0417, 0.0000])
    """
    num = len(lengths)
    if normalization == "token":
        divisors = (lengths * counted).sum().expand(num)
    elif normalization == "sequence":
        divisors = num * lengths
    elif normalization == "constant":
        divisors = torch.full_like(lengths, num * max_length)
    else:
        raise ValueError(f"normalization must be token, sequence or constant, not {normalization!r}")
    return torch.where(counted & (lengths > 0), 1.0 / divisors.clamp(min=1), 0.0)


def _centred(rewards: Tensor) -> Tensor:
    if rewards.shape[1] < 2:
        raise ValueError(f"a group needs 2 or more responses to be compared, not {rewards.shape[1]}")
    return rewards.double() - group_means(rewards)
