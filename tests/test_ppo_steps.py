"""What one step of PPO must not depend on: micro-batches, devices, switches that are off; and what stops it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf import rlhf_ppo
from rlhf.advantages import RunningMoments
from rlhf.errors import UserError
from rlhf.experience import stack
from rlhf.experiment.optimizers import make_optimizer
from rlhf.losses.policy_gradient import ppo_policy_loss, ppo_value_loss
from rlhf.losses.supervised import nll_loss
from rlhf.models.loading import load_policy
from rlhf.rlhf_ppo import pack, shaped_scores, targets_of
from rlhf.trees.batches import rows_of_step
from rlhf.trees.forest import Forest
from rlhf.trees.rows import finetune_tree
from tests.ppo import Watched, World, flags_of, make_world, on_two_processes, relative_gap, set_up, train
from tests.splits import tokenizer_for


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_train=13)


ONE_STEP = {
    "rollout_size": 8,
    "mini_batch_size": 8,
    "optimizer": "sgd",
    "actor_learning_rate": 1e-2,
    "critic_learning_rate": 1e-2,
    "gradient_clip_val": 0.0,
    "max_steps": 2,
    "temperature": 0.7,
}
"""Two steps of plain SGD, unclipped so that a wrong scale shows: of 8 responses, and of the 5 that are left."""


def assert_same_steps(one: Watched, gradients: list[list[torch.Tensor]], metrics: list[dict[str, float]]) -> None:
    """Plain SGD steps are as equal as their gradients: the first to 1e-5; the second starts from that rounding."""
    assert relative_gap(one.gradients, gradients, 0) < 1e-5
    assert relative_gap(one.gradients, gradients, 1) < 1e-4
    for mine, theirs in zip(one.metrics, metrics, strict=True):
        same = {k: v for k, v in mine.items() if not k.startswith("perf/")}
        assert {k: theirs[k] for k in same} == pytest.approx(same, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def one_batch(world, tmp_path_factory) -> Watched:
    """The two steps with all responses in one micro-batch."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return train(flags_of(world, folder, **ONE_STEP, micro_batch_size=8), pytest.MonkeyPatch())


def test_first_mini_batch_has_ratio_one(one_batch):
    """C2, P5: at temperature 0.7 and in train() mode the ratio of the only mini-batch is 1, and nothing is clipped."""
    for line in one_batch.train_lines():
        assert line["train/ratio"] == pytest.approx(1, abs=1e-5)
        assert line["train/ratio_variance"] <= 1e-8
        assert line["train/clip_fraction"] == 0


def test_gradients_are_those_of_two_token_means(world, one_batch):
    """L1, L2, L5: the policy's loss is a mean over response tokens, the critic's 0.1 times one over its values, of
    which there are more (the end states); the gradients of the first step are those of these means.
    """
    setting = set_up(flags_of(world, "unused", **ONE_STEP))
    experiences = one_batch.experiences[0]
    rollout = stack(experiences, 8)
    scores = shaped_scores(rollout, setting.flags, RunningMoments())
    targets = targets_of(rollout, scores, 0.05, setting.flags, 1)
    batch = pack(experiences, targets, targets.advantages, list(range(8)))
    token_logps, _ = setting.roles.actor(batch.forest, temperature=0.7)
    values = setting.roles.critic(batch.forest, batch.value_index)
    assert len(values) > len(token_logps)
    ppo_policy_loss(token_logps, batch.old_logps, batch.advantages, clip_coef=0.2).mean().backward()
    (0.1 * ppo_value_loss(values, batch.old_values, batch.returns, clip_coef=0.2).mean()).backward()
    roles = (setting.roles.actor, setting.roles.critic)
    groups = [make_optimizer(role, setting.flags, 1.0).param_groups for role in roles]
    expected = [torch.cat([p.grad.flatten() for g in of_role for p in g["params"]]) for of_role in groups]
    assert relative_gap([[e] for e in expected], one_batch.gradients, 0) < 1e-5


