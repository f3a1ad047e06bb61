"""Losses of a pair that hold each response against the reference by itself, not only the one against the other.

A margin can grow while both responses become less likely. These losses say which way each of them is to move from
where the reference has it: a response's log-ratio `log pi(y|x) - log ref(y|x)`, in nats, is 0 there.

Shapes: `B` pairs. Without a reference, pass the policy's own log-probabilities.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bco_pair_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """BCO on pairs: a binary classifier whose logit is the implicit reward, chosen against rejected.

        -log sigmoid(beta * chosen) - log sigmoid(-beta * rejected)

    Jung et al. 2024 (arXiv 2404.04656), without its reward shift (0 here: each pair holds one of either label).

    Args:
        chosen_log_ratios, rejected_log_ratios: (B,)
        beta: strength of the pull to the reference.

    Returns:
        (B,)

    >>> bco_pair_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -3.0]), beta=0.1)
    tensor([1.3863, 1.1525])
    """
    return -F.logsigmoid(beta * chosen_log_ratios) - F.logsigmoid(-beta * rejected_log_ratios)


def nca_pair_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """NCA on pairs: noise contrastive, with a draw to 0 on both responses that keeps the chosen one likely.

        -log sigmoid(beta * chosen) - [log sigmoid(-beta * chosen) + log sigmoid(-beta * rejected)] / 2

    Chen et al. 2024 (arXiv 2402.05369), for two responses of which one is chosen.

    Args:
        chosen_log_ratios, rejected_log_ratios: (B,)
        beta: strength of the pull to the reference.

    Returns:
        (B,)

    >>> nca_pair_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -3.0]), beta=0.1)
    tensor([1.3863, 1.2744])
    """
    chosen, rejected = beta * chosen_log_ratios, beta * rejected_log_ratios
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def apo_zero_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """APO-zero: the chosen response becomes likelier and the rejected one less likely than in the reference.

        1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7: for chosen responses that are better than the model's own.

    Args:
        chosen_log_ratios, rejected_log_ratios: (B,)
        beta: strength of the pull to the reference.

    Returns:
        (B,) in (0, 2)

    >>> apo_zero_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -3.0]), beta=0.1)
    tensor([1.0000, 0.8757])
    """
    return torch.sigmoid(-beta * chosen_log_ratios) + torch.sigmoid(beta * rejected_log_ratios)


def apo_down_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """APO-down: both responses become less likely than in the reference, the rejected one more so.

        sigmoid(beta * chosen) + 1 - sigmoid(beta * (chosen - rejected))

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8: for chosen responses that are worse than the model's own.
    At the reference itself the chosen response has no gradient.

    Args:
        chosen_log_ratios, rejected_log_ratios: (B,)
        beta: strength of the pull to the reference.

    Returns:
        (B,) in (0, 2)

    >>> apo_down_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -3.0]), beta=0.1)
    tensor([1.0000, 0.9274])
    """
    margin = chosen_log_ratios - rejected_log_ratios
    return torch.sigmoid(beta * chosen_log_ratios) + torch.sigmoid(-beta * margin)


def sppo_hard_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """SPPO with hard wins: a target for either log-ratio, half of 1 / beta above and below the reference.

        (chosen - 1 / (2 * beta))^2 + (rejected + 1 / (2 * beta))^2

    Wu et al. 2024 (arXiv 2405.00675), eq. 4.7, whose eta is 1 / beta, with a win probability of 1 for the chosen
    and 0 for the rejected response. Log-ratios are sums over the tokens, as in the paper.

    Args:
        chosen_log_ratios, rejected_log_ratios: (B,)
        beta: strength of the pull to the reference.

    Returns:
        (B,)

    >>> sppo_hard_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -3.0]), beta=0.1)
    tensor([50., 13.])
    """
    target = 0.5 / beta
    return (chosen_log_ratios - target).square() + (rejected_log_ratios + target).square()
