"""Estimates of KL(policy || reference) from tokens that the policy sampled: k1, k2 and k3.

J. Schulman, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html, 2020). With x sampled from the policy
and r(x) = ref(x) / policy(x), so that log r = ref_logps - logps:

| | estimate | bias | sign |
|---|---|---|---|
| k1 | -log r | none | either; half its samples may be negative |
| k2 | (log r)^2 / 2 | small near r = 1 | never negative |
| k3 | r - 1 - log r | none | never negative |

The means, not the single values, estimate the KL; k1 is what PPO subtracts from the reward. Positions that don't
count need equal log-probabilities in both, whatever they are: then all three are 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per token `logps - ref_logps`, in nats: unbiased, of either sign.

    Args:
        logps, ref_logps: log-probabilities of the same sampled tokens, of one shape.

    >>> kl_k1(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    tensor([ 0.5000, -1.0000])
    """
    return logps - ref_logps


def kl_k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per token `(logps - ref_logps)^2 / 2`, in nats: biased, low variance, never negative.

    Its gradient in `logps` is, in expectation, the gradient of the KL itself. Between new and old policy it is
    the `approxkl` that PPO logs.

    >>> kl_k2(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    tensor([0.1250, 0.5000])
    """
    return 0.5 * (logps - ref_logps).square()


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per token `exp(d) - 1 - d` with `d = ref_logps - logps`, in nats: unbiased, never negative.

    Overflows to infinity in float32 where the reference is more than e^88 times likelier.

    >>> kl_k3(torch.tensor([0.0, -2.0]), torch.tensor([0.0, -1.0]))
    tensor([0.0000, 0.7183])
    """
    d = ref_logps - logps
    # exp(d) - 1 loses all digits of a small d. expm1 keeps them, but may still round to just below d.
    return (torch.expm1(d) - d).clamp(min=0)


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
"""What `--kl_estimator` names."""
