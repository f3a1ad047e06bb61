"""The pieces of rlhf_grpo.py: flags that contradict each other, groups, advantages, packing and the loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlhf.errors import UserError
from rlhf.experience import Experience, Rollout, penalised_scores, stack
from rlhf.experiment.metrics import Metrics
from rlhf.rlhf_grpo import (
    Batch,
    GRPOFlags,
    advantages_of,
    pack,
    policy_loss,
    responses_of,
    weights_of,
)

NUM_SAMPLES, WIDTH = 3, 5


def flags_with(**given) -> GRPOFlags:
    settings = {"data_dir": "", "num_samples": NUM_SAMPLES, "max_new_tokens": WIDTH, "rollout_size": 8}
    return GRPOFlags(**{**settings, **given})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"num_samples": 1}, "--num_samples must be 2 or more .or take --advantage=reinforce_pp"),
        ({"num_samples": 1, "advantage": "rloo"}, "--advantage=rloo compares"),
        ({"num_samples": 0}, "--num_samples=0 must be above 0"),
        ({"kl_in": "reward"}, "no meaning without --kl_coef"),
        ({"kl_estimator": "k3"}, "no meaning without --kl_coef"),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, "k1 in the loss has a gradient of 0"),
        ({"kl_unbiased": True}, "--kl_unbiased has no meaning"),
        ({"kl_unbiased": True, "kl_coef": 0.1, "kl_in": "reward"}, "--kl_unbiased has no meaning"),
        ({"kl_coef": -0.1}, "--kl_coef=-0.1 must not be below 0"),
        ({"loss_type": "gspo", "loss_normalization": "token"}, "leave it out, or take sequence"),
        ({"max_resamples": 2}, "--max_resamples has no meaning without --dynamic_sampling"),
        ({"dynamic_sampling": True, "advantage": "reinforce_pp"}, "learns from groups of equal rewards too"),
        ({"top_p": 0.9}, "GRPO trains on the distribution that it samples from"),
        ({"disable_dropout": False}, "GRPO needs dropout off"),
        ({"rollout_size": 12}, "--rollout_size=12 is no multiple of --mini_batch_size=8; the nearest is 16"),
        ({"rollout_epochs": 0}, "--rollout_epochs=0 must be above 0"),
    ],
)
def test_flags_that_contradict_each_other(given, complaint):
    with pytest.raises(UserError, match=complaint):
        flags_with(**given)


def test_what_is_resolved_by_the_loss_type():
    found = {name: flags_with(loss_type=name) for name in ("grpo", "gspo", "cispo")}
    assert {name: flags.normalization for name, flags in found.items()} == {
        "grpo": "token", "gspo": "sequence", "cispo": "token"
    }  # fmt: skip
    assert found["grpo"].clips == {"clip_low": 0.2, "clip_high": 0.2}
    assert found["gspo"].clips == {"clip_low": 3e-4, "clip_high": 4e-4}
    assert found["cispo"].clips == {"clip_low": 1.0, "clip_high": 4.0}
    assert flags_with(clip_high=0.28).clips == {"clip_low": 0.2, "clip_high": 0.28}
    assert flags_with(clip_low=0.0).clips["clip_low"] == 0.0


def make_experiences(*, num_groups: int = 2, seed: int = 0, with_reference: bool = True) -> list[Experience]:
    """Groups of 3 responses of 1 to 5 tokens, an empty one among them; those of full length have not ended."""
    draw = torch.Generator().manual_seed(seed)
    experiences = []
    for g in range(num_groups):
        prompt = torch.randint(10, 40, (2 + g,), generator=draw)
        for j, n in enumerate([5, 2, 0] if g == 0 else [1, 5, 3]):
            old, ref = torch.randn(2, n, generator=draw) * 0.3 - 2
            experiences.append(
                Experience(
                    position=g * NUM_SAMPLES + j,
                    prompt=prompt,
                    response=torch.randint(10, 40, (n,), generator=draw),
                    old_logps=old,
                    ref_logps=ref if with_reference else None,
                    values=None,
                    score=float(g + j * j),
                    ended=n < WIDTH,
                )
            )
    return experiences


def rollout_of(experiences: list[Experience]) -> Rollout:
    return stack(experiences, WIDTH)


def test_a_rollout_knows_which_roles_there_were():
    found = rollout_of(make_experiences())
    assert found.values is None
    assert found.ref_logps.shape == (6, WIDTH)
    assert rollout_of(make_experiences(with_reference=False)).ref_logps is None


def test_missing_eos_is_a_penalty():
    """Scores 0, 1, 4 and 1, 2, 5; the first of group 1 and the second of group 2 have no EOS."""
    experiences = make_experiences()
    assert penalised_scores(experiences, 0.0).tolist() == [0.0, 1.0, 4.0, 1.0, 2.0, 5.0]
    found = penalised_scores(experiences, 0.5)
    assert found.tolist() == [-0.5, 1.0, 4.0, 1.0, 1.5, 5.0]


def test_advantages_of_groups_stand_at_every_token():
    """Dr. GRPO on scores 0, 1, 4 (mean 5/3) and 1, 2, 5 (mean 8/3)."""
    experiences = make_experiences()
    rollout = rollout_of(experiences)
    found, token_kl = advantages_of(rollout, penalised_scores(experiences, 0.0), flags_with(advantage="dr_grpo"))
    expected = torch.tensor([-5 / 3, -2 / 3, 7 / 3, -5 / 3, -2 / 3, 7 / 3])
    torch.testing.assert_close(found, expected[:, None] * rollout.response_mask)
    assert (token_kl == 0).all()


def test_the_kl_in_the_reward_is_that_of_the_whole_response():
    """RLOO: the KL of a response, summed over its tokens, comes off its score before they are compared."""
    experiences = make_experiences()
    rollout = rollout_of(experiences)
    flags = flags_with(advantage="rloo", kl_coef=0.5, kl_in="reward")
    found, token_kl = advantages_of(rollout, penalised_scores(experiences, flags.missing_eos_penalty), flags)
    rewards = [e.score - 0.5 * (e.old_logps - e.ref_logps).sum().item() for e in experiences]
    for g in range(2):
        own = rewards[g * 3 : g * 3 + 3]
        for j in range(3):
            others = sum(own[:j] + own[j + 1 :]) / 2
            at = found[g * 3 + j][rollout.response_mask[g * 3 + j]]
            torch.testing.assert_close(at, torch.full_like(at, own[j] - others))
    assert token_kl[2].eq(0).all()
    assert token_kl[0].ne(0).all()


def test_reinforce_pp_takes_each_tokens_own_rewards():
    """Where rewards are given to tokens, REINFORCE++ sees where they were earned; a group advantage only their sum."""
    experiences = make_experiences()
    for e in experiences:
        e.process_rewards = torch.zeros(len(e.response))
        if len(e.response):
            e.process_rewards[0] = e.score
    rollout = rollout_of(experiences)
    scores = penalised_scores(experiences, 0.0)
    found, _ = advantages_of(rollout, scores, flags_with(advantage="reinforce_pp"))
    plain, _ = advantages_of(stack(make_experiences(), WIDTH), scores, flags_with(advantage="reinforce_pp"))
    # The last response earns 5, all of it at its first token: the other two have nothing left to come.
    assert found[5, 1] == found[5, 2]
    assert found[5, 0] > found[5, 1]
    assert plain[5, 0] == plain[5, 2]
    without = rollout_of(make_experiences())
    for advantage in ("grpo", "dr_grpo", "rloo"):
        flags = flags_with(advantage=advantage)
        assert torch.equal(advantages_of(rollout, scores, flags)[0], advantages_of(without, scores, flags)[0])


def test_reinforce_pp_with_a_baseline_compares_within_the_group_first():
    """Group means off: -5/3, -2/3, 7/3 in both groups, over tokens 5, 2, 0 and 1, 5, 3; then whitened over all 16."""
    experiences = make_experiences()
    rollout = rollout_of(experiences)
    flags = flags_with(advantage="reinforce_pp_baseline")
    found, _ = advantages_of(rollout, penalised_scores(experiences, flags.missing_eos_penalty), flags)
    centred = torch.tensor([-5 / 3, -2 / 3, 7 / 3, -5 / 3, -2 / 3, 7 / 3]).double()
    tokens = centred.repeat_interleave(torch.tensor([5, 2, 0, 1, 5, 3]))
    expected = (tokens - tokens.mean()) / tokens.std(correction=0)
    torch.testing.assert_close(found[rollout.response_mask], expected.float())


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
def test_equal_rewards_and_no_groups_at_all_are_finite(advantage):
    experiences = make_experiences()
    flags = flags_with(advantage=advantage)
    found, _ = advantages_of(rollout_of(experiences), torch.full((6,), 0.1), flags)
    assert (found == 0).all()
    nothing, token_kl = advantages_of(rollout_of([]), penalised_scores([], flags.missing_eos_penalty), flags)
    assert nothing.shape == token_kl.shape == (0, WIDTH)


def test_weights_are_those_of_the_step_alone():
    """Group 1 alone: 3 responses, 9 tokens; with truncated ones left out, 4 tokens. The other group has weight 0."""
    rollout = rollout_of(make_experiences())
    chosen = responses_of([1], NUM_SAMPLES)
    assert weights_of(rollout, chosen, flags_with()).tolist() == pytest.approx([0, 0, 0, 1 / 9, 1 / 9, 1 / 9])
    found = weights_of(rollout, chosen, flags_with(mask_truncated=True))
    assert found.tolist() == pytest.approx([0, 0, 0, 1 / 4, 0, 1 / 4])
    found = weights_of(rollout, chosen, flags_with(loss_type="gspo"))
    assert found.tolist() == pytest.approx([0, 0, 0, 1 / 3, 1 / 15, 1 / 9])


class _Table:
    """An actor whose log-probabilities are leaves: those of `experiences`, moved."""

    def __init__(self, batch: Batch, seed: int = 1) -> None:
        moved = torch.randn(batch.forest.num_targets, generator=torch.Generator().manual_seed(seed)) * 0.3 - 2
        self.logps = moved.requires_grad_()
        self.entropies = torch.ones(batch.forest.num_targets)

    def __call__(self, forest, *, temperature, entropy):
        return self.logps, self.entropies


def step_of() -> SimpleNamespace:
    fabric = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    return SimpleNamespace(metrics=Metrics(fabric), weight=1.0, watch=lambda *_: None)


def batch_of(groups: list[int], flags: GRPOFlags) -> Batch:
    experiences = make_experiences()
    rollout = rollout_of(experiences)
    advantages, _ = advantages_of(rollout, penalised_scores(experiences, flags.missing_eos_penalty), flags)
    weights = weights_of(rollout, responses_of([0, 1], NUM_SAMPLES), flags)
    return pack(experiences, rollout, advantages, weights, NUM_SAMPLES, groups)


def test_a_group_is_one_tree():
    """A prompt's tokens stand in the forest once, whatever the number of its responses, an empty one included."""
    batch = batch_of([1, 0], flags_with())
    experiences = make_experiences()
    tokens = [experiences[3].prompt, *(e.response for e in experiences[3:])]
    tokens += [experiences[0].prompt, *(e.response for e in experiences[:3])]
    assert torch.equal(batch.forest.input_ids, torch.cat(tokens))
    assert batch.forest.target_mask.sum(1).tolist() == [1, 5, 3, 5, 2, 0]
    for k, i in enumerate([3, 4, 5, 0, 1, 2]):
        n = len(experiences[i].response)
        assert torch.equal(batch.old_logps[k, :n], experiences[i].old_logps)
        assert torch.equal(batch.ref_logps[k, :n], experiences[i].ref_logps)


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "cispo"])
@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_the_loss_of_two_micro_batches_is_that_of_one(loss_type, normalization):
    """C3: values and gradients add up; an empty and a cut response among them; all finite."""
    if loss_type == "gspo" and normalization != "sequence":
        return
    flags = flags_with(loss_type=loss_type, loss_normalization=normalization, kl_coef=0.1, mask_truncated=True)
    whole = batch_of([0, 1], flags)
    actor = _Table(whole)
    loss = policy_loss(actor, whole, flags, step_of())
    (gradient,) = torch.autograd.grad(loss, actor.logps)
    parts, gradients = [], []
    for g, rows in ((0, slice(0, 7)), (1, slice(7, 16))):
        batch = batch_of([g], flags)
        part = _Table(batch)
        part.logps = actor.logps.detach()[rows].clone().requires_grad_()
        parts.append(policy_loss(part, batch, flags, step_of()))
        gradients.append(torch.autograd.grad(parts[-1], part.logps)[0])
    assert loss.isfinite()
    assert loss.item() != 0
    torch.testing.assert_close(sum(parts), loss)
    torch.testing.assert_close(torch.cat(gradients), gradient)


