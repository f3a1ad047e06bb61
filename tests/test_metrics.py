"""Means over a step: summed and counted over micro-batches and devices, reduced once."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric

from rlhf.experiment.metrics import Metrics


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def test_c20_a_mean_is_over_all_rows_not_over_micro_batches(fabric):
    """C20: values 1 2 3 in one micro-batch and 10 in another have mean 4; the mean of means would be 6."""
    metrics = Metrics(fabric)
    metrics.mean("loss", torch.tensor([1.0, 2.0, 3.0]))
    metrics.mean("loss", torch.tensor([10.0]))
    assert metrics.reduce() == {"loss": 4.0}


def test_c20_a_sum_has_its_own_count(fabric):
    """C20: nats 6 over 4 tokens and 2 over 12: 0.5 a token."""
    metrics = Metrics(fabric)
    metrics.add("nll", torch.tensor(6.0), 4)
    metrics.add("nll", 2.0, torch.tensor(12))
    assert metrics.reduce()["nll"] == 0.5


def test_a_device_without_rows_keeps_the_names_and_adds_nothing(fabric):
    """C17, C20: its one stand-in row has weight 0, in the sum and in the count; a mean over nothing is left out."""
    metrics = Metrics(fabric)
    metrics.mean("loss", torch.tensor([3.0]))
    metrics.mean("loss", torch.tensor([100.0]), weight=0.0)
    metrics.mean("other", torch.tensor([7.0]), weight=0.0)
    found = metrics.reduce()
    assert found == {"loss": 3.0}


def test_values_stand_beside_the_means_in_order(fabric):
    metrics = Metrics(fabric)
    metrics.put("rate", 0.5)
    metrics.mean("b", torch.ones(2))
    metrics.mean("a", torch.zeros(2))
    assert list(metrics.reduce().items()) == [("b", 1.0), ("a", 0.0), ("rate", 0.5)]


def test_a_difference_of_means_needs_both(fabric):
    """2 less 5, each over its own rows; not where one is over none."""
    metrics = Metrics(fabric)
    for name, values in (("good", [1.0, 3.0]), ("bad", [5.0]), ("none", [])):
        metrics.mean(name, torch.tensor(values))
        metrics.difference(f"good - {name}", "good", name)
    assert metrics.reduce() == {"good": 2.0, "bad": 5.0, "good - good": 0.0, "good - bad": -3.0}


def test_sums_are_in_double_precision(fabric):
    """A million losses of about 10 keep their sixth digit."""
    metrics, value = Metrics(fabric), torch.tensor(10.0001)
    for _ in range(1000):
        metrics.add("loss", value * 1000, 1000)
    assert metrics.reduce()["loss"] == pytest.approx((value * 1000).item() / 1000, rel=1e-12)


def test_no_gradient_is_held(fabric):
    """A metric must not keep the graph of its micro-batch alive."""
    metrics, x = Metrics(fabric), torch.ones(3, requires_grad=True)
    metrics.mean("loss", x * 2)
    assert not metrics._sums["loss"].requires_grad
