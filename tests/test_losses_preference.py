"""DPO, IPO and hinge: worked by hand, at their limits, and against TRL."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlhf.losses.preference import hinge_loss, implicit_rewards, ipo_loss, sigmoid_loss

LOSSES = [sigmoid_loss, ipo_loss, hinge_loss]

# Log-ratios: chosen -10 + 12 = 2, rejected -14 + 11 = -3; margin 5.
BY_HAND = tuple(torch.tensor([value]) for value in (-10.0, -14.0, -12.0, -11.0))


def random_logps(seed: int = 0) -> list[torch.Tensor]:
    """policy_chosen, policy_rejected, ref_chosen, ref_rejected, (5,) each."""
    generator = torch.Generator().manual_seed(seed)
    return list((torch.randn(4, 5, generator=generator, dtype=torch.float64) * 3 - 20).unbind())


def test_sigmoid_by_hand():
    """Margin 5 at beta 0.1: -log sigmoid(0.5) = log(1 + e^-0.5) = 0.474077."""
    assert sigmoid_loss(*BY_HAND, beta=0.1).item() == pytest.approx(0.474077, abs=1e-6)


def test_label_smoothing_by_hand():
    """Of 0.474077 nine tenths, and of -log sigmoid(-0.5) = 0.974077 one tenth: 0.524077."""
    assert sigmoid_loss(*BY_HAND, beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.524077, abs=1e-6)


def test_ipo_by_hand():
    """Margin 5 at beta 0.25: (5 - 2)^2 = 9."""
    assert ipo_loss(*BY_HAND, beta=0.25).item() == 9.0


def test_hinge_by_hand():
    """Margin 5: 1 - 0.1 * 5 = 0.5; settled at beta 0.2 and beyond; -5 the other way round: 1.5."""
    chosen, rejected, ref_chosen, ref_rejected = BY_HAND
    assert hinge_loss(*BY_HAND, beta=0.1).item() == 0.5
    assert hinge_loss(*BY_HAND, beta=0.25).item() == 0.0
    assert hinge_loss(rejected, chosen, ref_rejected, ref_chosen, beta=0.1).item() == 1.5


def test_implicit_rewards_by_hand():
    """0.1 * 2 and 0.1 * -3."""
    chosen, rejected, ref_chosen, ref_rejected = BY_HAND
    assert implicit_rewards(chosen, ref_chosen, beta=0.1).item() == pytest.approx(0.2)
    assert implicit_rewards(rejected, ref_rejected, beta=0.1).item() == pytest.approx(-0.3)


def test_c5_policy_at_the_reference():
    """C5, C14: sigmoid ln 2 with any smoothing, IPO (1 / 2 beta)^2, hinge 1; rewards 0."""
    chosen, rejected, *_ = random_logps()
    logps = chosen, rejected, chosen, rejected
    ones = torch.ones_like(chosen)
    for smoothing in (0.0, 0.3):
        loss = sigmoid_loss(*logps, beta=0.1, label_smoothing=smoothing)
        torch.testing.assert_close(loss, math.log(2) * ones)
    torch.testing.assert_close(ipo_loss(*logps, beta=0.1), 25 * ones)
    torch.testing.assert_close(hinge_loss(*logps, beta=0.1), ones)
    assert (implicit_rewards(chosen, chosen, beta=0.1) == 0).all()


def test_swapping_chosen_and_rejected_negates_the_margin():
    """-log sigmoid(x) + log sigmoid(-x) = -x; and at smoothing 1/2 the sides are alike."""
    chosen, rejected, ref_chosen, ref_rejected = random_logps()
    logps, swapped = (chosen, rejected, ref_chosen, ref_rejected), (rejected, chosen, ref_rejected, ref_chosen)
    margin = implicit_rewards(chosen, ref_chosen, beta=0.2) - implicit_rewards(rejected, ref_rejected, beta=0.2)
    torch.testing.assert_close(sigmoid_loss(*logps, beta=0.2) - sigmoid_loss(*swapped, beta=0.2), -margin)
    torch.testing.assert_close(
        sigmoid_loss(*logps, beta=0.2, label_smoothing=0.5),
        sigmoid_loss(*swapped, beta=0.2, label_smoothing=0.5),
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_c31_descent_raises_the_chosen_and_lowers_the_rejected(loss):
    """C31: at the reference, minus the gradient is up for the chosen, down for the rejected, by one amount."""
    chosen = torch.tensor([-20.0, -5.0], requires_grad=True)
    rejected = torch.tensor([-10.0, -30.0], requires_grad=True)
    loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1).sum().backward()
    assert (chosen.grad < 0).all()
    torch.testing.assert_close(rejected.grad, -chosen.grad, rtol=0, atol=0)


def test_far_margins_stay_finite():
    """Margins of +-20,000 at beta 0.1: 0 and 2,000, with gradients 0 and -beta."""
    chosen = torch.tensor([0.0, -20_000.0], requires_grad=True)
    rejected = torch.tensor([-20_000.0, 0.0])
    loss = sigmoid_loss(chosen, rejected, torch.zeros(2), torch.zeros(2), beta=0.1)
    loss.sum().backward()
    assert loss.tolist() == [0.0, pytest.approx(2000.0)]
    assert chosen.grad.tolist() == pytest.approx([0.0, -0.1])


@pytest.mark.parametrize("loss", LOSSES)
def test_pairs_are_independent(loss):
    logps = random_logps()
    whole = loss(*logps, beta=0.1)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss(*(x[order] for x in logps), beta=0.1), whole[order])
    torch.testing.assert_close(torch.cat([loss(*(x[i : i + 1] for x in logps), beta=0.1) for i in range(5)]), whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    logps = [x.requires_grad_() for x in random_logps()]
    assert torch.autograd.gradcheck(lambda *leaves: loss(*leaves, beta=0.1), logps)


def test_gradient_with_label_smoothing():
    logps = [x.requires_grad_() for x in random_logps()]
    assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, beta=0.1, label_smoothing=0.2), logps)


# ------------------------------------------------------------------------------------------------------- peer


def same(x):
    return x


@pytest.mark.peer
@pytest.mark.parametrize(("loss", "name"), [(sigmoid_loss, "sigmoid"), (ipo_loss, "ipo"), (hinge_loss, "hinge")])
def test_equal_to_trl_dpo(loss, name):
    """TRL's own DPOTrainer._compute_loss on a stub model, from per-token log-probabilities (TRL's IPO averages)."""
    trainer_class = pytest.importorskip("trl").DPOTrainer
    generator = torch.Generator().manual_seed(0)
    pairs, width, beta = 3, 6, 0.3
    token_logps = -torch.rand(2 * pairs, width, generator=generator, dtype=torch.float64) * 4
    lengths = torch.tensor([6, 2, 3, 1, 5, 4])  # three chosen, three rejected
    mask = torch.arange(width) < lengths.unsqueeze(1)
    ref_logps = torch.randn(2 * pairs, generator=generator, dtype=torch.float64) - 8

    theirs = token_logps.clone().requires_grad_()
    zeros = torch.zeros_like(token_logps)
    outputs = SimpleNamespace(log_probs=theirs * mask, entropy=zeros, mean_logits=zeros, is_top1=torch.zeros_like(mask))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    prompt = torch.zeros(2 * pairs, 1, dtype=torch.long)
    completion_mask = torch.cat([prompt, mask.long()], dim=1)
    inputs = {
        "input_ids": torch.ones_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_logps[:pairs],
        "ref_rejected_logps": ref_logps[pairs:],
    }
    expected = trainer_class._compute_loss(trainer, lambda **_: outputs, inputs, False)
    expected.backward()

    ours = token_logps.clone().requires_grad_()
    per = lengths if name == "ipo" else torch.ones_like(lengths)
    policy, reference = (ours * mask).sum(dim=1) / per, ref_logps / per
    result = loss(*policy.chunk(2), *reference.chunk(2), beta=beta).mean()
    result.backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    rewards = implicit_rewards(*((ours * mask).sum(dim=1)[:pairs], ref_logps[:pairs]), beta=beta)
    assert trainer._metrics["train"]["rewards/chosen"] == [pytest.approx(rewards.mean().item())]


@pytest.mark.peer
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing_equal_to_trl(label_smoothing):
    """TRL smooths in CPO's loss, which is DPO's with a uniform reference: per pair, value and gradient."""
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected, *_ = random_logps()
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=0.3,
        loss_type="sigmoid",
        label_smoothing=label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    ours = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    expected, *_ = CPOTrainer.cpo_loss(trainer, *theirs)
    zeros = torch.zeros_like(chosen)
    loss = sigmoid_loss(*ours, zeros, zeros, beta=0.3, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, expected)
    expected.sum().backward()
    loss.sum().backward()
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, their.grad)
