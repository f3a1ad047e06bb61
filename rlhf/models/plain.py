"""What lies between the matrix products of a decoder layer, as torch operations: any device, any dtypes.

`rlhf/models/fused.py` has the same functions in one pass over memory each; `operations` picks between the two.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.models import fused
from rlhf.models.fused import Turn
from rlhf.models.products import laid_out


def operations(x: Tensor, weight: Tensor, products: torch.dtype) -> ModuleType:
    """The module whose functions serve this residual stream, these weights of norms, and products of this dtype."""
    return fused if x.dtype == weight.dtype and fused.usable(x.dtype, products, x.device) else sys.modules[__name__]


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root-mean-square norm of the last axis, rounded as transformers rounds it."""
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x, weight.shape, None, eps)


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y, (T, H)."""
    return x + y


def added_and_normed(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, (T, H), and its norm."""
    total = x + y
    return total, normed(total, weight, eps)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients (.., H) and (H,) of a norm's input and weight, to the first of which `residual` is added.

    Args:
        grad: of the norm's output; x: its input, whose dtype the results have.
    """
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt_()
    states, grad = x * scale, grad.to(x.dtype)
    product = grad * states
    grad_weight = product.flatten(0, -2).sum(0)
    mean = (product @ weight).unsqueeze(-1) / x.shape[-1]
    grad_x = (grad * weight).addcmul_(states, mean, value=-1).mul_(scale)
    return grad_x if residual is None else grad_x.add_(residual), grad_weight


def gated(gate_up: Tensor) -> Tensor:
    """(T, F) silu(gate) * up of (T, 2 F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gated_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """(T, 2 F) gradient of `gated`'s input from that of its output."""
    gate, up = gate_up.chunk(2, -1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, -1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return out


def turned(x: Tensor, turn: Turn) -> Tensor:
    """(.., D) heads rotated to their positions, in the dtype of the angles."""
    cos, sin = turn
    return x * cos + x.roll(cos.shape[-1] // 2, -1) * sin


def turned_back(grad: Tensor, turn: Turn) -> Tensor:
    """The gradient of `turned`'s input: its swap of halves is its own inverse."""
    cos, sin = turn
    return (grad * sin).roll(sin.shape[-1] // 2, -1).addcmul_(grad, cos)


def rotated(packed: Tensor, turn: Turn, kv_heads: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned to their positions, heads first.

    Args:
        packed: (T, heads + 2 kv_heads, D): queries, keys and values.
        scaling: factor of the queries.

    Returns:
        (kv_heads, T, heads / kv_heads, D), and (kv_heads, T, D) twice, as `products.laid_out` gives them.
    """
    both, value = packed.split([packed.shape[1] - kv_heads, kv_heads], 1)
    both = turned(both, turn).to(packed.dtype)
    query, key = both.split([both.shape[1] - kv_heads, kv_heads], 1)
    return laid_out(query, key, value, scaling)


def rotated_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, turn: Turn, scaling: float) -> Tensor:
    """(T, heads + 2 kv_heads, D) gradient of `rotated`'s input, in the dtype of grad_q."""
    out = packed_together(grad_q, grad_k, grad_v, scaling)
    both = out[:, : -len(grad_k)]
    both.copy_(turned_back(both, turn))
    return out


def packed_together(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, scaling: float) -> Tensor:
    """(T, heads + 2 kv_heads, D): what `laid_out` took apart, the queries scaled again, in the dtype of grad_q."""
    kv_heads, rows, group, size = grad_q.shape
    out = grad_q.new_empty(rows, (group + 2) * kv_heads, size)
    query, key, value = out.split([group * kv_heads, kv_heads, kv_heads], 1)
    torch.mul(grad_q.transpose(0, 1), scaling, out=query.unflatten(1, (kv_heads, -1)))
    key.copy_(grad_k.transpose(0, 1))
    value.copy_(grad_v.transpose(0, 1))
    return out
