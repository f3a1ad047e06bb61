"""Linear layers that share an input share its cast.

Under autocast every linear layer casts its own input: the projections to queries, keys and values, or gate and up
projection, each make the same copy, keep it for the backward pass, and add up their gradients through it. With the
cast shared there is one copy, and the gradients meet in its dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _SharedCast:
    """The last input that was cast, until the trunk's forward pass is over."""

    def __init__(self) -> None:
        self.forget()

    def forget(self, *_) -> None:
        self.source: Tensor | None = None
        self.version, self.cast = -1, None

    def __call__(self, linear: nn.Linear, given: tuple) -> tuple | None:
        x = given[0] if given else None
        if x is None or x.dtype != torch.float32 or not torch.is_autocast_enabled(x.device.type):
            return None
        if x is not self.source or x._version != self.version:
            self.source, self.version = x, x._version
            self.cast = x.to(torch.get_autocast_dtype(x.device.type))
        return self.cast, *given[1:]


def share_casts(trunk: nn.Module) -> None:
    """Make the plain linear layers of `trunk` share the casts of their inputs under autocast."""
    shared = _SharedCast()
    for module in trunk.modules():
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(shared)
    trunk.register_forward_hook(shared.forget, always_call=True)
