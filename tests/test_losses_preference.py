"""Losses of pairs: worked by hand, at their limits, and their properties. tests/test_pairwise.py has TRL's."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from rlhf.losses.anchored import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_pair_loss, sppo_hard_loss
from rlhf.losses.log_ratios import alpha_scores, forward_kl_scores, js_scores, ld_weights, wpo_weights
from rlhf.losses.preference import (
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
)
from rlhf.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from rlhf.losses.transport import aot_loss, aot_unpaired_loss, matched_by_rank

OF_MARGINS = [
    sigmoid_loss,
    ipo_loss,
    hinge_loss,
    partial(robust_loss, label_smoothing=0.1),
    partial(exo_pair_loss, label_smoothing=0.001),
    partial(discopop_loss, tau=0.05),
    cpo_loss,
    partial(simpo_loss, gamma=0.5),
]
ANCHORED = [bco_pair_loss, nca_pair_loss, apo_zero_loss, apo_down_loss, sppo_hard_loss]
LOSSES = OF_MARGINS + ANCHORED


def name_of(loss) -> str:
    return getattr(loss, "func", loss).__name__


each = partial(pytest.mark.parametrize, "loss", ids=name_of)

# Log-ratios of the chosen and the rejected response; the margin is 5.
BY_HAND = torch.tensor([2.0]), torch.tensor([-3.0])


def random_scores(seed: int = 0, num: int = 2) -> list[torch.Tensor]:
    """Chosen and rejected, (5,) each."""
    generator = torch.Generator().manual_seed(seed)
    return list((torch.randn(num, 5, generator=generator, dtype=torch.float64) * 3).unbind())


# ------------------------------------------------------------------------------------------------------ by hand


def test_sigmoid_by_hand():
    """Margin 5 at beta 0.1: -log sigmoid(0.5) = log(1 + e^-0.5) = 0.474077."""
    assert sigmoid_loss(*BY_HAND, beta=0.1).item() == pytest.approx(0.474077, abs=1e-6)


def test_label_smoothing_by_hand():
    """Of 0.474077 nine tenths, and of -log sigmoid(-0.5) = 0.974077 one tenth: 0.524077."""
    assert sigmoid_loss(*BY_HAND, beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.524077, abs=1e-6)


def test_robust_by_hand():
    """(0.9 * 0.474077 - 0.1 * 0.974077) / 0.8 = 0.411577."""
    assert robust_loss(*BY_HAND, beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.411577, abs=1e-6)


def test_ipo_by_hand():
    """Margin 5 at beta 0.25: (5 - 2)^2 = 9."""
    assert ipo_loss(*BY_HAND, beta=0.25).item() == 9.0


def test_hinge_by_hand():
    """Margin 5: 1 - 0.1 * 5 = 0.5; settled at beta 0.2 and beyond; -5 the other way round: 1.5."""
    assert hinge_loss(*BY_HAND, beta=0.1).item() == 0.5
    assert hinge_loss(*BY_HAND, beta=0.25).item() == 0.0
    assert hinge_loss(*BY_HAND[::-1], beta=0.1).item() == 1.5


def test_exo_by_hand():
    """q = sigmoid(0.5) = 0.622459 against 0.9: 0.622459 ln(0.622459 / 0.9) + 0.377541 ln(0.377541 / 0.1) = 0.27205;
    and 0 where q is 0.9, at a margin of ln 9 / beta."""
    found = exo_pair_loss(*BY_HAND, beta=0.1, label_smoothing=0.1)
    assert found.item() == pytest.approx(0.622459 * math.log(0.622459 / 0.9) + 0.377541 * math.log(3.77541), abs=1e-5)
    settled = torch.tensor([10 * math.log(9.0)])
    assert exo_pair_loss(settled, torch.zeros(1), beta=0.1, label_smoothing=0.1).item() == pytest.approx(0, abs=1e-6)


def test_discopop_by_hand():
    """z = 0.5 at tau 0.5: m = sigmoid(1) = 0.731059; 0.268941 * 0.474077 + 0.731059 * e^-0.5 = 0.570908."""
    assert discopop_loss(*BY_HAND, beta=0.1, tau=0.5).item() == pytest.approx(0.570908, abs=1e-6)


def test_bco_by_hand():
    """-log sigmoid(0.2) - log sigmoid(0.3) = 0.598139 + 0.554355 = 1.152494."""
    assert bco_pair_loss(*BY_HAND, beta=0.1).item() == pytest.approx(1.152494, abs=1e-6)


def test_nca_by_hand():
    """0.598139 + (0.798139 + 0.554355) / 2 = 1.274386."""
    assert nca_pair_loss(*BY_HAND, beta=0.1).item() == pytest.approx(1.274386, abs=1e-6)


def test_apo_by_hand():
    """sigmoid(-0.2) + sigmoid(-0.3) = 0.450166 + 0.425557; down: sigmoid(0.2) + sigmoid(-0.5) = 0.927375."""
    assert apo_zero_loss(*BY_HAND, beta=0.1).item() == pytest.approx(0.875723, abs=1e-6)
    assert apo_down_loss(*BY_HAND, beta=0.1).item() == pytest.approx(0.549834 + 0.377541, abs=1e-6)


def test_sppo_by_hand():
    """Targets +-5: (2 - 5)^2 + (-3 + 5)^2 = 13."""
    assert sppo_hard_loss(*BY_HAND, beta=0.1).item() == 13.0


def test_simpo_by_hand():
    """Means -1 and -2, beta 2, gamma 1.5: -log sigmoid(0.5) = 0.474077."""
    found = simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, gamma=1.5)
    assert found.item() == pytest.approx(0.474077, abs=1e-6)


def test_orpo_by_hand():
    """p = 0.8 and 0.5: odds 4 and 1, -log sigmoid(log 4) = -log 0.8; p = 1e-4 and 0.9: odds of about 1e-4 and 9."""
    chosen, rejected = torch.tensor([0.8, 1e-4]).log(), torch.tensor([0.5, 0.9]).log()
    odds = 1e-4 / 0.9999 / 9
    expected = [-math.log(0.8), -math.log(odds / (1 + odds))]
    assert orpo_loss(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-6)


def test_aot_by_hand():
    """Policy margins 3, 1 and reference margins 0, 2 by sorted rank: 3 meets 2, 1 meets 0."""
    margins, ref = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0])
    matched = matched_by_rank(margins, ref)
    assert matched.tolist() == [2.0, 0.0]
    expected = -math.log(1 / (1 + math.exp(-0.1)))
    assert aot_loss(margins, matched, beta=0.1).tolist() == pytest.approx([expected, expected])


def test_aot_unpaired_by_hand():
    """Chosen 3, 1 and rejected 0, 2: 3 meets 2, 1 meets 0; each of the four has its own side's gradient."""
    chosen = torch.tensor([3.0, 1.0], requires_grad=True)
    rejected = torch.tensor([0.0, 2.0], requires_grad=True)
    partners = matched_by_rank(chosen, rejected), matched_by_rank(rejected, chosen)
    loss = aot_unpaired_loss(chosen, rejected, *partners, beta=1.0)
    low = math.log(1 + math.exp(-1))
    assert loss.tolist() == pytest.approx([low, low])
    loss.sum().backward()
    slope = 1 / (1 + math.e)
    assert chosen.grad.tolist() == pytest.approx([-slope, -slope])
    assert rejected.grad.tolist() == pytest.approx([slope, slope])


