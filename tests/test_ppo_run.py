"""Whole runs of rlhf_ppo.py on a tiny world: what is updated when, what is logged, and what must not change it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf import monitoring
from rlhf.experience import collect
from rlhf.models.loading import load_policy, load_scorer, save_model
from rlhf.monitoring import evaluate_sampling
from tests import offline
from tests.ppo import Watched, World, flags_of, make_world, set_up, train
from tests.splits import tokenizer_for

NUM_PROMPTS = 13


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_train=NUM_PROMPTS)


@dataclasses.dataclass
class Recorded:
    folder: Path
    watched: Watched
    printed: str


LONG = {
    "guard_empty": 0.0,
    "rollout_size": 4,
    "mini_batch_size": 2,
    "micro_batch_size": 1,
    "ppo_epochs": 4,
    "epochs": 2,
    "max_steps": None,
    "actor_learning_rate": 1e-3,
    "critic_learning_rate": 3e-3,
    "gradient_clip_val": 0.1,
    "adaptive_kl_coeff": True,
    "target_kl_coeff": 0.5,
    "kl_horizon": 40.0,
    "normalize_rewards": True,
    "eval_interval": 4,
    "save_interval": 1,
    "keep_checkpoints": 0,
}
"""Two passes over 13 prompts, four at a time: eight rollouts, of which the fourth and the eighth are of one row."""


@pytest.fixture(scope="module")
def long_run(world, tmp_path_factory) -> Recorded:
    folder, printed = tmp_path_factory.mktemp("long") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        watched = train(flags_of(world, folder, **LONG), pytest.MonkeyPatch())
    return Recorded(folder, watched, printed.getvalue())


def metrics_without_times(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def test_prompts_are_reshuffled_when_they_run_out(long_run):
    """A9, A10, L13: each pass sees every prompt once; the second in another order."""
    rows = long_run.watched.rows
    first, second = ([i for step in half for i in step] for half in (rows[:4], rows[4:]))
    assert sorted(first) == sorted(second) == list(range(NUM_PROMPTS))
    assert first != second
    assert [len(r) for r in rows] == [4, 4, 4, 1] * 2


def test_every_epoch_is_a_new_order_of_the_rollout(long_run):
    """L3, L13: four epochs are four orders, each covers every response once, and no response is used again later."""
    packed, used, seen = iter(long_run.watched.packed), 0, set()
    for rows in long_run.watched.rows:
        orders = [[next(packed)[0] for _ in rows] for _ in range(4)]
        seen.add(str(orders))
        assert all(sorted(order) == list(range(len(rows))) for order in orders)
        if len(rows) == 4:
            assert len({tuple(order) for order in orders}) == 4
        used += 4 * len(rows)
    assert used == len(long_run.watched.packed) == 4 * 2 * NUM_PROMPTS
    assert len(seen) == 7  # six full rollouts have orders of their own; two of one row cannot


def test_printed_plan_is_what_happens(long_run):
    """C21, L4: one optimiser step a mini-batch, epochs x mini-batches a rollout, as was printed."""
    plan = re.search(
        r"(\d+) responses a rollout; (\d+) responses an optimiser step; (\d+) optimiser steps a rollout "
        r"\((\d+) epochs of (\d+)\), (\d+) in all",
        long_run.printed,
    )
    assert [int(number) for number in plan.groups()] == [4, 2, 8, 4, 2, 2 * (3 * 8 + 4)]
    assert "8 steps in all" in long_run.printed
    assert [len(norms) for norms in long_run.watched.norms] == [56, 56]
    assert len(long_run.watched.train_lines()) == 8
    for optimizer in long_run.watched.optimizers:
        assert {int(state["step"]) for state in optimizer.state.values()} == {56}


def test_optimiser_settings(long_run):
    """L6, L8, L11: epsilon 1e-5 in both optimisers and in args.json; the rates of update u of U are (1 - (u - 1) / U)
    of their own peaks, in every group.
    """
    assert json.loads((long_run.folder / "args.json").read_text())["optimizer_eps"] == 1e-5
    for step, line in enumerate(long_run.watched.train_lines()):
        assert line["train/actor_learning_rate"] == pytest.approx(1e-3 * (1 - step / 8))
        assert line["train/critic_learning_rate"] == pytest.approx(3e-3 * (1 - step / 8))
    for name, rate in (("actor", 1e-3), ("critic", 3e-3)):
        for done in (1, 5):
            folder = long_run.folder / "checkpoints" / f"step-{done:08d}"
            groups = torch.load(folder / f"{name}_optimizer.pt", weights_only=True)["param_groups"]
            assert len(groups) == 2
            assert all(group["eps"] == 1e-5 for group in groups)
            assert [group["lr"] for group in groups] == pytest.approx([rate * (1 - (done - 1) / 8)] * 2)
    defaults = flags_of(World("", "", ""), "")
    assert defaults.critic_learning_rate == pytest.approx(3 * defaults.actor_learning_rate)


def test_gradients_are_clipped(long_run):
    """L10: no optimiser sees a norm above the bound; the logged one is from before the clip."""
    for norms, name in zip(long_run.watched.norms, ("actor", "critic"), strict=True):
        assert max(norms) <= 0.1 * (1 + 1e-5)
        assert max(line[f"train/{name}_grad_norm"] for line in long_run.watched.train_lines()) > 0.1


def test_every_update_logs_what_tells_health_from_a_hacked_reward(long_run):
    """W1, C20, C33, K6, K7: KL, perplexity, length, EOS, clip fractions, ratio, explained variance; they add up."""
    names = """
        kl_per_token kl_per_response kl_k3_per_token kl_coef kl_penalty score shaped_score reward perplexity
        response_length eos_rate entropy clip_fraction value_clip_fraction approx_kl ratio ratio_variance
        explained_variance policy_loss value_loss actor_grad_norm critic_grad_norm
    """
    wanted = {f"train/{name}" for name in names.split()}
    for line, experiences in zip(long_run.watched.train_lines(), long_run.watched.experiences, strict=True):
        assert wanted <= set(line)
        assert line["train/reward"] == pytest.approx(line["train/shaped_score"] - line["train/kl_penalty"], abs=1e-9)
        assert line["train/kl_k3_per_token"] >= 0
        num_tokens = sum(len(e.response) for e in experiences)
        logps = torch.cat([e.old_logps for e in experiences]).double()
        kl = (logps - torch.cat([e.ref_logps for e in experiences])).sum().item()
        assert line["train/score"] == pytest.approx(np.mean([e.score for e in experiences]), rel=1e-5)
        assert line["train/response_length"] == pytest.approx(num_tokens / len(experiences))
        assert line["train/eos_rate"] == pytest.approx(np.mean([e.ended for e in experiences]))
        assert line["train/perplexity"] == pytest.approx(np.exp(-logps.mean().item()), rel=1e-5)
        assert line["train/kl_per_response"] == pytest.approx(kl / len(experiences), abs=1e-5)
        assert line["train/kl_per_token"] == pytest.approx(kl / num_tokens, abs=1e-5)


def test_first_update_starts_at_the_reference(long_run):
    """P1, C35: the first rollout's KL is 0 to 1e-5 a token; the last one's is not."""
    lines = long_run.watched.train_lines()
    assert abs(lines[0]["train/kl_per_token"]) <= 1e-5
    assert lines[0]["train/kl_k3_per_token"] <= 1e-5
    assert lines[-1]["train/kl_k3_per_token"] > 1e-3


def test_adaptive_beta(long_run):
    """K3: beta of each rollout by hand from the one before; the checkpoint holds the one that comes next."""
    lines = long_run.watched.train_lines()
    beta = 0.05
    for step, line in enumerate(lines):
        assert line["train/kl_coef"] == pytest.approx(beta, rel=1e-9)
        error = min(max(line["train/kl_per_response"] / 0.5 - 1, -0.2), 0.2)
        beta *= 1 + error * len(long_run.watched.rows[step]) / 40
        path = long_run.folder / "checkpoints" / f"step-{step + 1:08d}" / "state.json"
        if path.is_file():
            assert json.loads(path.read_text())["extra"]["kl"]["value"] == pytest.approx(beta, rel=1e-9)
    assert beta != 0.05


def test_running_moments_of_scores(long_run):
    """K5: the checkpoint's moments are numpy's over all scores so far, those without EOS at -1."""
    scores = [e.score if e.ended else -1.0 for rollout in long_run.watched.experiences[:7] for e in rollout]
    state = json.loads((long_run.folder / "checkpoints" / "step-00000007" / "state.json").read_text())
    moments = state["extra"]["score_moments"]
    assert moments["count"] == len(scores) == 25
    assert moments["mean"] == pytest.approx(np.mean(scores), rel=1e-5)
    assert moments["m2"] == pytest.approx(np.var(scores) * len(scores), rel=1e-5)


def test_evaluations_are_repeatable_and_have_a_fixed_point(long_run, world, tmp_path, monkeypatch):
    """W3, W4: near-greedy answers to held-out prompts, stored with scores, twice the same; the data's own answers
    score the same at every evaluation.
    """
    lines = long_run.watched.val_lines()
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert len({line["val/reference_score"] for line in lines}) == 1
    assert len({line["val/score"] for line in lines}) > 1
    samples = [json.loads(line) for line in (long_run.folder / "samples.jsonl").read_text().splitlines()]
    scored = [s for s in samples if "score" in s]
    assert {(s["step"], len([1 for t in scored if t["step"] == s["step"]])) for s in scored} == {(0, 2), (4, 2), (8, 2)}
    for line in lines:  # the error bar is that of these very scores
        scores = [s["score"] for s in scored if s["step"] == line["step"]]
        assert line["val/score"] == pytest.approx(np.mean(scores), rel=1e-6)
        expected = 1.96 * np.std(scores, ddof=1) / len(scores) ** 0.5
        assert line["val/score_error"] == pytest.approx(expected, rel=1e-6)
    setting = set_up(flags_of(world, tmp_path / "run", eval_iters=0))
    prompts = setting.run.load_prompts("validation", tokenizer_for())
    heat = []
    monkeypatch.setattr(monitoring, "collect", lambda *args: heat.append(args[-1]) or collect(*args))
    tables = [evaluate_sampling(setting.run, setting.flags, setting.roles, setting.rewards, prompts) for _ in range(2)]
    assert tables[0] == tables[1]
    assert heat == [0.01, 0.01]
    assert len(tables[0][1]) == 6
    assert setting.flags.eval_temperature == 0.01


def test_the_kl_of_an_evaluation_is_that_of_plain_models(long_run, world, tmp_path, monkeypatch):
    """W1, W3: 0 to 1e-5 a token at the start; later the sum of log pi - log ref over each near-greedy answer, at the
    temperature of training, mean over the answers, as transformers alone computes it."""
    kls = [line["val/kl"] for line in long_run.watched.val_lines()]
    assert abs(kls[0]) <= 1e-4
    assert min(abs(kl) for kl in kls[1:]) > 1e-2
    answers = []
    monkeypatch.setattr(monitoring, "collect", lambda *args: answers.extend(collect(*args)) or answers)
    flags = flags_of(
        world, tmp_path / "run", eval_iters=0, temperature=0.7, rollout_mini_batch_size=4,
        sft_experiment_dir=str(long_run.folder / "final"),
    )  # fmt: skip
    setting = set_up(flags)
    setting.roles.reference = load_policy(world.sft, flags, trainable=False)
    prompts = setting.run.load_prompts("validation", tokenizer_for())
    found = evaluate_sampling(setting.run, flags, setting.roles, setting.rewards, prompts)[0]["val/kl"]
    policy, reference = (offline.causal(folder) for folder in (long_run.folder / "final", world.sft))
    total = 0.0
    with torch.no_grad():
        for e in answers:
            ids = torch.cat([e.prompt, e.response])
            logps = [(m(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1) for m in (policy, reference)]
            at = torch.arange(len(e.prompt) - 1, len(ids) - 1)
            total += (logps[0] - logps[1])[at, ids[at + 1]].sum().item()
    assert len(answers) == 6
    assert found == pytest.approx(total / 6, rel=1e-4)


def resumed(recorded: Recorded, folder: Path, at: int, flags) -> Path:
    """Copy a run as it was when it was killed after `at` steps' checkpoint, and resume the copy."""
    shutil.copytree(recorded.folder, folder, symlinks=True)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > at:
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "final")
    (folder / "summary.json").unlink()
    train(dataclasses.replace(flags, experiment_dir=str(folder), resume=True), pytest.MonkeyPatch())
    return folder


