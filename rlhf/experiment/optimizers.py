"""The optimiser of one role."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.loading import Role


def make_optimizer(role: Role, flags: Any, learning_rate: float) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD over a role's own parameters; weight decay only on matrices that are not embeddings.

    Each group keeps its peak rate as `initial_lr`, which the schedule multiplies. Adam's moments are there at once:
    those of a first update would come where its activations have been, and the next ones need new room.
    """
    embeddings = {id(m.weight) for m in role.modules() if isinstance(m, nn.Embedding)}
    parameters = list({id(p): p for p in role.own_parameters().values()}.values())
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    kept = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"params": group, "weight_decay": decay, "initial_lr": learning_rate}
        for group, decay in ((decayed, flags.weight_decay), (kept, 0.0))
        if group
    ]
    if flags.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate)
    betas = (flags.optimizer_beta1, flags.optimizer_beta2)
    settings = {"lr": learning_rate, "betas": betas, "eps": flags.optimizer_eps}
    if flags.optimizer == "adam_tf":
        return TensorFlowAdam(groups, **settings)
    kind = torch.optim.AdamW if flags.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(groups, **settings, fused=True)
    for p in parameters:
        optimizer.state[p] = _moments(p, p.device)
    return optimizer


def _moments(p: Tensor, device: torch.device | str) -> dict[str, Tensor]:
    """A parameter's state before the first step, as torch's Adam has it; the count of steps on `device`."""
    return {
        "step": torch.zeros((), device=device),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }


class TensorFlowAdam(torch.optim.Optimizer):
    """Adam with epsilon outside the bias correction, as TensorFlow 1 has it and OpenAI's 2019 runs used it.

        p -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)

    Early steps are smaller than PyTorch's, which adds eps to sqrt(v / (1 - beta2^t)) ("The N Implementation
    Details of RLHF with PPO", the section on Adam; Kingma & Ba 2014, the note before section 2.1). Weight decay,
    where set, is decoupled.
    """

    def __init__(self, params, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = _moments(p, "cpu")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters, [p.grad for p in parameters])

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            self.state[p]["step"] += 1
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        scale = torch._foreach_sqrt(second)
        torch._foreach_add_(scale, group["eps"])
        steps = [self.state[p]["step"].item() for p in parameters]
        rates = [-group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t) for t in steps]
        torch._foreach_addcdiv_(parameters, first, scale, rates)
