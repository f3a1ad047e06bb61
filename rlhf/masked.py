"""Masked statistics: what a tensor's real positions say, whatever stands at the others.

A mask is a bool tensor that broadcasts to `x`; True means that the position counts. Values at the other
positions have no influence at all: a NaN there reaches neither a result nor a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum of `x` over the real positions of `dim` (of all dimensions when None); 0 where there are none.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    return _real(x, mask).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of `x` over the real positions of `dim`; 0, with a gradient of 0, where there are none.

    >>> x = torch.tensor([[1.0, 3.0, 9.0], [5.0, 7.0, 7.0]])
    >>> mask = torch.tensor([[True, True, False], [False, False, False]])
    >>> masked_mean(x, mask, dim=1)
    tensor([2., 0.])
    """
    count = mask.expand_as(x).sum(dim=dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """Variance of `x` over all real positions, a scalar; 0, with a gradient of 0, where there are none.

    `unbiased` divides by the count less one (Bessel's correction, torch's default) instead of by the count,
    which is what whitening wants.

    >>> masked_var(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(1.)
    """
    deviations = _real(x - masked_mean(x, mask), mask)
    count = mask.expand_as(x).sum()
    divisor = count - 1 if unbiased else count
    return deviations.square().sum() / divisor.clamp(min=1)


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Scale `x` to variance 1 over its real positions and move its mean to 0, or leave the mean where it was.

        (x - mean) / sqrt(var + eps)  [+ mean, when `shift_mean` is False]

    The variance is the population's, as in "The N Implementation Details of RLHF with PPO", general detail 9
    (advantages, mean moved) and its reward whitening (`shift_mean=False`).

    Args:
        x, mask: tensors of one shape, say (B, T).
        moments: the mean and the variance to use, where the scope of the whitening is wider than `x`: those of
            a whole rollout for a micro-batch, or of all devices (`mean_var_from`). None: the ones of `x`.

    Returns:
        A tensor shaped like `x`, 0 at the positions that don't count.

    >>> masked_whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    >>> masked_whiten(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([True, True, False]), shift_mean=False)
    tensor([2., 4., 0.])
    """
    if moments is None:
        mean, var = masked_mean(x, mask), masked_var(x, mask)
    else:
        mean, var = (moment.to(device=x.device, dtype=x.dtype) for moment in moments)
    whitened = _real(x - mean, mask) * torch.rsqrt(var + eps)
    if not shift_mean:
        whitened = whitened + mean
    return _real(whitened, mask)


def widest(device: torch.device) -> torch.dtype:
    """The widest floating type of a device: float64, but float32 on Apple's mps, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the real positions: a (3,) tensor, float64 (`widest`), that adds up over shards.

    Summed over micro-batches or devices, it gives `mean_var_from` the moments of all of them together.
    Float64 keeps the variance of float32 values good to about 1e-14 (mean / deviation)^2. No gradient flows.

    >>> moments(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor([ 2.,  4., 10.], dtype=torch.float64)
    """
    real = _real(x.detach(), mask).to(widest(x.device))
    count = mask.expand_as(x).sum().to(real.dtype)
    return torch.stack([count, real.sum(), real.square().sum()])


def mean_var_from(moments_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance, float64 scalars, from a sum of `moments`; both 0 when nothing counts.

    >>> mask = torch.tensor([True, True])
    >>> one, other = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])
    >>> mean_var_from(moments(one, mask) + moments(other, mask))
    (tensor(4., dtype=torch.float64), tensor(5., dtype=torch.float64))
    """
    count, total, squares = moments_sum.unbind()
    count = count.clamp(min=1)
    mean = total / count
    # Rounding can take the difference of two nearly equal numbers below zero.
    return mean, (squares / count - mean.square()).clamp(min=0)


def _real(x: Tensor, mask: Tensor) -> Tensor:
    # Filled, not multiplied by the mask, and before anything nonlinear: 0 * NaN is NaN, in the gradient too.
    return x.masked_fill(~mask, 0)
