"""Learning-rate schedules and KL coefficients."""

from __future__ import annotations

import json

import pytest

from rlhf.schedules import AdaptiveKL, FixedKL, lr_multiplier


def curve(schedule: str, *, total: int, warmup: int = 0, min_ratio: float = 0.0) -> list[float]:
    """The factor of every update of a run."""
    return [
        lr_multiplier(step, total_steps=total, warmup_steps=warmup, schedule=schedule, min_ratio=min_ratio)
        for step in range(total)
    ]


def test_l8_linear_decay_over_all_updates():
    """L8: update u of U (from 1) runs at 1 - (u - 1) / U of the peak."""
    for total in (1, 7, 1000):
        expected = [1 - (u - 1) / total for u in range(1, total + 1)]
        assert curve("linear", total=total) == pytest.approx(expected, abs=1e-12)
        assert lr_multiplier(total, total_steps=total, warmup_steps=0, schedule="linear") == 0.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("total", [200, 5000])
@pytest.mark.parametrize("warmup", [0, 20])
def test_r4_the_last_rate_is_under_one_percent(schedule, total, warmup):
    """R4: annealed to 0; the last update runs at less than 1 % of the peak, and the next would at 0."""
    factors = curve(schedule, total=total, warmup=warmup)
    assert 0 < factors[-1] < 0.01
    assert max(factors) == 1.0
    after = lr_multiplier(total, total_steps=total, warmup_steps=warmup, schedule=schedule)
    assert after == pytest.approx(0.0, abs=1e-12)


def test_cosine_by_hand():
    """Four updates: (1 + cos(0, 45, 90, 135 degrees)) / 2."""
    assert curve("cosine", total=4) == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466], abs=1e-6)


def test_warmup_by_hand():
    """Four warm-up updates of seven: 1/4, 2/4, 3/4, 1, then the whole decay of the other three."""
    assert curve("linear", total=7, warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 2 / 3, 1 / 3])
    assert curve("constant", total=7, warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 5), (10, 10), (10, 3)])
def test_no_update_is_wasted_at_rate_zero(schedule, total, warmup):
    """Every factor is in (0, 1], for a warm-up as long as the run or longer too."""
    assert all(0 < factor <= 1 for factor in curve(schedule, total=total, warmup=warmup))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_floor_squeezes_the_decay(schedule):
    """min_ratio m: every decaying factor f becomes m + (1 - m) f; past the end it stays at m."""
    plain, floored = curve(schedule, total=9), curve(schedule, total=9, min_ratio=0.1)
    assert floored == pytest.approx([0.1 + 0.9 * factor for factor in plain])
    beyond = lr_multiplier(50, total_steps=9, warmup_steps=0, schedule=schedule, min_ratio=0.1)
    assert beyond == pytest.approx(0.1)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="constant, linear or cosine"):
        lr_multiplier(0, total_steps=1, warmup_steps=0, schedule="square")


def test_k3_three_updates_by_hand():
    """K3: value 0.15, target 6, horizon 10,000, 500 responses a rollout (n / horizon = 0.05).

    KL 12: error 1 clipped to 0.2, times 1.01: 0.1515. KL 6.6: error 0.1, times 1.005: 0.1522575.
    KL 0: error -1 clipped to -0.2, times 0.99: 0.150734925.
    """
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    for kl, expected in [(12.0, 0.1515), (6.6, 0.1522575), (0.0, 0.150734925)]:
        controller.update(kl, n=500)
        assert controller.value == pytest.approx(expected, rel=1e-12)


def test_k3_on_target_nothing_moves():
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    controller.update(6.0, n=500)
    assert controller.value == 0.15


@pytest.mark.parametrize("kl", [float("nan"), float("inf")])
def test_k3_a_kl_that_is_not_finite_is_refused(kl):
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    with pytest.raises(ValueError, match="finite"):
        controller.update(kl, n=500)
    assert controller.value == 0.15


def test_k3_the_coefficient_survives_a_checkpoint():
    """K3: through JSON and back, for both controllers."""
    adaptive = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    adaptive.update(12.0, n=500)
    for fresh in (AdaptiveKL(0.3, target=6.0, horizon=10_000), FixedKL(0.3)):
        fresh.load_state_dict(json.loads(json.dumps(adaptive.state_dict())))
        assert fresh.value == adaptive.value
        with pytest.raises(KeyError):
            fresh.load_state_dict({})


def test_k3_fixed_stays():
    """K3: 0.05 whatever the KL."""
    controller = FixedKL(0.05)
    controller.update(1000.0, n=500)
    assert controller.value == 0.05
    assert controller.state_dict() == {"value": 0.05}
