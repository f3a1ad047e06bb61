"""Losses of a pair that need no reference: they look at the policy's own log-probabilities.

CPO and ORPO add the negative log-likelihood of the chosen response, which keeps the policy from drifting off; the
scripts add it, `rlhf/losses/supervised.py` has it.

Shapes: `B` pairs. Log-probabilities are of whole responses, in nats: sums over their tokens (CPO), or means over them
(SimPO, ORPO).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses.preference import sigmoid_loss


def cpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """CPO: DPO with a uniform reference, which drops out of the margin.

        -log sigmoid(beta * (log pi(y_c|x) - log pi(y_r|x)))

    Xu et al. 2024 (arXiv 2401.08417), eq. 3, the term that prefers; to be used with the negative log-likelihood of
    the chosen response. Deviation, shared with TRL: that likelihood is a mean over all chosen tokens of the step,
    where the paper sums each response's.

    Args:
        chosen_logps, rejected_logps: (B,) summed.
        beta: steepness of the loss in the margin.
        label_smoothing: probability that a label is wrong, in [0, 0.5), as in `sigmoid_loss`.

    Returns:
        (B,)

    >>> cpo_loss(torch.tensor([-10.0]), torch.tensor([-15.0]), beta=0.1)
    tensor([0.4741])
    """
    return sigmoid_loss(chosen_logps, rejected_logps, beta=beta, label_smoothing=label_smoothing)


def simpo_loss(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO: the mean log-probability a token is the reward, and the chosen one must lead by a margin.

        -log sigmoid(beta * (chosen - rejected) - gamma)

    Meng et al. 2024 (arXiv 2405.14734), eq. 6.

    Args:
        chosen_mean_logps, rejected_mean_logps: (B,) means over the tokens.
        beta: scale of the reward; the paper takes 2 to 10.
        gamma: the reward margin that is asked for.
        label_smoothing: probability that a label is wrong, in [0, 0.5), as in `sigmoid_loss`.

    Returns:
        (B,)

    >>> simpo_loss(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]), beta=2.0, gamma=2.0)
    tensor([2.1269, 0.6931])
    """
    return sigmoid_loss(
        chosen_mean_logps, rejected_mean_logps + gamma / beta, beta=beta, label_smoothing=label_smoothing
    )


def orpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """ORPO: the odds of the chosen response over those of the rejected one.

        -log sigmoid(log [odds(y_c|x) / odds(y_r|x)]),    odds(y|x) = p / (1 - p),  p = exp(mean log pi a token)

    Hong et al. 2024 (arXiv 2403.07691), eq. 7, with p as in eq. 3 and the odds of eq. 4; eq. 6 adds it, lambda times,
    to the negative log-likelihood of the chosen sequence. Deviations: that likelihood is a mean over all its tokens
    of the step, *prompts included*, as in the authors' code and in TRL; and 1 - p is kept above the smallest number
    that float arithmetic can tell from 0, where odds would be infinite.

    Args:
        chosen_mean_logps, rejected_mean_logps: (B,) means over the tokens, at most 0.

    Returns:
        (B,)

    >>> orpo_loss(torch.tensor([0.5, 0.8]).log(), torch.tensor([0.5, 0.5]).log())
    tensor([0.6931, 0.2231])
    """
    log_odds = _log_odds(chosen_mean_logps) - _log_odds(rejected_mean_logps)
    return -F.logsigmoid(log_odds)


def _log_odds(logps: Tensor) -> Tensor:
    # log p - log(1 - p). Near p = 1 the digits of 1 - p are in expm1; far from it, in log1p.
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    near = torch.log(-torch.expm1(logps))
    far = torch.log1p(-torch.exp(logps))
    return logps - torch.where(logps > -math.log(2.0), near, far)
