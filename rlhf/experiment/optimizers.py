"""The optimiser of one role."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def make_optimizer(module: nn.Module, flags: Any, learning_rate: float) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD over the trainable parameters; weight decay only on matrices that are not embeddings.

    Each group keeps its peak rate as `initial_lr`, which the schedule multiplies.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    kept = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"params": group, "weight_decay": decay, "initial_lr": learning_rate}
        for group, decay in ((decayed, flags.weight_decay), (kept, 0.0))
        if group
    ]
    if flags.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate)
    kind = torch.optim.AdamW if flags.optimizer == "adamw" else torch.optim.Adam
    betas = (flags.optimizer_beta1, flags.optimizer_beta2)
    return kind(groups, lr=learning_rate, betas=betas, eps=flags.optimizer_eps, fused=True)
