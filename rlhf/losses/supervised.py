"""The loss of supervised finetuning."""

from __future__ import annotations

from torch import Tensor


def nll_loss(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood of each token, in nats: `-log pi(y_t | x, y_<t)`.

    Args:
        token_logps: log-probabilities of the target tokens, of any shape.

    Returns:
        The loss of each token, of the same shape.

    >>> import torch
    >>> nll_loss(torch.tensor([-0.5, -2.0]))
    tensor([0.5000, 2.0000])
    """
    return -token_logps
