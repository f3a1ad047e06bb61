"""AOT: the margins as a whole are to lie above the reference's, whichever pair they are of.

Alignment by optimal transport (Melnyk et al. 2024, arXiv 2406.05882) asks for first-order stochastic dominance: of
two sets of numbers, sorted, each number of the one above its counterpart in the other. So a pair is compared with the
number of equal rank, `matched_by_rank`, of another pair. Ranks are of a whole optimiser step, over all devices and
micro-batches, and carry no gradient.

Shapes: `B` pairs at hand, `N` pairs of the step.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def matched_by_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each value, the one of equal rank among the others.

    Args:
        values, others: (N,)

    Returns:
        (N,) `others`, in the order of `values`.

    >>> import torch
    >>> matched_by_rank(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([10.0, 30.0, 20.0]))
    tensor([30., 10., 20.])
    """
    ranks = values.argsort().argsort()
    return others.sort().values[ranks]


def aot_loss(
    policy_margins: Tensor, matched_ref_margins: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """AOT on pairs: the policy's margins above the reference's, rank by rank.

        -(1 - e) log sigmoid(beta * d) - e log sigmoid(-beta * d),    d = policy margin - reference margin of its rank

    Melnyk et al. 2024 (arXiv 2406.05882), the paired case with the logistic loss; e as in conservative DPO. A margin
    is log pi(chosen) - log pi(rejected). With one pair in the step, or ranks that agree, it is DPO.

    Args:
        policy_margins: (B,)
        matched_ref_margins: (B,) the reference's margin of each one's rank in the step.
        beta: strength of the pull to the reference.
        label_smoothing: e, in [0, 0.5).

    Returns:
        (B,)

    >>> import torch
    >>> aot_loss(torch.tensor([5.0]), torch.tensor([0.0]), beta=0.1)
    tensor([0.4741])
    """
    return _logistic(beta * (policy_margins - matched_ref_margins), label_smoothing)


def aot_unpaired_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    matched_rejected: Tensor,
    matched_chosen: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT without pairs: the chosen responses' log-ratios above the rejected ones', rank by rank.

        -(1 - e) log sigmoid(beta * d) - e log sigmoid(-beta * d),    d = chosen - rejected of its rank

    Melnyk et al. 2024 (arXiv 2406.05882), the unpaired case with the logistic loss. Each number of a step stands in
    one such term, whose two sides belong to two pairs. The value of a term is that of its chosen side; its gradient
    reaches each side where that side is at hand, the other one being a constant. Summed over the step, value and
    gradient are those of the whole sort, however the step is cut.

    Args:
        chosen_log_ratios, rejected_log_ratios: (B,)
        matched_rejected, matched_chosen: (B,) the step's rejected log-ratio of the rank of each chosen one, and the
            chosen one of the rank of each rejected one; constants.
        beta: strength of the pull to the reference.
        label_smoothing: e, in [0, 0.5).

    Returns:
        (B,)

    >>> import torch
    >>> chosen, rejected = torch.tensor([2.0]), torch.tensor([-3.0])
    >>> aot_unpaired_loss(chosen, rejected, rejected, chosen, beta=0.1)
    tensor([0.4741])
    """
    chosen_side = _logistic(beta * (chosen_log_ratios - matched_rejected.detach()), label_smoothing)
    rejected_side = _logistic(beta * (matched_chosen.detach() - rejected_log_ratios), label_smoothing)
    return chosen_side + (rejected_side - rejected_side.detach())


def _logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
