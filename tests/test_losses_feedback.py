"""KTO, APO-zero and BCO on single responses: worked by hand, at their limits, and against TRL."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rlhf.advantages import RunningMoments
from rlhf.losses.feedback import apo_zero_unpaired_loss, bco_loss, kto_kl, kto_loss
from rlhf.masked import moments
from rlhf.models.policy import Policy
from rlhf.models.probe import tree_attention_fault
from rlhf.trees.batches import mismatched
from rlhf.trees.forest import Forest, Tree
from tests.peers import ROOT, TRL_WITH_PPO, require_trl, require_trl_with_ppo
from tests.plain import eager
from tests.tiny import make_model
from tests.trees import VOCABULARY

GOOD_AND_BAD = torch.tensor([True, False])
# Log-ratio 3 for a good response and for a bad one.
POLICY, REFERENCE = torch.tensor([-9.0, -17.0]), torch.tensor([-12.0, -20.0])


def random_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy and reference (6,), labels of which four are good, and a point of reference."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (torch.randn(2, 6, generator=generator, dtype=torch.float64) * 3 - 20).unbind()
    return policy, reference, torch.tensor([True, True, False, True, False, True]), torch.tensor(0.7).double()


def without_point(policy: Tensor, reference: Tensor, labels: Tensor, point: Tensor, *, beta: float) -> Tensor:
    return apo_zero_unpaired_loss(policy, reference, labels, beta=beta)


LOSSES = {"kto": kto_loss, "apo_zero_unpaired": without_point, "bco": bco_loss}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def test_kto_by_hand():
    """Reward 0.5 * 3 = 1.5 against 0.5 * 1: 1 - sigmoid(1) = 0.268941 and 1 - sigmoid(-1) = 0.731059; weights 2, 3."""
    point = torch.tensor(1.0)
    loss = kto_loss(POLICY, REFERENCE, GOOD_AND_BAD, point, beta=0.5)
    assert loss.tolist() == pytest.approx([0.268941, 0.731059], abs=1e-6)
    weighted = kto_loss(POLICY, REFERENCE, GOOD_AND_BAD, point, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    torch.testing.assert_close(weighted, loss * torch.tensor([2.0, 3.0]))


def test_kl_by_hand():
    """The mean of 4, -1 and 0 is 1; of -4, -1 and 0 below nothing: 0. No gradient comes through it."""
    ratios = torch.tensor([4.0, -1.0, 0.0], requires_grad=True)
    assert kto_kl(ratios).item() == 1
    assert kto_kl(ratios - 4).item() == 0
    assert not kto_kl(ratios).requires_grad


def test_apo_zero_by_hand():
    """Reward 0.5 * 3: 1 - sigmoid(1.5) = 0.182426 and sigmoid(1.5) = 0.817574; weights 2, 3."""
    loss = apo_zero_unpaired_loss(POLICY, REFERENCE, GOOD_AND_BAD, beta=0.5)
    assert loss.tolist() == pytest.approx([0.182426, 0.817574], abs=1e-6)
    weights = {"desirable_weight": 2.0, "undesirable_weight": 3.0}
    weighted = apo_zero_unpaired_loss(POLICY, REFERENCE, GOOD_AND_BAD, beta=0.5, **weights)
    torch.testing.assert_close(weighted, loss * torch.tensor([2.0, 3.0]))


def test_bco_by_hand():
    """Reward 1.5 less delta 0.5: log(1 + e^-1) = 0.313262, and log(1 + e^1) = 1.313262."""
    loss = bco_loss(POLICY, REFERENCE, GOOD_AND_BAD, torch.tensor(0.5), beta=0.5)
    assert loss.tolist() == pytest.approx([0.313262, 1.313262], abs=1e-6)


def test_policy_at_the_reference():
    """Half the weight for KTO and APO-zero, ln 2 for BCO, with nothing to be held against; for any label."""
    policy, _, labels, _ = random_case()
    zero = torch.zeros(())
    weights = torch.where(labels, 1.5, 0.5).double()
    loss = kto_loss(policy, policy, labels, zero, beta=0.1, desirable_weight=1.5, undesirable_weight=0.5)
    torch.testing.assert_close(loss, weights / 2)
    assert without_point(policy, policy, labels, zero, beta=0.1).tolist() == [0.5] * 6
    torch.testing.assert_close(bco_loss(policy, policy, labels, zero, beta=0.1), torch.full_like(policy, math.log(2)))


def test_kto_without_a_point_of_reference_is_apo_zero():
    policy, reference, labels, _ = random_case()
    kto = kto_loss(policy, reference, labels, torch.zeros(()), beta=0.3)
    torch.testing.assert_close(kto, apo_zero_unpaired_loss(policy, reference, labels, beta=0.3))


@EVERY_LOSS
def test_descent_raises_the_good_and_lowers_the_bad(loss):
    policy, reference, labels, point = random_case()
    policy.requires_grad_()
    loss(policy, reference, labels, point, beta=0.1).sum().backward()
    assert ((policy.grad < 0) == labels).all()
    assert (policy.grad != 0).all()


@EVERY_LOSS
def test_a_turned_label_turns_the_gradient(loss):
    """At the point of reference itself, where both labels cost the same."""
    grads = []
    for label in (True, False):
        policy = torch.zeros(1, requires_grad=True)
        loss(policy, torch.zeros(1), torch.tensor([label]), torch.zeros(()), beta=0.2).sum().backward()
        grads.append(policy.grad)
    torch.testing.assert_close(grads[0], -grads[1], rtol=0, atol=0)


@EVERY_LOSS
def test_the_point_of_reference_carries_no_gradient(loss):
    policy, reference, labels, point = random_case()
    policy.requires_grad_()
    point.requires_grad_()
    loss(policy, reference, labels, point, beta=0.1).sum().backward()
    assert point.grad is None


@EVERY_LOSS
def test_far_rewards_stay_finite(loss):
    """Rewards of +-2,000, good and bad: values and gradients are finite."""
    policy = torch.tensor([20_000.0, 20_000.0, -20_000.0, -20_000.0], requires_grad=True)
    labels = torch.tensor([True, False, True, False])
    values = loss(policy, torch.zeros(4), labels, torch.zeros(()), beta=0.1)
    values.sum().backward()
    assert values.isfinite().all()
    assert policy.grad.isfinite().all()
    assert values[0] == values[3] == 0


@EVERY_LOSS
def test_rows_are_independent(loss):
    policy, reference, labels, point = random_case()
    whole = loss(policy, reference, labels, point, beta=0.1)
    for i in range(6):
        row = slice(i, i + 1)
        torch.testing.assert_close(loss(policy[row], reference[row], labels[row], point, beta=0.1), whole[row])


@EVERY_LOSS
def test_gradients(loss):
    policy, reference, labels, point = random_case()
    policy.requires_grad_()
    reference.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, r: loss(p, r, labels, point, beta=0.3), (policy, reference))


# ------------------------------------------------------------------------------------------------------- peer


def random_rows(seed: int, num: int) -> list[tuple[Tensor, Tensor, bool]]:
    """Prompts and responses of 1 to 7 tokens, with labels."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        length = 1 + int(torch.randint(7, (1,), generator=generator))
        return torch.randint(VOCABULARY, (length,), generator=generator)

    return [(ids(), ids(), bool(torch.rand(1, generator=generator) < 0.6)) for _ in range(num)]


