"""The three KL estimates against exact values on a vocabulary small enough to sum over."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.kl import kl_k1, kl_k2, kl_k3

VOCABULARY = 16
ESTIMATES = [kl_k1, kl_k2, kl_k3]


def two_policies(seed: int, *, scale: float = 1.0):
    """Log-probabilities (V,) of a policy and a reference, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, VOCABULARY, generator=generator, dtype=torch.float64) * scale
    return logits.log_softmax(dim=-1).unbind()


def test_by_hand():
    """log-probabilities ln 0.5 and ln 0.25: k1 = ln 2, k2 = (ln 2)^2 / 2, k3 = 0.25 / 0.5 - 1 + ln 2."""
    logps, ref_logps = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl_k1(logps, ref_logps).item() == pytest.approx(math.log(2))
    assert kl_k2(logps, ref_logps).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(logps, ref_logps).item() == pytest.approx(math.log(2) - 0.5)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_c35_zero_where_policy_and_reference_agree(estimate):
    """C35, P13: exactly 0 for equal log-probabilities, so at the first update and at padding."""
    logps = torch.tensor([0.0, -1e-6, -3.7, -50.0, 1.0])
    assert (estimate(logps, logps.clone()) == 0).all()


@pytest.mark.parametrize("estimate", [kl_k1, kl_k3])
@pytest.mark.parametrize("seed", range(3))
def test_k6_c35_means_match_the_exact_kl(estimate, seed):
    """K6, C35: the mean over sampled tokens is within 3 standard errors of KL(policy || reference)."""
    policy, reference = two_policies(seed)
    exact = (policy.exp() * (policy - reference)).sum().item()
    reverse = (reference.exp() * (reference - policy)).sum().item()
    tokens = torch.multinomial(policy.exp(), 100_000, replacement=True, generator=torch.Generator().manual_seed(seed))
    estimates = estimate(policy[tokens], reference[tokens])
    error = (estimates.std() / len(tokens) ** 0.5).item()
    assert estimates.mean().item() == pytest.approx(exact, abs=3 * error)
    # Else the bound would be too wide to tell one direction of the KL from the other.
    assert abs(reverse - exact) > 6 * error


@pytest.mark.parametrize("estimate", [kl_k1, kl_k3])
def test_expectation_is_the_exact_kl(estimate):
    """Summed over the vocabulary with the policy's weights, both are the KL to rounding."""
    policy, reference = two_policies(3, scale=2.0)
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * estimate(policy, reference)).sum(), exact)


def test_gradient_of_k2_is_in_expectation_that_of_the_kl():
    """sum_x p(x) grad k2(x), with p(x) held fixed as for samples, equals grad KL(p || ref)."""
    _, reference = two_policies(4)
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits.requires_grad_()
    policy = logits.log_softmax(dim=-1)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    (grad,) = torch.autograd.grad((policy.detach().exp() * kl_k2(policy, reference)).sum(), logits)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("estimate", [kl_k2, kl_k3])
def test_k6_never_negative(estimate):
    """K6, C35: for differences of either sign from 1e-12 to 30, in float32 and float64."""
    size = torch.logspace(-12, math.log10(30), 20_000, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        d = torch.cat([-size, size]).to(dtype)
        for base in (0.0, -3.0):
            assert (estimate(d + base, torch.full_like(d, base)) >= 0).all()


def test_k3_is_exact_for_small_differences():
    """For d = 1e-4, exp(d) - 1 - d is d^2 / 2 + d^3 / 6 = 5.0002e-9; exp(d) - 1 alone errs by 6e-8."""
    value = kl_k3(torch.tensor([-1e-4]), torch.tensor([0.0])).item()
    assert value == pytest.approx(5.0002e-9, rel=1e-2)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_gradients(estimate):
    policy, reference = two_policies(5)
    assert torch.autograd.gradcheck(estimate, (policy.requires_grad_(), reference.requires_grad_()))
