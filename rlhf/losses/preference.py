"""Losses that align a policy directly with pairs of a chosen and a rejected response to one prompt.

All look at the log-ratio margin, how much more the policy has moved towards the chosen response than towards the
rejected one:

    margin = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)

Shapes: `B` pairs. Log-probabilities are of whole responses, in nats, summed over their tokens unless said
otherwise. Without a reference, pass zeros for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO: the ranking loss of a reward model whose reward is the policy's own log-ratio.

        -(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin)

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7, with e = 0. With e > 0 conservative DPO: E. Mitchell, "A note
    on DPO with noisy preferences & relationship to IPO" (2023), for labels that are wrong with probability e. It
    is ln 2 where policy and reference agree.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: (B,) summed.
        beta: strength of the pull to the reference.
        label_smoothing: e, in [0, 0.5).

    Returns:
        (B,)

    >>> logps = torch.tensor([-12.0]), torch.tensor([-15.0])
    >>> sigmoid_loss(*logps, *logps, beta=0.1)
    tensor([0.6931])
    >>> sigmoid_loss(*logps, torch.tensor([-14.0]), torch.tensor([-12.0]), beta=0.1)
    tensor([0.4741])
    """
    logits = beta * _margin(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """IPO: the squared distance of the margin from a target, so that it can't grow without end.

        (margin - 1 / (2 * beta))^2

    Azar et al. 2023 (arXiv 2310.12036), eq. 17, whose tau is `beta`. Deviation, shared with TRL, whose authors
    had it confirmed by IPO's: the log-probabilities are *means over the tokens* of a response, not sums; else
    the loss would grow with the length.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: (B,) each a
            response's summed log-probability over the number of its tokens.
        beta: strength of the pull to the reference.

    Returns:
        (B,)

    >>> logps = torch.tensor([-1.5]), torch.tensor([-2.0])
    >>> ipo_loss(*logps, *logps, beta=0.5)
    tensor([1.])
    >>> ipo_loss(*logps, torch.tensor([-1.75]), torch.tensor([-1.5]), beta=0.5)
    tensor([0.0625])
    """
    margin = _margin(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (margin - 1.0 / (2.0 * beta)).square()


def hinge_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Hinge: a pair counts until its margin reaches 1 / beta, and then no more.

        max(0, 1 - beta * margin)

    The calibration loss of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on log-ratios to a reference, the
    "hinge-norm" of Liu et al. 2023 (arXiv 2309.06657).

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: (B,) summed.
        beta: inverse of the margin at which a pair is settled.

    Returns:
        (B,)

    >>> logps = torch.tensor([-12.0]), torch.tensor([-15.0])
    >>> hinge_loss(*logps, *logps, beta=0.1)
    tensor([1.])
    >>> hinge_loss(*logps, torch.tensor([-14.0]), torch.tensor([-12.0]), beta=0.1)
    tensor([0.5000])
    """
    margin = _margin(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return torch.relu(1.0 - beta * margin)


def implicit_rewards(policy_logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """The reward for which the policy would be optimal, up to a constant of the prompt.

        beta * (policy_logps - ref_logps)

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 5 without beta log Z(x). Chosen less rejected is beta times the
    margin of the losses above. Differentiable; detach it for a log.

    Args:
        policy_logps, ref_logps: (B,) summed.

    Returns:
        (B,)

    >>> implicit_rewards(torch.tensor([-10.0]), torch.tensor([-12.0]), beta=0.1)
    tensor([0.2000])
    """
    return beta * (policy_logps - ref_logps)


def _margin(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
) -> Tensor:
    # Each response against its own reference first: those two numbers are the nearest to each other.
    return (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
