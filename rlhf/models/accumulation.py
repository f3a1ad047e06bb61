"""What the micro-batches of one optimiser step share: casts of weights that do not change, and gradients' memory.

Every micro-batch casts all weights to the dtype of its products, casts their gradients back and adds them up: at some
hundred tokens that is as much memory traffic as the products' own. Between two updates the casts stay the same, and a
gradient can be added to the sum as the product leaves it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlhf.models import fused

Made = TypeVar("Made")


class _Scopes(threading.local):
    made: dict | None = None
    adds = False


_scopes = _Scopes()


@contextmanager
def weights_unchanged(*, enabled: bool = True) -> Iterator[None]:
    """Inside, in this thread, `made_of` serves again what it made of weights that did not change.

    It is for the time between two updates. Changes that torch counts (of optimisers, `copy_`, `load_state_dict`) are
    noticed, those through `.data` are not.
    """
    before, _scopes.made = _scopes.made, {} if enabled else None
    try:
        yield
    finally:
        _scopes.made = before


def made_of(weights: Sequence[Tensor], what: object, make: Callable[[], Made]) -> Made:
    """`make()`, or inside `weights_unchanged` what it returned before for the same `what` and weights as they are.

    Args:
        weights: at least one; what is made depends on them and on `what` alone.
        what: hashable.
    """
    if _scopes.made is None or not all(isinstance(weight, nn.Parameter) for weight in weights):
        return make()
    key = what, *map(id, weights)
    versions = [(weight._version, weight.data_ptr()) for weight in weights]
    kept = _scopes.made.get(key)
    if kept is None or kept[0] != versions:
        # The weights stay with it, so that no other tensor comes to have their ids.
        kept = _scopes.made[key] = versions, weights, make()
    return kept[2]


@contextmanager
def gradients_added(*, enabled: bool = True) -> Iterator[None]:
    """Inside, in this thread, `added` and `added_to_rows` put gradients where parameters have them.

    It is for `loss.backward()` alone, in one process: `torch.autograd.grad` would find them missing, and so would the
    reduction over processes, which takes them as autograd adds them up.
    """
    before, _scopes.adds = _scopes.adds, enabled
    try:
        yield
    finally:
        _scopes.adds = before


def added(parameter: Tensor, grad: Tensor) -> bool:
    """Add a gradient in bfloat16 to that of a float32 parameter; False where that is left to autograd.

    So it takes one pass in place of a cast and a sum. An autograd function returns None for what was added.
    """
    if not _takes(parameter) or not fused.usable(parameter.dtype, grad.dtype, grad.device):
        return False
    if parameter.grad is None:
        parameter.grad = grad.to(parameter.dtype)
    else:
        fused.add_to(parameter.grad, grad)
    return True


def added_to_rows(parameter: Tensor, rows: Tensor, grad: Tensor) -> bool:
    """`added` for gradients (N, H) of rows (N,) of a (V, H) parameter that has a gradient already, in any dtype."""
    if not _takes(parameter) or parameter.grad is None:
        return False
    places, which = torch.unique(rows, return_inverse=True)
    parameter.grad[places] += torch.ops.aten.embedding_dense_backward(grad, which, len(places), -1, False)
    return True


def _takes(parameter: Tensor) -> bool:
    """Whether a gradient may be added here: nothing else is to see it on its way."""
    if not _scopes.adds or torch.is_grad_enabled():
        return False
    if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad:
        return False
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return False
    total = parameter.grad
    return total is None or (type(total) is Tensor and total.dtype == parameter.dtype and total.is_contiguous())
