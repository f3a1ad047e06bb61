"""Masked statistics: equal to the plain ones on the real positions, and blind to all others."""

from __future__ import annotations

import pytest
import torch

from rlhf.masked import (
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    mean_var_from,
    moments,
)

SEEDS = range(5)


def ragged(seed: int, *, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (4, 7)):
    """Random values and a random mask, at least two positions of it real."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype) * 3 + 1
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0, :2] = True
    return x, mask


def test_sum_and_mean_by_hand():
    """Rows (1, 2, [4]) and ([8], 16, [32]): sums 3 and 16, means 1.5 and 16; all real ones 19 and 19 / 3."""
    x = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[True, True, False], [False, True, False]])
    assert masked_sum(x, mask, dim=1).tolist() == [3.0, 16.0]
    assert masked_sum(x, mask, dim=0).tolist() == [1.0, 18.0, 0.0]
    assert masked_sum(x, mask).item() == 19.0
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 16.0]
    assert masked_mean(x, mask).item() == pytest.approx(19 / 3)


def test_variance_by_hand():
    """1, 2, 6 have mean 3 and squared deviations 4 + 1 + 9 = 14: 14 / 3, and 14 / 2 unbiased."""
    x = torch.tensor([1.0, 100.0, 2.0, 6.0])
    mask = torch.tensor([True, False, True, True])
    assert masked_var(x, mask).item() == pytest.approx(14 / 3)
    assert masked_var(x, mask, unbiased=True).item() == pytest.approx(7.0)


def test_variance_of_two_values_and_of_one():
    """1 and 3: 1, and 2 unbiased. One value has none, in either sense."""
    x = torch.tensor([1.0, 3.0])
    two, one = torch.tensor([True, True]), torch.tensor([False, True])
    assert [masked_var(x, two).item(), masked_var(x, two, unbiased=True).item()] == [1.0, 2.0]
    assert [masked_var(x, one).item(), masked_var(x, one, unbiased=True).item()] == [0.0, 0.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_to_the_plain_statistics_of_the_real_values(seed):
    """f(x, mask) == f(x[mask])."""
    x, mask = ragged(seed)
    real = x[mask]
    torch.testing.assert_close(masked_sum(x, mask), real.sum())
    torch.testing.assert_close(masked_mean(x, mask), real.mean())
    torch.testing.assert_close(masked_var(x, mask), real.var(correction=0))
    torch.testing.assert_close(masked_var(x, mask, unbiased=True), real.var(correction=1))
    everything = torch.ones_like(real, dtype=torch.bool)
    torch.testing.assert_close(masked_whiten(x, mask)[mask], masked_whiten(real, everything))


def test_mask_broadcasts():
    """One row of mask counts once for every row of x."""
    x, _ = ragged(0)
    row = torch.tensor([True, False, True, True, False, True, False])
    full = row.expand_as(x)
    for function in (masked_sum, masked_mean, masked_var, moments):
        torch.testing.assert_close(function(x, row), function(x, full))


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, masked_whiten])
def test_nothing_real_is_zero_with_a_finite_gradient(function):
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]], requires_grad=True)
    result = function(x, torch.zeros(2, 2, dtype=torch.bool))
    result.sum().backward()
    assert (result == 0).all()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, masked_whiten])
def test_padding_influences_neither_value_nor_gradient(function):
    """G3, W2: NaN and infinity under the mask leave everything as zeros there do."""
    x, mask = ragged(1)
    grads, results = [], []
    for filler in (0.0, float("nan"), float("inf")):
        leaf = x.masked_fill(~mask, filler).requires_grad_()
        result = function(leaf, mask)
        result.square().sum().backward()
        results.append(result.detach())
        grads.append(leaf.grad)
    for result, grad in zip(results[1:], grads[1:], strict=True):
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
        torch.testing.assert_close(grad, grads[0], rtol=0, atol=0)
    assert (grads[0][~mask] == 0).all()


def test_more_padding_and_another_order_change_nothing():
    """W2: doubling the padding changes no statistic; nor does the order of the rows."""
    x, mask = ragged(2)
    wide_x = torch.cat([x, torch.full_like(x, 9.0)], dim=1)
    wide_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    order = torch.tensor([2, 0, 3, 1])
    for function in (masked_sum, masked_mean, masked_var):
        torch.testing.assert_close(function(wide_x, wide_mask), function(x, mask))
        torch.testing.assert_close(function(x[order], mask[order]), function(x, mask))
    torch.testing.assert_close(masked_whiten(wide_x, wide_mask)[:, : x.shape[1]], masked_whiten(x, mask))
    torch.testing.assert_close(masked_whiten(x[order], mask[order]), masked_whiten(x, mask)[order])


@pytest.mark.parametrize(
    "function",
    [
        masked_mean,
        masked_var,
        masked_whiten,
        lambda x, mask: masked_mean(x, mask, dim=1),
        lambda x, mask: masked_var(x, mask, unbiased=True),
        lambda x, mask: masked_whiten(x, mask, shift_mean=False),
    ],
)
def test_gradients(function):
    x, mask = ragged(3, shape=(2, 4))
    assert torch.autograd.gradcheck(lambda leaf: function(leaf, mask), x.requires_grad_())


@pytest.mark.parametrize("seed", SEEDS)
def test_g3_whitening_gives_mean_zero_and_biased_variance_one(seed):
    """G3: over the real positions, and exactly 0 elsewhere."""
    x, mask = ragged(seed)
    whitened = masked_whiten(x, mask)
    assert whitened[mask].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert whitened[mask].var(correction=0).item() == pytest.approx(1.0, abs=1e-7)
    assert (whitened[~mask] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_k4_whitening_may_keep_the_mean(seed):
    """K4: `shift_mean=False` keeps the mean to 1e-6, brings the variance to 1 and leaves pads at 0."""
    x, mask = ragged(seed)
    whitened = masked_whiten(x, mask, shift_mean=False)
    assert whitened[mask].mean().item() == pytest.approx(x[mask].mean().item(), abs=1e-6)
    assert whitened[mask].var(correction=0).item() == pytest.approx(1.0, abs=1e-7)
    assert (whitened[~mask] == 0).all()


def test_whitening_epsilon_by_hand():
    """1 and 3: mean 2, variance 1; with eps 3 the divisor is sqrt(1 + 3) = 2."""
    x, mask = torch.tensor([1.0, 3.0]), torch.tensor([True, True])
    assert masked_whiten(x, mask, eps=3.0).tolist() == [-0.5, 0.5]
    assert masked_whiten(torch.ones(3), torch.ones(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


def test_moments_by_hand():
    """1, 3 and 5: three values, sum 9, squares 1 + 9 + 25 = 35; mean 3, variance 35 / 3 - 9 = 8 / 3."""
    x = torch.tensor([[1.0, 3.0], [float("nan"), 5.0]])
    mask = torch.tensor([[True, True], [False, True]])
    total = moments(x, mask)
    assert total.tolist() == [3.0, 9.0, 35.0]
    mean, var = mean_var_from(total)
    assert (mean.item(), var.item()) == (3.0, pytest.approx(8 / 3))


def test_moments_of_nothing_and_of_one_value():
    nothing, one = torch.zeros(3, dtype=torch.bool), torch.tensor([False, True, False])
    x = torch.tensor([1.0, 5.0, 2.0])
    assert [part.item() for part in mean_var_from(moments(x, nothing))] == [0.0, 0.0]
    assert [part.item() for part in mean_var_from(moments(x, one))] == [5.0, 0.0]


@pytest.mark.parametrize("parts", [[4], [1, 3], [3, 1], [1, 1, 1, 1]])
def test_g4_global_whitening_is_the_same_however_the_rows_are_cut(parts):
    """G4: summed moments of uneven shards (ranks or micro-batches) whiten each as the whole would be."""
    x, mask = ragged(4, dtype=torch.float32)
    mask[3] = False  # a shard without anything real
    shards = list(zip(x.split(parts), mask.split(parts), strict=True))
    scope = mean_var_from(sum(moments(*shard) for shard in shards))
    for shift_mean in (True, False):
        whole = masked_whiten(x, mask, shift_mean=shift_mean)
        pieces = [masked_whiten(*shard, shift_mean=shift_mean, moments=scope) for shard in shards]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-6, atol=1e-6)


def test_moments_keep_a_small_variance_on_a_large_mean():
    """Float32 values about 10,000 with deviation 1: float64 sums give the variance to 1e-6."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 10_000
    mask = torch.ones_like(x, dtype=torch.bool)
    _, var = mean_var_from(moments(x, mask))
    assert var.item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-6)


def test_moments_carry_no_gradient():
    x = torch.ones(3, requires_grad=True)
    assert not moments(x, torch.ones(3, dtype=torch.bool)).requires_grad