def test_divergences_by_hand():
    """u = 4: forward KL 1 - 1/4; JS ln(8/5); alpha 0.5: (1/2 - 1) / -0.5 = 1; alpha 3: (16 - 1) / 2."""
    ratio = torch.tensor([4.0]).log()
    assert forward_kl_scores(ratio).item() == pytest.approx(0.75)
    assert js_scores(ratio).item() == pytest.approx(math.log(1.6))
    assert alpha_scores(ratio, alpha=0.5).item() == pytest.approx(1.0)
    assert alpha_scores(ratio, alpha=3.0).item() == pytest.approx(7.5)


def test_ld_weights_by_hand():
    """Three tokens after a prompt of one, the other response has two; and a shorter one is whole."""
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    assert ld_weights(mask, torch.tensor([2, 3]), ld_alpha=0.25).tolist() == [[0, 1, 1, 0.25], [0, 1, 0, 0]]


def test_wpo_weights_by_hand():
    """Two tokens of log p -1 and -2 among collisions of -0.5 and -1.5: exp(-1/2); no pad, no empty row."""
    logps, collisions = torch.tensor([[-1.0, -2.0, -7.0]] * 2), torch.tensor([[-0.5, -1.5, -1.0]] * 2)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert wpo_weights(logps.requires_grad_(), collisions, mask).tolist() == pytest.approx([math.exp(-0.5), 1.0])
    assert not wpo_weights(logps, collisions, mask).requires_grad