@pytest.mark.parametrize(
    "cut", [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_tokens": 60}], ids=["1", "2", "tokens"]
)
def test_micro_batches_change_nothing(world, tmp_path, monkeypatch, one_batch, cut):
    """C3, L5, G4: micro-batches of 1, 2, or by a token budget move actor and critic as one batch does, and log the
    same numbers.
    """
    watched = train(flags_of(world, tmp_path / "run", **ONE_STEP, **cut), monkeypatch)
    assert len(watched.packed) > 2
    assert_same_steps(one_batch, watched.gradients, watched.metrics)


BLOW_UP = {
    "rollout_size": 4,
    "mini_batch_size": 4,
    "ppo_epochs": 4,
    "optimizer": "sgd",
    "actor_learning_rate": 5.0,
    "gradient_clip_val": 0.0,
    "max_steps": 1,
    "seed": 7,
}
"""A rate at which the first update throws the policy far away, towards most of what this seed has sampled."""


def test_two_processes_are_one(world, tmp_path, one_batch):
    """C3, G4, A9, L5, L14: two processes with half the rollout each make the steps of one; they see the same rows,
    log the same numbers, and agree on what is skipped.
    """
    halves = {"rollout_size": 4, "mini_batch_size": 4, "devices": "2", "strategy": "ddp"}
    folders = {name: tmp_path / name for name in ("plain", "skip", "stop")}
    runs = [
        flags_of(world, folders["plain"], **{**ONE_STEP, **halves}),
        flags_of(world, folders["skip"], **{**BLOW_UP, **halves}, max_ratio=1.5),
        flags_of(world, folders["stop"], **{**BLOW_UP, **halves}, target_update_kl=0.05),
    ]
    (tmp_path / "runs.json").write_text(json.dumps([dataclasses.asdict(flags) for flags in runs]))
    on_two_processes(Path(__file__).with_name("ppo_two_processes.py"), str(tmp_path / "runs.json"))
    seen = {
        name: [torch.load(folder / f"rank-{r}.pt", weights_only=True) for r in range(2)]
        for name, folder in folders.items()
    }
    for first, second in seen.values():
        assert all(torch.equal(first["weights"][k], second["weights"][k]) for k in first["weights"])
        assert first["steps"] == second["steps"]
        assert first["rows"] == second["rows"]
    plain = seen["plain"][0]
    assert [len(rows) for rows in plain["rows"]] == [8, 5]
    assert plain["rows"] == one_batch.rows
    for responses, experiences in zip(plain["responses"], one_batch.experiences, strict=True):
        assert [r.tolist() for r in responses] == [e.response.tolist() for e in experiences]
    assert_same_steps(one_batch, plain["gradients"], plain["metrics"])
    assert seen["skip"][0]["metrics"][0]["train/skipped_mini_batches"] > 0
    assert seen["skip"][0]["steps"][0] < 4
    assert seen["stop"][0]["steps"][0] < 4


def test_blow_ups_are_skipped_counted_or_stopped(world, tmp_path, monkeypatch):
    """L14: after a planted blow-up no number is NaN; --max_ratio skips and counts the policy's mini-batches, and
    --target_update_kl ends the epochs; the critic learns on in the first case.
    """
    free = train(flags_of(world, tmp_path / "free", **BLOW_UP), monkeypatch)
    skip = train(flags_of(world, tmp_path / "skip", **BLOW_UP, max_ratio=1.5), monkeypatch)
    stop = train(flags_of(world, tmp_path / "stop", **BLOW_UP, target_update_kl=0.05), monkeypatch)
    for watched in (free, skip, stop):
        assert all(np.isfinite(value) for value in watched.metrics[0].values())
        assert all(torch.isfinite(value).all() for value in watched.weights().values())
    assert free.metrics[0]["train/ratio"] > 1.5
    assert free.metrics[0]["train/skipped_mini_batches"] == 0
    assert [len(norms) for norms in free.norms] == [4, 4]
    assert [len(norms) for norms in skip.norms] == [1, 4]
    assert skip.metrics[0]["train/skipped_mini_batches"] == pytest.approx(3 / 4)
    assert [len(norms) for norms in stop.norms] == [2, 2]


def test_a_loss_that_is_not_finite_skips_the_optimiser_that_it_is_for(world, tmp_path, monkeypatch):
    """C25: the policy's first loss is infinite with a finite gradient: one update of the policy less, none of the
    critic; a mini-batch that --max_ratio skips takes its loss along."""
    policy_losses, calls = rlhf_ppo.policy_losses, []

    def spoiled(*args):
        calls.append(1)
        return policy_losses(*args) + (float("inf") if len(calls) == 1 else 0.0)

    def blown(*args):
        loss = spoiled(*args)
        args[-1].add("ratio", 1e6 if len(calls) == 1 else 0.0, 1)
        return loss

    monkeypatch.setattr(rlhf_ppo, "policy_losses", spoiled)
    settings = {"mini_batch_size": 2, "ppo_epochs": 1, "skip_nonfinite_steps": 1}
    watched = train(flags_of(world, tmp_path / "one", **settings), monkeypatch)
    assert [len(norms) for norms in watched.norms] == [1, 2]
    assert watched.metrics[0]["train/skipped_steps"] == 1
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(rlhf_ppo, "policy_losses", blown)
        watched = train(flags_of(world, tmp_path / "ratio", **settings, max_ratio=2.0), monkeypatch)
    assert [len(norms) for norms in watched.norms] == [1, 2]
    assert watched.metrics[0]["train/skipped_mini_batches"] == 0.5
    assert "train/skipped_steps" not in watched.metrics[0]
    calls.clear()
    with pytest.raises(UserError, match="step 0: the loss of the actor is inf"):
        train(flags_of(world, tmp_path / "stop", **{**settings, "skip_nonfinite_steps": 0}), monkeypatch)


def test_supervised_loss_beside_ppo(world, tmp_path, monkeypatch):
    """L12, L9: off by default, and coefficient 0 is bit-equal; on, it adds the gradient of its own token mean."""
    settings = {**ONE_STEP, "max_steps": 1}
    default = train(flags_of(world, tmp_path / "default", **settings), monkeypatch)
    zero = train(flags_of(world, tmp_path / "zero", **settings, ptx_coef=0.0, entropy_coef=0.0), monkeypatch)
    mixed = train(flags_of(world, tmp_path / "mixed", **settings, ptx_coef=0.5, micro_batch_size=3), monkeypatch)
    assert all(torch.equal(value, default.weights()[name]) for name, value in zero.weights().items())
    assert "train/ptx_loss" not in zero.metrics[0]

    flags = flags_of(world, tmp_path / "unused")
    split = set_up(flags).run.load_splits("finetune", tokenizer_for())[0]
    rows = rows_of_step(0, len(split), 8, seed=flags.seed, shuffle=True)
    policy = load_policy(world.sft, flags)
    loss = nll_loss(policy(Forest([finetune_tree(split[i]) for i in rows]))[0]).mean()
    loss.backward()
    assert mixed.metrics[0]["train/ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert mixed.metrics[0]["train/policy_loss"] == pytest.approx(default.metrics[0]["train/policy_loss"], abs=1e-5)
    for name, parameter in policy.named_parameters():
        moved = mixed.weights()[f"actor.{name}"] - default.weights()[f"actor.{name}"]
        torch.testing.assert_close(moved, -1e-2 * 0.5 * parameter.grad, atol=1e-6, rtol=1e-3)


def test_every_update_mixes_in_the_next_rows(world, tmp_path, monkeypatch):
    """L12: two rollouts of two epochs of two mini-batches make eight updates; the first seven take each of 13 rows."""
    used = []

    def watched(step, num_rows, *args, **options):
        used.append(rows_of_step(step, num_rows, *args, **options))
        return used[-1]

    monkeypatch.setattr(rlhf_ppo, "rows_of_step", watched)
    settings = {"rollout_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "max_steps": 2}
    train(flags_of(world, tmp_path / "run", **settings, ptx_coef=0.5), monkeypatch)
    assert [len(rows) for rows in used] == [2] * 6 + [1, 2]
    assert sorted(row for rows in used[:7] for row in rows) == list(range(13))


def test_short_rollouts_cannot_be_whitened(world, tmp_path):
    """K4: the five responses that are left of an epoch are too few, and the run says so before it writes anything."""
    with pytest.raises(UserError, match="the last rollout of an epoch has 5"):
        rlhf_ppo.main(flags_of(world, tmp_path / "run", rollout_size=8, whiten_rewards=True, max_steps=None))
    assert not (tmp_path / "run").exists()


def test_a_mismatch_stops_the_run_before_any_update(world, tmp_path, monkeypatch):
    """C35, P1: a reference that is another model ends the run at the first rollout, with no final model."""
    load_roles = rlhf_ppo.load_roles

    def planted(*args, **options):
        roles = load_roles(*args, **options)
        with torch.no_grad():
            next(roles.reference.parameters()).mul_(torch.linspace(0.9, 1.1, 32))
        return roles

    monkeypatch.setattr(rlhf_ppo, "load_roles", planted)
    with pytest.raises(UserError, match="policy and reference differ by"):
        rlhf_ppo.main(flags_of(world, tmp_path / "run"))
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 1),
        ({"ppo_epochs": 2}, 2),
        ({"micro_batch_size": 2}, 1 + 2),
        ({"micro_batch_tokens": 10_000}, 1 + 1),
        ({"rollout_mini_batch_size": 2}, 2 + 1),
        ({"rollout_size": 8}, 1 + 2),
    ],
    ids=str,
)
def test_the_critics_pass_over_a_rollout_serves_its_first_update(world, tmp_path, monkeypatch, changes, passes):
    """Where the rollout is one micro-batch; in a second epoch the critic has moved, and more graphs would add up."""
    calls, before, load, assess = [], [], rlhf_ppo.load_roles, rlhf_ppo.assess_policy

    def loaded(*args, **options):
        roles = load(*args, **options)
        roles.critic.register_forward_pre_hook(lambda *_: calls.append(None))
        return roles

    def assessed(*args, **options):
        before.append(len(calls))
        return assess(*args, **options)

    monkeypatch.setattr(rlhf_ppo, "load_roles", loaded)
    monkeypatch.setattr(rlhf_ppo, "assess_policy", assessed)
    sizes = {"rollout_size": 4, "mini_batch_size": 4, "micro_batch_size": 4, "rollout_mini_batch_size": 8}
    watched = train(flags_of(world, tmp_path / "run", **{**ONE_STEP, **sizes, "max_steps": 1, **changes}), monkeypatch)
    assert before == [passes]
    assert all(e.graph is None for e in watched.experiences[0])
