"""Losses of a pair that compare its two responses: they depend on the margin of chosen over rejected alone.

    margin = chosen_scores - rejected_scores

The scores are the log-ratios `log pi(y|x) - log ref(y|x)` of whole responses, in nats, or what
`rlhf/losses/log_ratios.py` makes of them. Without a reference, they are the policy's own log-probabilities.

Shapes: `B` pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """DPO: the ranking loss of a reward model whose reward is the policy's own log-ratio.

        -(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin)

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7, with e = 0. With e > 0 conservative DPO: E. Mitchell, "A note
    on DPO with noisy preferences & relationship to IPO" (2023), for labels that are wrong with probability e. It
    is ln 2 where policy and reference agree.

    Args:
        chosen_scores, rejected_scores: (B,) log-ratios.
        beta: strength of the pull to the reference.
        label_smoothing: e, in [0, 0.5).

    Returns:
        (B,)

    >>> sigmoid_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -3.0]), beta=0.1)
    tensor([0.6931, 0.4741])
    """
    logits = beta * (chosen_scores - rejected_scores)
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: an unbiased estimate, from labels that are wrong with probability e, of DPO's loss on right ones.

        [(1 - e) l(margin) - e l(-margin)] / (1 - 2 e),    l(m) = -log sigmoid(beta * m)

    Chowdhury et al. 2024 (arXiv 2403.00409). With e = 0 it is DPO. Unlike conservative DPO's, its descent never
    lowers a margin; it has no lower bound.

    Args:
        chosen_scores, rejected_scores: (B,) log-ratios.
        beta: strength of the pull to the reference.
        label_smoothing: e, in [0, 0.5).

    Returns:
        (B,)

    >>> robust_loss(torch.tensor([2.0]), torch.tensor([-3.0]), beta=0.1, label_smoothing=0.1)
    tensor([0.4116])
    """
    logits = beta * (chosen_scores - rejected_scores)
    right, wrong = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1.0 - label_smoothing) * right - label_smoothing * wrong) / (1.0 - 2.0 * label_smoothing)


def ipo_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float) -> Tensor:
    """IPO: the squared distance of the margin from a target, so that it can't grow without end.

        (margin - 1 / (2 * beta))^2

    Azar et al. 2023 (arXiv 2310.12036), eq. 17, whose tau is `beta`. Deviation, shared with TRL, whose authors
    had it confirmed by IPO's: the scores are *means over the tokens* of a response, not sums; else the loss would
    grow with the length.

    Args:
        chosen_scores, rejected_scores: (B,) each response's log-ratio over the number of its tokens.
        beta: strength of the pull to the reference.

    Returns:
        (B,)

    >>> ipo_loss(torch.tensor([0.0, 0.25]), torch.tensor([0.0, -0.5]), beta=0.5)
    tensor([1.0000, 0.0625])
    """
    margin = chosen_scores - rejected_scores
    return (margin - 1.0 / (2.0 * beta)).square()


def hinge_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float) -> Tensor:
    """Hinge: a pair counts until its margin reaches 1 / beta, and then no more.

        max(0, 1 - beta * margin)

    The calibration loss of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on log-ratios to a reference, the
    "hinge-norm" of Liu et al. 2023 (arXiv 2309.06657).

    Args:
        chosen_scores, rejected_scores: (B,) log-ratios.
        beta: inverse of the margin at which a pair is settled.

    Returns:
        (B,)

    >>> hinge_loss(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([0.0, -3.0, -9.0]), beta=0.1)
    tensor([1.0000, 0.5000, 0.0000])
    """
    margin = chosen_scores - rejected_scores
    return torch.relu(1.0 - beta * margin)


def exo_pair_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO on pairs: the reverse KL from the policy's choice between the two responses to the label's.

        q log(q / (1 - e)) + (1 - q) log((1 - q) / e),    q = sigmoid(beta * margin)

    Ji et al. 2024 (arXiv 2402.00856), eq. 16. It is 0 at the margin whose q is 1 - e, and grows beyond.

    Args:
        chosen_scores, rejected_scores: (B,) log-ratios.
        beta: strength of the pull to the reference.
        label_smoothing: e, in (0, 0.5); the paper takes 1e-3. The loss is infinite at 0.

    Returns:
        (B,)

    >>> exo_pair_loss(torch.tensor([0.0]), torch.tensor([0.0]), beta=0.1, label_smoothing=0.001)
    tensor([2.7612])
    """
    logits = beta * (chosen_scores - rejected_scores)
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return chosen + rejected


def discopop_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, tau: float) -> Tensor:
    """DiscoPOP, the log-ratio modulated loss: DPO's for pairs in the wrong order, exponential for those in the right.

        (1 - m) * -log sigmoid(z) + m * exp(-z),    z = beta * margin,  m = sigmoid(z / tau)

    Lu et al. 2024 (arXiv 2406.08414), eq. 5. Not convex: a narrow hump stands above z = 0.

    Args:
        chosen_scores, rejected_scores: (B,) log-ratios.
        beta: strength of the pull to the reference.
        tau: width of the change between the two, in (0, 1); the paper takes 0.05.

    Returns:
        (B,)

    >>> discopop_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -3.0]), beta=0.1, tau=0.05)
    tensor([0.8466, 0.6065])
    """
    logits = beta * (chosen_scores - rejected_scores)
    logistic = -F.logsigmoid(logits) * torch.sigmoid(-logits / tau)
    # One exponential: m underflows to 0 before exp(-z) overflows, and 0 times infinity is no number.
    return logistic + torch.exp(F.logsigmoid(logits / tau) - logits)


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
