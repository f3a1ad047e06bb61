"""What to know of a reward model besides one accuracy: intervals, slices, calibration, length, best-of-n."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), 95 % by default; (0, 1) for n = 0.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def auc(scores: Tensor, labels: Tensor) -> float | None:
    """Area under the ROC curve: how often a good row scores above a bad one, ties counting half.

    Args:
        scores: (N,); labels: (N,) bool, True for good.

    Returns:
        None where all labels are the same.

    >>> auc(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([True, True, False]))
    0.75
    """
    good, bad = scores[labels], scores[~labels].sort().values
    if not len(good) or not len(bad):
        return None
    below, not_above = (torch.searchsorted(bad, good, right=right).double().sum().item() for right in (False, True))
    return (below + not_above) / (2 * len(good) * len(bad))


def accuracy_of(correct: Tensor) -> dict[str, Any]:
    """`n`, `accuracy` and its 95 % `interval` of a (N,) bool tensor."""
    n, right = correct.numel(), int(correct.sum())
    low, high = wilson_interval(right, n)
    return {"n": n, "accuracy": right / n if n else None, "interval": [low, high]}


def interval_of(values: Tensor, z: float = 1.96, *, low: float = -math.inf, high: float = math.inf) -> dict[str, Any]:
    """`n`, `mean` and the 95 % `interval` of the mean of independent (N,) values (normal approximation).

    `low` and `high` bound the values, and so the interval (0 and 1 for a rate).

    >>> interval_of(torch.tensor([1.0, 3.0]))["mean"]
    2.0
    """
    n = values.numel()
    mean = values.double().mean().item()
    error = z * (values.double().var() / n).sqrt().item() if n > 1 else math.inf
    return {"n": n, "mean": mean, "interval": [max(low, mean - error), min(high, mean + error)]}


def paired_p_value(differences: Tensor) -> float:
    """Two-sided p-value of a mean difference of 0, from paired (N,) differences (normal approximation).

    >>> paired_p_value(torch.zeros(4)), round(paired_p_value(torch.tensor([1.0, 1.2, 0.8, 1.1])), 6)
    (1.0, 0.0)
    """
    n = differences.numel()
    mean, deviation = differences.double().mean().item(), differences.double().std().item() if n > 1 else 0.0
    if deviation == 0.0:
        return 1.0 if mean == 0.0 or n < 2 else 0.0
    return math.erfc(abs(mean) / (deviation / math.sqrt(n)) / math.sqrt(2))


def preference_report(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    chosen_lens: Tensor,
    rejected_lens: Tensor,
    prompt_lens: Tensor,
    batch_size: int,
) -> dict[str, Any]:
    """Held-out quality of a reward model on N pairs (Zheng et al. 2023, arXiv 2307.04964, section 4.4: accuracy
    alone does not tell whether a reward model serves PPO).

    Args:
        chosen_scores, rejected_scores: (N,).
        chosen_lens, rejected_lens, prompt_lens: (N,) tokens.
        batch_size: pairs of one evaluation batch; accuracy is given for each.

    Returns:
        `overall` accuracy with n and interval; the same in `slices` (each group of slices sums to N): by batch, by
        which response is longer, by quartile of the prompt's length, by quartile of the absolute margin (the
        model's confidence); `margin` mean, deviation and histogram; `calibration` (mean predicted probability
        against accuracy in ten bins, and their weighted gap); `length_correlation` of score and response length;
        `best_of_2_gain`: how much higher, in deviations of the scores, the better-scored of two responses scores
        than a random one; `best_of_2_preferred`: how often it is the chosen one.
    """
    chosen, rejected = chosen_scores.double(), rejected_scores.double()
    margins = chosen - rejected
    correct = margins > 0
    n = len(margins)
    scores, lens = torch.cat([chosen, rejected]), torch.cat([chosen_lens, rejected_lens]).double()
    longer = torch.sign(chosen_lens - rejected_lens)
    deviation = scores.std(correction=0).clamp(min=1e-12)
    gain = (torch.maximum(chosen, rejected) - (chosen + rejected) / 2).mean() / deviation
    return {
        "overall": accuracy_of(correct),
        "slices": {
            "batch": {
                str(i): accuracy_of(correct[start : start + batch_size])
                for i, start in enumerate(range(0, n, batch_size))
            },
            "longer_response": {
                name: accuracy_of(correct[longer == sign])
                for name, sign in (("chosen", 1), ("rejected", -1), ("equal", 0))
            },
            "prompt_length": _by_quartile(correct, prompt_lens.double()),
            "confidence": _by_quartile(correct, margins.abs()),
        },
        "margin": {
            "mean": margins.mean().item(),
            "std": margins.std(correction=0).item(),
            "histogram": _histogram(margins),
        },
        "calibration": _calibration(margins),
        "length_correlation": _correlation(scores, lens),
        "best_of_2_gain": gain.item(),
        "best_of_2_preferred": correct.double().mean().item(),
    }


def _by_quartile(correct: Tensor, values: Tensor) -> dict[str, Any]:
    edges = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    quartile = torch.bucketize(values, edges)
    return {f"quartile_{q + 1}": accuracy_of(correct[quartile == q]) for q in range(4)}


def _histogram(x: Tensor, bins: int = 20) -> dict[str, list[float]]:
    low, high = x.min().item(), x.max().item()
    high = high if high > low else low + 1.0
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    counts = torch.histc(x, bins, low, high)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _calibration(margins: Tensor, bins: int = 10) -> dict[str, Any]:
    """Of the model's favourite in each pair: predicted probability sigmoid(|margin|) against how often it is right."""
    confidence, right = torch.sigmoid(margins.abs()), (margins > 0).double()
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    rows, gap = [], 0.0
    for b in range(bins):
        inside = bin_of == b
        if inside.any():
            predicted, actual = confidence[inside].mean().item(), right[inside].mean().item()
            rows.append({"n": int(inside.sum()), "predicted": predicted, "accuracy": actual})
            gap += abs(predicted - actual) * inside.double().mean().item()
    return {"bins": rows, "expected_error": gap}


def _correlation(x: Tensor, y: Tensor) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    scale = (x.norm() * y.norm()).item()
    return (x @ y).item() / scale if scale > 0 else None
