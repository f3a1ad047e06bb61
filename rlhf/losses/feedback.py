"""Losses that align a policy with single responses that are labelled good or bad: unpaired, in any proportion.

All look at a response's implicit reward, how much likelier the policy finds it than the reference,

    r = beta * (policy_logps - ref_logps)

against a point of reference: KTO an estimate of the KL, BCO the mean reward, APO-zero nothing. Both numbers are of
the whole optimiser step, come in as arguments, and carry no gradient: then a loss is a function of its own row alone.

Shapes: `B` responses. Log-probabilities are of whole responses, in nats, summed over their tokens; `labels` (B,) bool,
True for good.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kto_kl(mismatched_log_ratios: Tensor) -> Tensor:
    """KTO's point of reference: the KL of policy and reference, from responses that were given to other prompts.

        z0 = max(0, mean_j [log pi(y_j | x_i) - log ref(y_j | x_i)]),    j != i

    Ethayarajh et al. 2024 (arXiv 2402.01306), the z0 of eq. 8. A biased estimate of KL(pi || ref), whose samples would
    have to be the policy's own: mismatched pairs cost no sampling. No gradient flows.

    Args:
        mismatched_log_ratios: (B,) of every such pair of the step, or their mean as a scalar.

    Returns:
        A scalar, in nats; never negative.

    >>> kto_kl(torch.tensor([2.0, -1.0])), kto_kl(torch.tensor([-2.0, 1.0]))
    (tensor(0.5000), tensor(0.))
    """
    return mismatched_log_ratios.detach().mean().clamp(min=0)


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: a good response should be worth more than the point of reference, a bad one less; gains saturate.

        good: w_D * (1 - sigmoid(r - beta * z0)),    bad: w_U * (1 - sigmoid(beta * z0 - r))

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8. Where policy and reference agree it is half the weight.

    Args:
        policy_logps, ref_logps: (B,) summed.
        labels: (B,) bool.
        kl: z0 of the step, a scalar in nats (`kto_kl`).
        beta: strength of the pull to the reference.
        desirable_weight, undesirable_weight: w_D and w_U. The paper wants w_D * good rows over w_U * bad rows in
            [1, 4/3] (eq. 9).

    Returns:
        (B,)

    >>> labels = torch.tensor([True, False])
    >>> policy, reference = torch.tensor([-9.0, -9.0]), torch.tensor([-12.0, -12.0])
    >>> kto_loss(policy, reference, labels, torch.tensor(1.0), beta=0.5)
    tensor([0.2689, 0.7311])
    """
    gain = beta * (policy_logps - ref_logps - kl.detach())
    weights = torch.where(labels, desirable_weight, undesirable_weight).to(gain.dtype)
    return weights * torch.sigmoid(torch.where(labels, -gain, gain))


def apo_zero_unpaired_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero on single responses: the likelihood of good ones goes up, that of bad ones down, from the reference's.

        good: w_D * (1 - sigmoid(r)),    bad: w_U * sigmoid(r)

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7, whose two terms are taken apart as in TRL: KTO with z0 = 0,
    for responses that are better and worse than the reference's own.

    Args:
        policy_logps, ref_logps: (B,) summed.
        labels: (B,) bool.
        beta: strength of the pull to the reference.
        desirable_weight, undesirable_weight: w_D and w_U.

    Returns:
        (B,)

    >>> labels = torch.tensor([True, False])
    >>> policy, reference = torch.tensor([-9.0, -9.0]), torch.tensor([-11.0, -11.0])
    >>> apo_zero_unpaired_loss(policy, reference, labels, beta=0.5)
    tensor([0.2689, 0.7311])
    """
    zero = policy_logps.new_zeros(())
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto_loss(policy_logps, ref_logps, labels, zero, beta=beta, **weights)


def bco_loss(policy_logps: Tensor, ref_logps: Tensor, labels: Tensor, delta: Tensor, *, beta: float) -> Tensor:
    """BCO: logistic regression of the labels on the implicit rewards, shifted by their mean.

        good: -log sigmoid(r - delta),    bad: -log sigmoid(delta - r)

    Jung et al. 2024 (arXiv 2404.04656), the binary cross-entropy with reward shift. It is ln 2 where policy and
    reference agree and delta is 0.

    Args:
        policy_logps, ref_logps: (B,) summed.
        labels: (B,) bool.
        delta: the reward shift, a scalar: a running mean of the rewards.
        beta: strength of the pull to the reference.

    Returns:
        (B,)

    >>> labels = torch.tensor([True, False])
    >>> policy, reference = torch.tensor([-9.0, -9.0]), torch.tensor([-12.0, -12.0])
    >>> bco_loss(policy, reference, labels, torch.tensor(0.5), beta=0.5)
    tensor([0.3133, 1.3133])
    """
    shifted = beta * (policy_logps - ref_logps) - delta.detach()
    return -F.logsigmoid(torch.where(labels, shifted, -shifted))
