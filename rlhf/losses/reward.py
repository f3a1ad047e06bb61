"""Losses of a reward model on pairs of a chosen and a rejected response to one prompt.

All are the ranking loss of `pairwise_reward_loss`; they differ in which scores of a response they compare. Shapes:
`B` pairs, `T` token positions (chosen and rejected may have different `T`). Masks are bool, True at the
response's own tokens, which come first in their row: position 0 is the first token after the prompt. A response
without tokens has the score 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.masked import masked_mean


def pairwise_reward_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margin: Tensor | float | None = None
) -> Tensor:
    """Ranking loss of each pair: how unlikely the human choice is, were the scores Bradley-Terry strengths.

        -log sigmoid(chosen - rejected - margin)

    Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; with a margin, Touvron et al. 2023 (arXiv 2307.09288), eq. 2.
    It is ln 2 at equal scores.

    Args:
        chosen_scores, rejected_scores: of one shape, usually (B,).
        margin: how much better the chosen response ought to score, broadcastable; None for 0.

    Returns:
        The loss of each pair, shaped like the scores.

    >>> pairwise_reward_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 1.0]))
    tensor([0.6931, 0.1269])
    """
    difference = chosen_scores - rejected_scores
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference)


def last_token_reward_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Ranking loss (`pairwise_reward_loss`) of the scores at each response's last token.

    Args:
        chosen_scores, rejected_scores: (B,), each read at the last real token of its response.

    Returns:
        (B,)

    >>> last_token_reward_loss(torch.tensor([1.0]), torch.tensor([1.0]))
    tensor([0.6931])
    """
    return pairwise_reward_loss(chosen_scores, rejected_scores)


def average_reward_loss(
    chosen_scores: Tensor, chosen_mask: Tensor, rejected_scores: Tensor, rejected_mask: Tensor
) -> Tensor:
    """Ranking loss (`pairwise_reward_loss`) of the mean of the scores at all tokens of each response.

    Args:
        chosen_scores, chosen_mask, rejected_scores, rejected_mask: (B, T) scores and their masks.

    Returns:
        (B,)

    >>> mask = torch.tensor([[True, True, False]])
    >>> average_reward_loss(torch.tensor([[1.0, 3.0, 9.0]]), mask, torch.tensor([[0.0, 2.0, 9.0]]), mask)
    tensor([0.3133])
    """
    return pairwise_reward_loss(
        masked_mean(chosen_scores, chosen_mask, dim=1), masked_mean(rejected_scores, rejected_mask, dim=1)
    )


def per_sample_reward_loss(
    chosen_scores: Tensor,
    chosen_mask: Tensor,
    rejected_scores: Tensor,
    rejected_mask: Tensor,
    first_difference: Tensor,
) -> Tensor:
    """Mean ranking loss over the aligned positions of each pair, from where the two responses part.

        mean over t = d … max(n_chosen, n_rejected) - 1 of -log sigmoid(chosen_t - rejected_t)

    as DeepSpeed-Chat's reward model (arXiv 2308.01320). Every token of the longer response has a say, and the
    score becomes an estimate at every token rather than at the last alone. Deviation: past the end of the
    shorter response its last score is carried on; DeepSpeed-Chat reads the scores at its padding tokens.

    Args:
        chosen_scores, chosen_mask, rejected_scores, rejected_mask: (B, T) scores and their masks.
        first_difference: (B,) int64, d, the first position at which the two responses' tokens differ. Where
            one response is the beginning of the other, the length of the shorter.

    Returns:
        (B,); 0 for a pair whose `first_difference` leaves no position.

    >>> chosen, rejected = torch.tensor([[5.0, 2.0, 3.0]]), torch.tensor([[5.0, 1.0]])
    >>> per_sample_reward_loss(chosen, torch.tensor([[True, True, True]]),
    ...                        rejected, torch.tensor([[True, True]]), torch.tensor([1]))
    tensor([0.2201])
    """
    width = max(chosen_mask.shape[1], rejected_mask.shape[1])
    positions = torch.arange(width, device=chosen_mask.device)
    end = torch.maximum(chosen_mask.sum(dim=1), rejected_mask.sum(dim=1))
    counts = (positions >= first_difference.unsqueeze(1)) & (positions < end.unsqueeze(1))
    chosen = _carry_last(chosen_scores, chosen_mask, positions)
    rejected = _carry_last(rejected_scores, rejected_mask, positions)
    return masked_mean(pairwise_reward_loss(chosen, rejected), counts, dim=1)


def _carry_last(scores: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    # The scores at `positions`, and past the last real one that last one again.
    last = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    return scores.masked_fill(~mask, 0).gather(1, torch.minimum(positions.unsqueeze(0), last))
