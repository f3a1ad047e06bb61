"""What stands between token log-probabilities and the losses of a pair: other divergences, lengths, weights.

Shapes: `B` responses, `T` token positions. Log-ratios are `log pi(y|x) - log ref(y|x)` of whole responses, in nats.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_EXPONENT = 80.0
"""exp(80) is 5.5e34: a loss that squares nothing stays finite in float32."""


def alpha_scores(log_ratios: Tensor, *, alpha: float) -> Tensor:
    """f'(u) of the alpha-divergence, u = pi / ref: the score in place of the log-ratio.

        (u^(alpha - 1) - 1) / (alpha - 1)

    f-DPO (Wang et al. 2023, arXiv 2309.16240), table 1. `alpha` is TRL's, 1 less the paper's: at 1 the log-ratio
    itself (the reverse KL of DPO), at 0 the forward KL. Exponents are held at 80, where the gradient ends.

    Args:
        log_ratios: log u, of any shape.
        alpha: order of the divergence.

    Returns:
        The scores, shaped like `log_ratios`.

    >>> alpha_scores(torch.tensor([0.0, 2.0]), alpha=0.5)
    tensor([0.0000, 1.2642])
    >>> alpha_scores(torch.tensor([0.0, 2.0]), alpha=1.0)
    tensor([0., 2.])
    """
    if abs(alpha - 1.0) < 1e-6:
        return log_ratios
    exponents = ((alpha - 1.0) * log_ratios).clamp(max=LARGEST_EXPONENT)
    return torch.expm1(exponents) / (alpha - 1.0)


def forward_kl_scores(log_ratios: Tensor) -> Tensor:
    """f'(u) of the forward KL, KL(ref || pi): `1 - 1 / u`, the constant of the alpha-divergence's limit.

    f-DPO (Wang et al. 2023, arXiv 2309.16240), table 1, whose f'(u) = -1 / u has the same margins.

    Args:
        log_ratios: log u, of any shape.

    Returns:
        The scores, shaped like `log_ratios`.

    >>> forward_kl_scores(torch.tensor([0.0, 2.0]))
    tensor([0.0000, 0.8647])
    """
    return alpha_scores(log_ratios, alpha=0.0)


def js_scores(log_ratios: Tensor) -> Tensor:
    """f'(u) of the Jensen-Shannon divergence: `log(2 u / (1 + u))`, at most ln 2.

    f-DPO (Wang et al. 2023, arXiv 2309.16240), table 1.

    Args:
        log_ratios: log u, of any shape.

    Returns:
        The scores, shaped like `log_ratios`.

    >>> js_scores(torch.tensor([0.0, 2.0]))
    tensor([0.0000, 0.5662])
    """
    return math.log(2.0) + F.logsigmoid(log_ratios)


def ld_weights(response_mask: Tensor, other_lengths: Tensor, *, ld_alpha: float) -> Tensor:
    """Weights of the tokens of a response: 1 as far as the other response of its pair goes, `ld_alpha` beyond.

    LD-DPO (Liu et al. 2024, arXiv 2409.06411): what a response says in more words than the other counts less. At
    ld_alpha 1 nothing changes, at 0 both are read up to the shorter one's length.

    Args:
        response_mask: (B, T) True at the response's own tokens.
        other_lengths: (B,) tokens of the other response.
        ld_alpha: in [0, 1].

    Returns:
        (B, T) float; 0 where the mask is False.

    >>> ld_weights(torch.tensor([[False, True, True, True]]), torch.tensor([2]), ld_alpha=0.25)
    tensor([[0.0000, 1.0000, 1.0000, 0.2500]])
    """
    position = response_mask.cumsum(1)
    weights = torch.where(position <= other_lengths.unsqueeze(1), 1.0, ld_alpha)
    return weights.masked_fill(~response_mask, 0.0)


def wpo_weights(token_logps: Tensor, log_collisions: Tensor, response_mask: Tensor) -> Tensor:
    """Weight of a response: how near it is to what the policy would say itself.

        exp(1/|y| * sum_t log [pi(y_t) / sum_v pi(v)^2])

    WPO (Zhou et al. 2024, arXiv 2406.11827), eq. 2 with its "sampled alignment": a response sampled
    from the policy has a weight around 1. The weight of a pair is the product of its two; no gradient goes through.

    Args:
        token_logps: (B, T) log pi(y_t).
        log_collisions: (B, T) log sum_v pi(v)^2 at the same places.
        response_mask: (B, T) True at the response's own tokens.

    Returns:
        (B,) above 0; 1 for a response without tokens.

    >>> token_logps, collisions = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-0.5, -1.5, -1.0]])
    >>> wpo_weights(token_logps, collisions, torch.tensor([[True, True, False]]))
    tensor([0.6065])
    """
    aligned = (token_logps - log_collisions).detach().masked_fill(~response_mask, 0.0)
    return torch.exp(aligned.sum(1) / response_mask.sum(1).clamp(min=1))
