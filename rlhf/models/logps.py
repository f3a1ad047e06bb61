"""Log-probabilities of chosen tokens under a vocabulary projection, without the tokens x vocabulary matrix.

The projection, the log-softmax and their gradients run over chunks of rows, so that memory is bounded whatever the
number of tokens: by the chunk in hand, and by the products that are kept for the backward pass, of the first chunk, or
of the first two where both take no more than one in float32. Those of the others are computed again.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.models import fused
from rlhf.models.accumulation import added, made_of

CHUNK_BYTES = 2**27
"""Products of one chunk: large enough that the weight's gradient is seldom made in more than one piece."""
PART_ELEMENTS = 2**20
"""Logits that are exponentiated and summed at once: 4 MB of floats, which stay in a server core's share of cache."""


def chunked_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    collision: bool = False,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and on request a number of the distribution that it was drawn from.

    logits = scale * cap(hidden W^T + b), cap(x) = softcap * tanh(x / softcap); logp = logits[target] - logsumexp.

    Args:
        hidden: (R, H) states that predict the targets.
        weight: (V, H); bias: (V,) or None.
        targets: (R,) token ids.
        scale: factor of the logits: the model's own times 1 / temperature.
        softcap: bound of the logits before `scale`, or None.
        entropy: also return the entropies, in nats, differentiable like the log-probabilities.
        collision: instead, also return log sum_v p(v)^2, without a gradient.
        chunk_rows: rows of one chunk; from `CHUNK_BYTES` unless set.

    Returns:
        (R,) float32 log-probabilities (float64 for float64 inputs), and (R,) entropies or log collisions, or None.

    Raises:
        ValueError: both `entropy` and `collision`.

    >>> h, w = torch.eye(2), torch.zeros(4, 2)
    >>> chunked_logps(h, w, None, torch.tensor([0, 3]))[0]
    tensor([-1.3863, -1.3863])
    """
    if entropy and collision:
        raise ValueError("entropy and collision are not computed together; ask for one of them")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunk_rows = chunk_rows or max(1, CHUNK_BYTES // (weight.shape[0] * dtype.itemsize))
    logps, second = _ChunkedLogps.apply(
        hidden, weight, bias, targets, scale, softcap, entropy, collision, chunk_rows, dtype
    )
    return logps, second if entropy or collision else None


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, entropy, collision, chunk_rows, dtype):
        ctx.scale, ctx.softcap, ctx.entropy, ctx.chunk_rows = scale, softcap, entropy, chunk_rows
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.kept, ctx.parameter = [], weight
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight = hidden.to(dtype), made_of([weight], dtype, partial(weight.to, dtype))
            bias = None if bias is None else bias.to(dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            logps, normalisers, entropies = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(3))
            for chunk in _slices(0, len(hidden), chunk_rows):
                products = F.linear(hidden[chunk], weight, bias)
                if _in_kernels(products, softcap, collision):
                    numbers = fused.logps(products, targets[chunk], scale)
                    logps[chunk], normalisers[chunk], entropies[chunk] = numbers
                else:
                    for rows, part in _parts(chunk, products):
                        logits, _ = _logits(part, scale, softcap, wide)
                        numbers = _numbers_of(logits, targets[rows], entropy, collision)
                        logps[rows], normalisers[rows], entropies[rows] = numbers
                if len(ctx.kept) < max(1, 4 // dtype.itemsize) and any(ctx.needs_input_grad):
                    ctx.kept.append(products)
                del products  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, grad_logps, grad_entropies):
        hidden, weight, bias, targets, normalisers, entropies = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if not ctx.entropy:
            grad_entropies = torch.zeros_like(grad_logps)
        wide = normalisers.dtype
        grad_hidden = torch.empty_like(hidden, dtype=ctx.dtypes[0]) if need_hidden else None
        grad_weight = grad_bias = None
        for chunk in _slices(0, len(hidden), ctx.chunk_rows):
            # What was kept is written over below, so it serves once.
            products = ctx.kept.pop(0) if ctx.kept else F.linear(hidden[chunk], weight, bias)
            if _in_kernels(products, ctx.softcap) and not need_bias:
                numbers = normalisers[chunk], entropies[chunk], grad_logps[chunk], grad_entropies[chunk]
                fused.logps_backward(products, targets[chunk], ctx.scale, *numbers)
            else:
                for rows, part in _parts(chunk, products):
                    logits, capped = _logits(part, ctx.scale, ctx.softcap, wide)
                    log_probabilities = logits.sub_(normalisers[rows, None])
                    if ctx.entropy:
                        probabilities = log_probabilities.exp()
                        # dH/dlogit = -p (log p + H)
                        factor = (log_probabilities + entropies[rows, None]).mul_(-grad_entropies[rows, None])
                        grad = probabilities.mul_(factor.sub_(grad_logps[rows, None]))
                    else:
                        grad = log_probabilities.exp_().mul_(-grad_logps[rows, None])
                    grad.scatter_add_(-1, targets[rows, None], grad_logps[rows, None])
                    if ctx.scale != 1.0:
                        grad.mul_(ctx.scale)
                    if capped is not None:
                        grad.mul_(1 - (capped / ctx.softcap).square_())
                    if need_bias:
                        grad_bias = _plus(grad_bias, grad.sum(0))
                    part.copy_(grad)
            if need_hidden:
                grad_hidden[chunk] = (products @ weight).to(ctx.dtypes[0])
            if need_weight:
                part = products.T @ hidden[chunk]
                if not added(ctx.parameter, part):
                    grad_weight = _plus(grad_weight, part.to(wide))
            del products
        if need_weight and len(hidden) == 0:
            grad_weight = torch.zeros_like(weight)
        return (
            grad_hidden,
            grad_weight.to(ctx.dtypes[1]) if grad_weight is not None else None,
            grad_bias.to(ctx.dtypes[2]) if grad_bias is not None else None,
            *[None] * 7,
        )


def _in_kernels(products: Tensor, softcap: float | None, collision: bool = False) -> bool:
    """Whether log-probabilities and their gradient come from a kernel's one pass over the products."""
    return softcap is None and not collision and fused.usable(torch.float32, products.dtype, products.device)