def test_implicit_rewards_by_hand():
    """0.1 * 2 and 0.1 * -3."""
    assert implicit_rewards(torch.tensor([-10.0]), torch.tensor([-12.0]), beta=0.1).item() == pytest.approx(0.2)
    assert implicit_rewards(torch.tensor([-14.0]), torch.tensor([-11.0]), beta=0.1).item() == pytest.approx(-0.3)


# ------------------------------------------------------------------------------------------ limits and properties


def test_c5_policy_at_the_reference():
    """C5, C14: ln 2 of sigmoid with any smoothing, robust and CPO; IPO (1 / 2 beta)^2; hinge, APO 1; BCO, NCA 2 ln 2;
    DiscoPOP (ln 2 + 1) / 2; SPPO 2 (1 / 2 beta)^2; rewards 0."""
    zeros = torch.zeros(3)
    at = {
        partial(sigmoid_loss, label_smoothing=0.3): math.log(2),
        partial(robust_loss, label_smoothing=0.3): math.log(2),
        partial(discopop_loss, tau=0.05): (math.log(2) + 1) / 2,
        partial(aot_loss, label_smoothing=0.3): math.log(2),
        sigmoid_loss: math.log(2),
        cpo_loss: math.log(2),
        ipo_loss: 25.0,
        hinge_loss: 1.0,
        bco_pair_loss: 2 * math.log(2),
        nca_pair_loss: 2 * math.log(2),
        apo_zero_loss: 1.0,
        apo_down_loss: 1.0,
        sppo_hard_loss: 50.0,
    }
    for loss, expected in at.items():
        torch.testing.assert_close(loss(zeros, zeros, beta=0.1), torch.full((3,), expected))
    torch.testing.assert_close(orpo_loss(zeros - 2, zeros - 2), torch.full((3,), math.log(2)))
    assert (implicit_rewards(zeros - 20, zeros - 20, beta=0.1) == 0).all()


def test_without_wrong_labels_robust_is_dpo():
    scores = random_scores()
    robust, dpo = robust_loss(*scores, beta=0.2, label_smoothing=0.0), sigmoid_loss(*scores, beta=0.2)
    torch.testing.assert_close(robust, dpo)


def test_robust_is_right_on_average():
    """Labels turned round with probability e: the mean of the two losses is DPO's on the right label."""
    chosen, rejected = random_scores()
    robust = partial(robust_loss, beta=0.2, label_smoothing=0.3)
    average = 0.7 * robust(chosen, rejected) + 0.3 * robust(rejected, chosen)
    torch.testing.assert_close(average, sigmoid_loss(chosen, rejected, beta=0.2))


def test_swapping_chosen_and_rejected_negates_the_margin():
    """-log sigmoid(x) + log sigmoid(-x) = -x; and at smoothing 1/2 the sides are alike."""
    chosen, rejected = random_scores()
    margin = 0.2 * (chosen - rejected)
    torch.testing.assert_close(
        sigmoid_loss(chosen, rejected, beta=0.2) - sigmoid_loss(rejected, chosen, beta=0.2), -margin
    )
    torch.testing.assert_close(
        sigmoid_loss(chosen, rejected, beta=0.2, label_smoothing=0.5),
        sigmoid_loss(rejected, chosen, beta=0.2, label_smoothing=0.5),
    )


@each([*OF_MARGINS, bco_pair_loss, apo_zero_loss, sppo_hard_loss])
def test_c31_descent_raises_the_chosen_and_lowers_the_rejected(loss):
    """C31: near the reference, minus the gradient is up for the chosen, down for the rejected, by one amount (DiscoPOP:
    beyond its hump)."""
    chosen = torch.full((2,), 3.0 if "discopop" in name_of(loss) else 0.0, requires_grad=True)
    rejected = torch.zeros(2, requires_grad=True)
    loss(chosen, rejected, beta=0.1).sum().backward()
    assert (chosen.grad < 0).all()
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_nca_and_apo_down_at_the_reference():
    """NCA moves either by a quarter of beta; APO-down leaves the chosen alone."""
    for loss, expected in ((nca_pair_loss, (-0.025, 0.025)), (apo_down_loss, (0.0, 0.025))):
        chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        loss(chosen, rejected, beta=0.1).sum().backward()
        assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx(expected)


