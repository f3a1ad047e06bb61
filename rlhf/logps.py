"""Log-probabilities of chosen tokens under a vocabulary projection, without the tokens x vocabulary matrix.

The projection, the log-softmax and their gradients run over chunks of rows: memory is bounded by one chunk,
whatever the number of tokens. What the backward pass needs again is computed again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of one chunk: 8 M floats are 32 MB, which still sits in a server core's share of cache and pages in fast.
CHUNK_ELEMENTS = 2**23


def chunked_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and on request the entropy of the distribution it was drawn from.

    logits = scale * cap(hidden W^T + b), cap(x) = softcap * tanh(x / softcap); logp = logits[target] - logsumexp.

    Args:
        hidden: (R, H) states that predict the targets.
        weight: (V, H); bias: (V,) or None.
        targets: (R,) token ids.
        scale: factor of the logits: the model's own times 1 / temperature.
        softcap: bound of the logits before `scale`, or None.
        entropy: also return the entropies, in nats, differentiable like the log-probabilities.
        chunk_rows: rows of one chunk; from `CHUNK_ELEMENTS` unless set.

    Returns:
        (R,) float32 log-probabilities (float64 for float64 inputs) and (R,) entropies or None.

    >>> h, w = torch.eye(2), torch.zeros(4, 2)
    >>> chunked_logps(h, w, None, torch.tensor([0, 3]))[0]
    tensor([-1.3863, -1.3863])
    """
    chunk_rows = chunk_rows or max(1, CHUNK_ELEMENTS // weight.shape[0])
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    logps, entropies = _ChunkedLogps.apply(hidden, weight, bias, targets, scale, softcap, entropy, chunk_rows, dtype)
    return logps, entropies if entropy else None


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, entropy, chunk_rows, dtype):
        ctx.scale, ctx.softcap, ctx.entropy, ctx.chunk_rows = scale, softcap, entropy, chunk_rows
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            logps = torch.empty(len(hidden), dtype=wide, device=hidden.device)
            normalisers, entropies = torch.empty_like(logps), torch.zeros_like(logps)
            for rows in _chunks(len(hidden), chunk_rows):
                logits, _ = _logits(hidden[rows], weight, bias, scale, softcap, wide)
                normalisers[rows] = torch.logsumexp(logits, -1)
                logps[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - normalisers[rows]
                if entropy:
                    probabilities = (logits - normalisers[rows, None]).exp_()
                    entropies[rows] = normalisers[rows] - (probabilities * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, grad_logps, grad_entropies):
        hidden, weight, bias, targets, normalisers, entropies = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = normalisers.dtype
        grad_hidden = torch.empty_like(hidden, dtype=ctx.dtypes[0]) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None and need_bias else None
        for rows in _chunks(len(hidden), ctx.chunk_rows):
            logits, capped = _logits(hidden[rows], weight, bias, ctx.scale, ctx.softcap, wide)
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
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if need_hidden:
                grad_hidden[rows] = (grad @ weight).to(ctx.dtypes[0])
            if need_weight:
                grad_weight += grad.T @ hidden[rows]
        return (
            grad_hidden,
            grad_weight.to(ctx.dtypes[1]) if need_weight else None,
            grad_bias.to(ctx.dtypes[2]) if grad_bias is not None else None,
            *[None] * 6,
        )


def _chunks(num_rows: int, chunk_rows: int) -> list[slice]:
    return [slice(i, min(i + chunk_rows, num_rows)) for i in range(0, num_rows, chunk_rows)]


def _logits(hidden, weight, bias, scale, softcap, wide) -> tuple[Tensor, Tensor | None]:
    """Logits of one chunk in the wide dtype, and the capped values where there is a cap."""
    logits, capped = F.linear(hidden, weight, bias).to(wide), None
    if softcap is not None:
        capped = logits.div_(softcap).tanh_().mul_(softcap)
        logits = capped.clone() if scale == 1.0 else capped
    if scale != 1.0:
        logits = logits * scale
    return logits, capped