def batch_for_trl(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and completion mask of prompts with responses, padded on the right."""
    whole = [torch.cat(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    masks = [[torch.ones_like(ids) for ids in whole], [torch.cat([p * 0, r * 0 + 1]) for p, r in rows]]
    return pad(whole, batch_first=True), *(pad(mask, batch_first=True) for mask in masks)


def ours(policy: Policy, rows, reference: Tensor, other_reference: Tensor):
    """Log-probabilities of rows and of the mismatched pairs, in one pass, and z0."""
    others = mismatched(range(len(rows)), len(rows))
    forest = Forest([Tree.of(prompt, response) for prompt, response, _ in rows])
    beside = Forest([Tree.of(rows[i][0], rows[j][1]) for i, j in enumerate(others)])
    token_logps, _ = policy(forest, beside=beside)
    own, other = token_logps.split([forest.num_targets, beside.num_targets])
    return forest.per_branch(own), kto_kl(beside.per_branch(other) - other_reference)


def log_probs_of(model, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """(B, L - 1), 0 where there is no label, from transformers' full logits."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return found * (targets != -100)


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_equal_to_trl_kto(loss_type, seed):
    """TRL 1.16.0's own KTOTrainer._compute_loss on a padded batch of a plain model, mismatched by its rule, beside one
    packed pass here: loss, z0 and the gradient of every parameter to 1e-5."""
    require_trl()
    import trl

    rows = random_rows(seed, 5)
    generator = torch.Generator().manual_seed(100 + seed)
    plain, policy = eager("llama"), Policy(make_model("llama"), uses_trees=True)
    assert tree_attention_fault(policy.model) is None
    with torch.no_grad():  # a reference a little beside the policy, so that z0 is not 0 throughout
        near, z0 = ours(policy, rows, torch.zeros(5), torch.zeros(5))
    shift = torch.randn(2, 5, generator=generator)
    others = mismatched(range(5), 5)
    own_batch = batch_for_trl([(p, r) for p, r, _ in rows])
    kl_batch = batch_for_trl([(rows[i][0], rows[j][1]) for i, j in enumerate(others)])
    with torch.no_grad():
        labels = kl_batch[0].masked_fill(kl_batch[2] == 0, -100)
        other_reference = log_probs_of(plain, kl_batch[0], kl_batch[1], labels).sum(1) - 0.5 + shift[1]
    reference = near + shift[0]

    def model(*, input_ids, attention_mask, labels, use_cache, fused_lm_head):
        log_probs = log_probs_of(plain, input_ids, attention_mask, labels)
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda *args: trl.KTOTrainer._compute_kl_logps(trainer, *args)
    names = ("input_ids", "attention_mask", "completion_mask")
    is_good = torch.tensor([label for *_, label in rows])
    inputs = {
        **dict(zip(names, own_batch, strict=True)),
        **{f"KL_{name}": part for name, part in zip(names, kl_batch, strict=True)},
        "label": is_good,
        "ref_logps": reference,
        "ref_KL_logps": other_reference,
    }
    if loss_type != "kto":
        inputs = {name: value for name, value in inputs.items() if "KL" not in name}
    expected = trl.KTOTrainer._compute_loss(trainer, model, inputs, False)
    expected.backward()

    policy_logps, z0 = ours(policy, rows, reference, other_reference)
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    if loss_type == "kto":
        assert trainer._metrics["train"]["kl"] == [pytest.approx(z0.item(), abs=1e-5)]
        losses = kto_loss(policy_logps, reference, is_good, z0, **weights)
    else:
        losses = apo_zero_unpaired_loss(policy_logps, reference, is_good, **weights)
    losses.mean().backward()
    torch.testing.assert_close(losses.mean(), expected, rtol=0, atol=1e-5)
    theirs = dict(plain.named_parameters())
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)
    if seed == 0 and loss_type == "kto":
        assert z0 > 0.01