def assert_same_run(one: Path, other: Path, last: int) -> None:
    """Bit-equal: final weights, the last checkpoint with its optimisers, counters and moments, and the logs."""
    (name,) = (f.name for f in (one / "final").iterdir() if f.suffix == ".safetensors")
    folder = f"checkpoints/step-{last:08d}"
    for path in (f"final/{name}", f"{folder}/critic.safetensors"):
        expected, found = load_file(one / path), load_file(other / path)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    for path in (f"{folder}/actor_optimizer.pt", f"{folder}/critic_optimizer.pt"):
        expected, found = (torch.load(root / path, weights_only=True) for root in (one, other))
        for key, state in expected["state"].items():
            assert all(torch.equal(state[k], found["state"][key][k]) for k in state)
    states = [json.loads((root / folder / "state.json").read_text())["extra"] for root in (one, other)]
    for state in states:
        del state["log_sizes"]  # of lines with the times that they took
    assert states[0] == states[1]
    assert metrics_without_times(one) == metrics_without_times(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()


def test_resume_is_the_unbroken_run(long_run, world, tmp_path):
    """C4, L8, A10, K3, K5: killed after two of eight rollouts, in the middle of a pass, and resumed: bit-equal."""
    folder = resumed(long_run, tmp_path / "resumed", 2, flags_of(world, tmp_path, **LONG))
    assert_same_run(long_run.folder, folder, last=7)


def test_resume_of_adapters_is_the_unbroken_run(world, tmp_path):
    """C4, C11: four rollouts = 2 + resume + 2, bit for bit, with four LoRA roles over one base."""
    scorer = load_scorer(world.sft, flags_of(world, "", finetune_mode="lora", lora_rank=4), new_head=True)
    with torch.no_grad():
        for parameter in scorer.own_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    save_model(scorer, tokenizer_for(), tmp_path / "rm")
    flags = flags_of(
        world,
        tmp_path / "run",
        rm_experiment_dir=str(tmp_path / "rm"),
        finetune_mode="lora",
        lora_rank=4,
        max_steps=4,
        ppo_epochs=2,
        mini_batch_size=2,
        actor_learning_rate=1e-3,
        critic_learning_rate=1e-3,
        adaptive_kl_coeff=True,
        save_interval=1,
        keep_checkpoints=0,
    )
    watched = train(flags, pytest.MonkeyPatch())
    assert watched.roles.sharing == "four roles on 1 copy"
    assert abs(watched.train_lines()[0]["train/kl_per_token"]) <= 1e-5
    folder = resumed(Recorded(tmp_path / "run", watched, ""), tmp_path / "resumed", 2, flags)
    assert_same_run(tmp_path / "run", folder, last=3)


def test_critic_warmup_trains_the_critic_alone(world, tmp_path, monkeypatch):
    """P3, C33: for N updates the policy is bit-equal to SFT and the value loss falls; then the policy moves."""
    settings = {
        "shuffle": False,
        "rollout_size": NUM_PROMPTS,
        "mini_batch_size": NUM_PROMPTS,
        "ppo_epochs": 4,
        "epochs": 5,
        "max_steps": 4,
        "critic_learning_rate": 3e-3,
        "actor_learning_rate": 1e-3,
        "lr_schedule": "constant",
        "save_interval": 3,
        "eval_interval": 0,
    }
    watched = train(flags_of(world, tmp_path / "run", **settings, critic_warmup_steps=3), monkeypatch)
    start = load_file(Path(world.sft) / "model.safetensors")
    warm = load_file(tmp_path / "run" / "checkpoints" / "step-00000003" / "model" / "model.safetensors")
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(start[name], warm[name]) for name in start)
    assert not all(torch.equal(start[name], final[name]) for name in start)
    assert [len(norms) for norms in watched.norms] == [4, 16]
    losses = [line["train/value_loss"] for line in watched.train_lines() if len(line) > 20]
    assert losses[2] < 0.8 * losses[0]
    assert all("train/explained_variance" in line for line in watched.train_lines())
    assert ["train/policy_loss" in line for line in watched.train_lines()] == [False, False, False, True]
