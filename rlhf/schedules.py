"""What changes as training goes on: the learning rate, as a function of the step, and the weight of the KL."""

from __future__ import annotations

import math
from typing import Literal


def lr_multiplier(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    schedule: Literal["constant", "linear", "cosine"],
    min_ratio: float = 0.0,
) -> float:
    """Factor on the peak learning rate for the update that follows `step` finished ones.

    The first `warmup_steps` updates run at 1/W, 2/W, … 1 of the peak, so none is wasted at rate 0. With
    x = (step - W) / (total - W), from 0 just after the warm-up to just under 1 at the last update, the rest runs at

        constant: 1        linear: 1 - x        cosine: (1 + cos(pi x)) / 2   (arXiv 1608.03983, eq. 5)

    squeezed into [min_ratio, 1]. Without warm-up, update u of U (from 1) has the linear rate 1 - (u - 1) / U,
    Stiennon et al.'s annealing. A pure function of the step: a resumed run needs only its step to go on.

    Args:
        step: updates already done, from 0; past `total_steps` the factor stays at its end.
        total_steps: updates of the whole run.
        warmup_steps: updates of the warm-up; 0 for none.
        min_ratio: floor of the decay as a fraction of the peak, in [0, 1]; the warm-up isn't held to it.

    Raises:
        ValueError: for another schedule.

    >>> [lr_multiplier(step, total_steps=4, warmup_steps=0, schedule="linear") for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> [lr_multiplier(step, total_steps=6, warmup_steps=2, schedule="linear") for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    x = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "constant":
        decay = 1.0
    elif schedule == "linear":
        decay = 1.0 - x
    elif schedule == "cosine":
        decay = 0.5 * (1.0 + math.cos(math.pi * x))
    else:
        raise ValueError(f"schedule must be constant, linear or cosine, not {schedule!r}")
    return min_ratio + (1.0 - min_ratio) * decay


class FixedKL:
    """A KL coefficient that stays what it is; the same interface as `AdaptiveKL`.

    >>> controller = FixedKL(0.05)
    >>> controller.update(kl=100.0, n=64)
    >>> controller.value
    0.05
    """

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl: float, n: int) -> None:
        """Take note of nothing."""

    def state_dict(self) -> dict[str, float]:
        """The coefficient, for a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` returned; KeyError if it is missing."""
        self.value = state["value"]


class AdaptiveKL:
    """A KL coefficient that is steered towards a target KL: up when the policy strays, down when it lags.

        error = clip(kl / target - 1, -0.2, 0.2),    value <- value * (1 + error * n / horizon)

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2, whose K_beta per update is n / horizon here, as in its
    code. There: value 0.15, target 6 nats, horizon 10,000 responses.

    Args:
        value: the coefficient to begin with, reward units a nat.
        target: KL to aim at, nats a response.
        horizon: responses over which a clipped error of 0.2 changes the coefficient by about 20 %.

    >>> controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    >>> controller.update(kl=12.0, n=1_000)
    >>> round(controller.value, 6)
    0.153
    """

    def __init__(self, value: float, *, target: float, horizon: float) -> None:
        self.value = value
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Take in one rollout.

        Args:
            kl: mean KL(policy || reference) of a response, summed over its tokens, in nats.
            n: responses in the rollout, over all devices.

        Raises:
            ValueError: when `kl` is not finite, which would spoil the coefficient for good.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the KL of a rollout must be finite, not {kl}")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """The coefficient, for a checkpoint; target and horizon are flags of the run."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` returned; KeyError if it is missing."""
        self.value = state["value"]