def test_a_group_without_eos_and_masked_has_no_gradient_and_no_nan():
    """All responses of the step reached the longest length and are left out: loss 0, gradient 0."""
    experiences = make_experiences()
    for e in experiences:
        e.ended = False
    rollout, flags = rollout_of(experiences), flags_with(mask_truncated=True)
    advantages, _ = advantages_of(rollout, penalised_scores(experiences, flags.missing_eos_penalty), flags)
    weights = weights_of(rollout, responses_of([0, 1], NUM_SAMPLES), flags)
    batch = pack(experiences, rollout, advantages, weights, NUM_SAMPLES, [0, 1])
    actor = _Table(batch)
    loss = policy_loss(actor, batch, flags, step_of())
    loss.backward()
    assert loss.item() == 0
    assert (actor.logps.grad == 0).all()


def test_entropy_bonus_and_kl_in_the_loss():
    """With all advantages 0: the loss is beta times the weighted k2, less the coefficient times the entropy of 1."""
    flags = flags_with(kl_coef=0.5, kl_estimator="k2", entropy_coef=0.25)
    batch = batch_of([0, 1], flags)
    batch.advantages = torch.zeros_like(batch.advantages)
    actor, step = _Table(batch), step_of()
    loss = policy_loss(actor, batch, flags, step)
    squares = 0.5 * (actor.logps.detach() - batch.forest.flat(batch.ref_logps)).square()
    assert loss.item() == pytest.approx(0.5 * squares.mean().item() - 0.25, rel=1e-5)
    assert step.metrics.reduce()["train/kl_in_loss"] == pytest.approx(squares.mean().item(), rel=1e-5)


def test_metrics_count_tokens_on_their_side_of_the_clip():
    """Ratios 1.5, 0.5, 1.5, 0.5 and A = 1, 1, -1, -1, clip 0.2: one token is held above, one below."""
    experiences = make_experiences()[:2]
    for e, score in zip(experiences, (1.0, 0.0), strict=True):
        e.response, e.score, e.ended = torch.tensor([11, 12]), score, True
        e.old_logps = e.ref_logps = torch.zeros(2)
    flags = GRPOFlags(data_dir="", num_samples=2, max_new_tokens=WIDTH)
    rollout = rollout_of(experiences)
    advantages, _ = advantages_of(rollout, penalised_scores(experiences, flags.missing_eos_penalty), flags)
    batch = pack(experiences, rollout, advantages, weights_of(rollout, [0, 1], flags), 2, [0])
    actor, step = _Table(batch), step_of()
    actor.logps = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    policy_loss(actor, batch, flags, step)
    found = step.metrics.reduce()
    assert found["train/clip_fraction"] == 0.5
    assert found["train/clip_fraction_high"] == found["train/clip_fraction_low"] == 0.25
    assert found["train/ratio"] == pytest.approx(1.0)