def _numbers_of(logits: Tensor, targets: Tensor, entropy: bool, collision: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(R,) log-probabilities, normalisers, and entropies, log collisions or zeros; the logits are written over."""
    chosen, top = logits.gather(-1, targets[:, None]).squeeze(-1), logits.amax(-1, keepdim=True)
    if entropy:
        exps = (logits - top).exp_()
        total = exps.sum(-1)
        normalisers = total.log() + top.squeeze(-1)
        return chosen - normalisers, normalisers, normalisers - exps.mul_(logits).sum(-1) / total
    total = logits.sub_(top).exp_().sum(-1)
    normalisers = total.log() + top.squeeze(-1)
    second = logits.square_().sum(-1).log_() - 2 * total.log() if collision else torch.zeros_like(total)
    return chosen - normalisers, normalisers, second


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _parts(chunk: slice, products: Tensor) -> list[tuple[slice, Tensor]]:
    """The chunk's products a few rows at a time, each with its place: what is done to them then stays in cache."""
    size = max(1, PART_ELEMENTS // products.shape[1])
    return [
        (slice(chunk.start + at.start, chunk.start + at.stop), products[at]) for at in _slices(0, len(products), size)
    ]


def _logits(products: Tensor, scale: float, softcap: float | None, wide: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Logits in the wide dtype (never the products' own memory), and the capped values where there is a cap."""
    logits, capped = products.to(wide, copy=True), None
    if softcap is not None:
        capped = logits.div_(softcap).tanh_().mul_(softcap)
        logits = capped.clone()
    if scale != 1.0:
        logits.mul_(scale)
    return logits, capped


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
