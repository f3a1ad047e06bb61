"""The reward model's report, on numbers worked by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhf.reports import accuracy_of, auc, interval_of, paired_p_value, preference_report, wilson_interval


def test_auc_by_hand():
    """Good 3, 1, 1 and bad 2, 1: of six pairs the first good wins two, the others tie one each and lose one: 3 / 6.

    Turning the labels round gives the rest to 1; equal scores 1/2; one label alone nothing.
    """
    scores, labels = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0]), torch.tensor([True, False, True, True, False])
    assert auc(scores, labels) == 3 / 6
    assert auc(scores, ~labels) == 3 / 6
    assert auc(torch.tensor([3.0, 2.0, 2.0]), torch.tensor([True, False, True])) == 3 / 4
    assert auc(torch.tensor([3.0, 2.0, 2.0]), torch.tensor([False, True, False])) == 1 / 4
    assert auc(torch.ones(5), labels) == 1 / 2
    assert auc(scores, torch.ones(5, dtype=torch.bool)) is None


def report_of(chosen, rejected, *, chosen_lens=None, rejected_lens=None, prompt_lens=None, batch_size=2) -> dict:
    n = len(chosen)
    given = {"chosen_lens": chosen_lens, "rejected_lens": rejected_lens, "prompt_lens": prompt_lens}
    return preference_report(
        torch.tensor(chosen),
        torch.tensor(rejected),
        **{name: torch.tensor(lens if lens is not None else [1] * n) for name, lens in given.items()},
        batch_size=batch_size,
    )


def random_report(n: int = 101, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, 30, (3, n), generator=generator)
    return preference_report(
        torch.randn(n, generator=generator) + 0.5,
        torch.randn(n, generator=generator),
        chosen_lens=lens[0],
        rejected_lens=lens[1],
        prompt_lens=lens[2],
        batch_size=8,
    )


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # The first by the formula: (0.5 + 3.8416 / 20 +- 1.96 sqrt(0.025 + 3.8416 / 400)) / 1.38416.
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_c30_wilson_interval_by_hand(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_covers_the_truth_as_often_as_it_says():
    """Over 2,000 seeded draws of 40 pairs at p = 0.7, about 95 % of the intervals hold 0.7."""
    generator = torch.Generator().manual_seed(0)
    successes = (torch.rand(2000, 40, generator=generator) < 0.7).sum(1).tolist()
    covered = sum(low <= 0.7 <= high for low, high in (wilson_interval(s, 40) for s in successes))
    assert 0.93 <= covered / 2000 <= 0.975


def test_accuracy_by_hand():
    """Three of four; an empty slice has n = 0 and no accuracy."""
    found = accuracy_of(torch.tensor([True, True, False, True]))
    assert (found["n"], found["accuracy"]) == (4, 0.75)
    assert accuracy_of(torch.empty(0, dtype=torch.bool)) == {"n": 0, "accuracy": None, "interval": [0.0, 1.0]}


def test_interval_of_a_mean_by_hand():
    """1 and 3: mean 2, variance 2, error 1.96 x sqrt(2 / 2)."""
    found = interval_of(torch.tensor([1.0, 3.0]))
    assert (found["n"], found["mean"]) == (2, 2.0)
    assert found["interval"] == pytest.approx([0.04, 3.96])


def test_paired_p_value_by_hand():
    """Mean 1, deviation 2 over 4: 1 / (2 / 2) = 1 deviation of the mean, two-sided 0.3173."""
    differences = torch.tensor([-1.0, 3.0, 1.0 - math.sqrt(2), 1.0 + math.sqrt(2)])
    assert differences.double().std().item() == pytest.approx(2.0, rel=1e-6)
    assert paired_p_value(differences) == pytest.approx(0.3173, abs=1e-4)
    assert paired_p_value(-differences) == pytest.approx(0.3173, abs=1e-4)


def test_r8_every_group_of_slices_sums_to_the_total():
    """R8: each slice has n, accuracy and interval; each group of them holds every pair once."""
    report = random_report()
    total = report["overall"]
    assert set(report["slices"]) == {"batch", "longer_response", "prompt_length", "confidence"}
    for slices in report["slices"].values():
        assert sum(part["n"] for part in slices.values()) == total["n"] == 101
        right = sum(part["n"] * part["accuracy"] for part in slices.values() if part["n"])
        assert right == pytest.approx(total["n"] * total["accuracy"])
        for part in slices.values():
            low, high = part["interval"]
            assert part["n"] == 0 or 0 <= low <= part["accuracy"] <= high <= 1
    assert len(report["slices"]["batch"]) == 13


def test_r8_slices_by_hand():
    """Two batches of two; the longer response is chosen, rejected, equal, chosen; the third pair is wrong."""
    report = report_of(
        [1.0, 2.0, 0.0, 5.0], [0.0, 1.0, 1.0, 1.0],
        chosen_lens=[9, 1, 4, 5], rejected_lens=[1, 9, 4, 4], prompt_lens=[1, 2, 3, 4],
    )  # fmt: skip
    slices = report["slices"]
    accuracies = {g: {k: (v["n"], v["accuracy"]) for k, v in part.items()} for g, part in slices.items()}
    assert accuracies["batch"] == {"0": (2, 1.0), "1": (2, 0.5)}
    assert accuracies["longer_response"] == {"chosen": (2, 1.0), "rejected": (1, 1.0), "equal": (1, 0.0)}
    assert accuracies["prompt_length"] == {f"quartile_{q}": (1, float(q != 3)) for q in (1, 2, 3, 4)}
    assert accuracies["confidence"]["quartile_4"] == (1, 1.0)


def test_a_tie_is_not_right():
    assert report_of([1.0, 2.0], [1.0, 1.0])["overall"]["accuracy"] == 0.5


def test_r9_margins_by_hand():
    """R9, C32: margins 1, 1, -1, 3: mean 1, deviation sqrt(2); each stands in one bin of the histogram."""
    margin = report_of([1.0, 2.0, 0.0, 3.0], [0.0, 1.0, 1.0, 0.0])["margin"]
    assert (margin["mean"], margin["std"]) == pytest.approx((1.0, math.sqrt(2)))
    edges, counts = margin["histogram"]["edges"], margin["histogram"]["counts"]
    assert (edges[0], edges[-1], len(edges)) == (-1.0, 3.0, len(counts) + 1)
    assert sum(counts) == 4
    assert (counts[0], counts[10], counts[-1]) == (1, 2, 1)


def test_r9_calibration_by_hand():
    """R9: margins +-ln 3 predict 3/4; right 3 times of 4, the model is calibrated; right once of 4, it is 1/2 off."""
    third = math.log(3)
    good = report_of([third, third, third, 0.0], [0.0, 0.0, 0.0, third])["calibration"]
    assert good["expected_error"] == pytest.approx(0, abs=1e-6)
    (row,) = good["bins"]
    assert (row["n"], row["predicted"], row["accuracy"]) == pytest.approx((4, 0.75, 0.75), abs=1e-6)
    bad = report_of([third, 0.0, 0.0, 0.0], [0.0, third, third, third])["calibration"]
    assert bad["expected_error"] == pytest.approx(0.5, abs=1e-6)
    ninth = math.log(9)  # predicts 9/10; in turn 1/4 above and 1/10 below what is right
    both = report_of([third, third, ninth, 0.0, 0.0], [0.0, 0.0, 0.0, third, third])["calibration"]
    assert both["expected_error"] == pytest.approx(0.8 * 0.25 + 0.2 * 0.1, abs=1e-6)


def test_r9_length_correlation_by_hand():
    """R9: scores that are twice the length, plus 1: 1; minus it: -1; one length for all: none."""
    lens = {"chosen_lens": [1, 4], "rejected_lens": [2, 8]}
    assert report_of([3.0, 9.0], [5.0, 17.0], **lens)["length_correlation"] == pytest.approx(1.0)
    assert report_of([-3.0, -9.0], [-5.0, -17.0], **lens)["length_correlation"] == pytest.approx(-1.0)
    assert report_of([3.0, 9.0], [5.0, 17.0])["length_correlation"] is None


def test_r9_best_of_two_by_hand():
    """R9: scores 1 -1 and -1 1 have deviation 1; the better of two is at 1, a random one at 0."""
    report = report_of([1.0, -1.0], [-1.0, 1.0])
    assert report["best_of_2_gain"] == pytest.approx(1.0)
    assert report["best_of_2_preferred"] == 0.5


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_pairs_give_a_whole_report(n):
    """Also where every score is the same; and it is plain JSON without NaN."""
    for scores in ([0.0] * n, [1.0] * n):
        report = report_of(scores, [0.0] * n)
        json.dumps(report, allow_nan=False)
        assert report["overall"]["n"] == n