BCO = """
import sys, torch
from types import SimpleNamespace
import trl
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments
assert trl.__version__ == "1.12.0"
trainer = SimpleNamespace(beta=0.3, match_underlying_distribution=False,
                          running=RunningMoments(SimpleNamespace(use_distributed=False)))
answer = []
for batch in torch.load(sys.argv[1]):
    policy, labels = batch["policy"].requires_grad_(), batch["labels"]
    sides = [policy[labels], policy[~labels], batch["reference"][labels], batch["reference"][~labels]]
    losses, *_, delta = BCOTrainer.bco_loss(trainer, *sides, None, None)
    losses.nanmean().backward()
    answer.append({"loss": losses.nanmean().detach(), "delta": delta, "grad": policy.grad})
torch.save(answer, sys.argv[2])
"""


@pytest.mark.peer
def test_equal_to_trl_bco(tmp_path):
    """TRL 1.12.0's own BCOTrainer.bco_loss and running mean, over six batches of unequal sizes, one with good rows
    alone and one with bad ones alone: loss, delta and gradient to 1e-5, the moments from two shards of each batch."""
    require_trl_with_ppo()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for num, good in ((4, None), (7, None), (3, True), (2, False), (1, None), (9, None)):
        labels = torch.rand(num, generator=generator) < 0.5 if good is None else torch.full((num,), good)
        policy, reference = (torch.randn(2, num, generator=generator) * 4 - 20).unbind()
        batches.append({"policy": policy, "reference": reference, "labels": labels})
    torch.save(batches, tmp_path / "batches.pt")
    environment = {**os.environ, "PYTHONPATH": str(TRL_WITH_PPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", BCO, str(tmp_path / "batches.pt"), str(tmp_path / "answer.pt")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    rewards_so_far = RunningMoments()
    for batch, expected in zip(batches, torch.load(tmp_path / "answer.pt"), strict=True):
        policy = batch["policy"].clone().requires_grad_()
        rewards = 0.3 * (policy - batch["reference"]).detach()
        shards = [rewards[:1], rewards[1:]]
        rewards_so_far.update_from(sum(moments(x, torch.ones_like(x, dtype=torch.bool)) for x in shards))
        delta = torch.tensor(rewards_so_far.mean)
        loss = bco_loss(policy, batch["reference"], batch["labels"], delta, beta=0.3).mean()
        loss.backward()
        torch.testing.assert_close(delta, expected["delta"], rtol=0, atol=1e-5)
        torch.testing.assert_close(loss.detach(), expected["loss"], rtol=0, atol=1e-5)
        torch.testing.assert_close(policy.grad, expected["grad"], rtol=0, atol=1e-5)
