"""Negative log-likelihood."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlhf.losses.supervised import nll_loss


def test_equals_cross_entropy_in_value_and_gradient():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, 3, 1])
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = nll_loss(ours.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1))
    expected = F.cross_entropy(theirs, targets, reduction="none")
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradient():
    logps = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(nll_loss, logps.requires_grad_())