def test_far_margins_stay_finite():
    """Margins of +-20,000 at beta 0.1: 0 and 2,000, with gradients 0 and -beta."""
    chosen = torch.tensor([20_000.0, -20_000.0], requires_grad=True)
    loss = sigmoid_loss(chosen, torch.zeros(2), beta=0.1)
    loss.sum().backward()
    assert loss.tolist() == [0.0, pytest.approx(2000.0)]
    assert chosen.grad.tolist() == pytest.approx([0.0, -0.1])


@each(LOSSES)
def test_far_scores_give_numbers(loss):
    """Log-ratios of +-1,000 either way: no NaN in value or gradient."""
    chosen = torch.tensor([1000.0, -1000.0, 1000.0, -1000.0], requires_grad=True)
    rejected = torch.tensor([1000.0, -1000.0, -1000.0, 1000.0], requires_grad=True)
    value = loss(chosen, rejected, beta=0.5)
    value.sum().backward()
    assert torch.stack([value, chosen.grad, rejected.grad]).isfinite().all()


def test_certain_responses_have_finite_odds():
    """ORPO at log p = 0 on either side, and at -1,000: finite, with finite gradients."""
    chosen = torch.tensor([0.0, -1.0, -1000.0], requires_grad=True)
    rejected = torch.tensor([-1.0, 0.0, -0.1], requires_grad=True)
    loss = orpo_loss(chosen, rejected)
    loss.sum().backward()
    assert torch.stack([loss, chosen.grad, rejected.grad]).isfinite().all()


def test_divergences_meet_where_they_should():
    """alpha 1: the log-ratio; alpha 0: forward KL; all 0 with slope 1 at u = 1; finite at a log-ratio of -1,000."""
    ratios = random_scores()[0]
    assert alpha_scores(ratios, alpha=1.0) is ratios
    torch.testing.assert_close(alpha_scores(ratios, alpha=0.0), forward_kl_scores(ratios))
    torch.testing.assert_close(alpha_scores(ratios, alpha=1.00001), ratios, rtol=1e-3, atol=1e-3)
    for scores in (forward_kl_scores, js_scores, partial(alpha_scores, alpha=0.5)):
        one = torch.zeros(1, requires_grad=True)
        scores(one).backward()
        slope = 0.5 if scores is js_scores else 1.0
        assert (scores(one).item(), one.grad.item()) == (pytest.approx(0.0, abs=1e-7), slope)
        assert scores(torch.tensor([-1000.0])).isfinite().all()
        assert (scores(ratios.sort().values).diff() > 0).all()


def test_aot_is_dpo_where_ranks_agree():
    """Margins that rise with the reference's: each pair meets itself. Else the total is what sorting gives."""
    ratios, ref = random_scores()
    ranked = ref.sort().values + torch.arange(5)
    matched = matched_by_rank(ranked, ref.sort().values)
    torch.testing.assert_close(aot_loss(ranked, matched, beta=0.3), sigmoid_loss(ranked, ref.sort().values, beta=0.3))
    by_rank = aot_loss(ratios, matched_by_rank(ratios, ref), beta=0.3).sum()
    by_sort = sigmoid_loss(ratios.sort().values, ref.sort().values, beta=0.3).sum()
    torch.testing.assert_close(by_rank, by_sort)


@each(LOSSES)
def test_pairs_are_independent(loss):
    scores = random_scores()
    whole = loss(*scores, beta=0.1)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss(*(x[order] for x in scores), beta=0.1), whole[order])
    torch.testing.assert_close(torch.cat([loss(*(x[i : i + 1] for x in scores), beta=0.1) for i in range(5)]), whole)


@each([*LOSSES, partial(sigmoid_loss, label_smoothing=0.2), partial(simpo_loss, gamma=0.5, label_smoothing=0.2)])
def test_gradients(loss):
    scores = [x.requires_grad_() for x in random_scores()]
    assert torch.autograd.gradcheck(lambda *leaves: loss(*leaves, beta=0.1), scores)


def test_gradients_of_the_others():
    """The odds, AOT with a fixed partner, and the divergences."""
    below = [(-x.abs() - 0.1).requires_grad_() for x in random_scores()]
    assert torch.autograd.gradcheck(orpo_loss, below)
    leaf, partner = random_scores()
    leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: aot_loss(x, partner, beta=0.1, label_smoothing=0.1), leaf)
    for scores in (forward_kl_scores, js_scores, partial(alpha_scores, alpha=0.3)):
        assert torch.autograd.gradcheck(scores, leaf)
