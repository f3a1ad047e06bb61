"""rlhf_online_dpo.py on a tiny world: which pairs it makes, what it learns, TRL's trainer on the same pairs, resume."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf import rlhf_online_dpo
from rlhf.errors import UserError
from rlhf.experience import Experience
from rlhf.rlhf_online_dpo import OnlineDPOFlags, pack, pairs_of, ref_logps_of
from tests.grpo import World, make_world, train
from tests.peers import require_trl
from tests.splits import metrics_of, quick_flags, tokenizer_for
from tests.test_parity_grpo import flat, names_of


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def flags_of(world: World, folder: Path | str, **changes: Any) -> OnlineDPOFlags:
    """Small flags: a step of 4 prompts with 2 responses of at most 8 tokens; no evaluation, no saving."""
    settings = {
        "sft_experiment_dir": world.sft,
        "reward": world.reward("distinct"),
        "rollout_size": 4,
        "max_new_tokens": 8,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "eval_iters": 1,
        "max_chosen_drop": 100.0,
    }
    return quick_flags(OnlineDPOFlags, world.data, Path(folder), **{**settings, **changes})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"num_samples": 1}, "--num_samples=1 makes no pair"),
        ({"judge": "f.py:f", "num_samples": 3}, "--judge compares two responses"),
        ({"loss_type": ["aot"]}, "--loss_type aot: aot, aot_unpaired and orpo need more"),
        ({"loss_type": ["orpo"], "beta": 0.1}, "--loss_type orpo: aot, aot_unpaired and orpo need more"),
        ({"loss_type": ["dpo"]}, "dpo is none of sigmoid"),
        ({"top_k": 5}, "online DPO trains on the distribution that it samples from"),
        ({"rollout_size": 12}, "is no multiple of --mini_batch_size=8"),
        ({"missing_eos_penalty": -1.0}, "must not be below 0"),
        ({"ref_update_interval": 2, "finetune_mode": "lora"}, "needs a reference with weights of its own"),
    ],
)
def test_flags_that_contradict_each_other(given, complaint):
    with pytest.raises(UserError, match=complaint):
        OnlineDPOFlags(data_dir="", **given)


def experience(score: float, *, ended: bool = True, ids: tuple[int, ...] = (11, 12)) -> Experience:
    logps = torch.arange(len(ids)).float()
    return Experience(0, torch.tensor([5, 6, 7]), torch.tensor(ids), logps, -logps, None, score, ended)


def test_pairs_by_hand():
    """The highest and the lowest of three, the first of equals; no pair where all are equal; the penalty first."""
    scores = ((1.0, 3.0, 0.0), (2.0, 2.0, 2.0), (0.0, 5.0, 5.0))
    experiences = [experience(s) for group in scores for s in group]
    flags = OnlineDPOFlags(data_dir="", num_samples=3)
    number = {id(e): i for i, e in enumerate(experiences)}
    assert [(number[id(best)], number[id(worst)]) for best, worst in pairs_of(experiences, flags)] == [(1, 2), (7, 6)]
    experiences[4].ended = False
    flags.missing_eos_penalty = 0.5
    found = pairs_of(experiences, flags)
    assert len(found) == 3
    assert found[1][0] is experiences[3]
    assert found[1][1] is experiences[4]


def test_a_pair_is_one_tree_and_the_reference_is_in_its_order():
    pairs = [(experience(1.0), experience(0.0, ids=(13,))), (experience(2.0, ids=(14, 15, 16)), experience(1.0))]
    forest, rows = pack(pairs, [1, 0])
    assert rows == [1, 0]
    assert forest.input_ids.tolist() == [5, 6, 7, 14, 15, 16, 11, 12, 5, 6, 7, 11, 12, 13]
    assert ref_logps_of(pairs, forest, rows).tolist() == [0, -1, -2, 0, -1, 0, -1, 0]
    assert forest.num_targets == 8


@pytest.mark.parametrize("given", [{}, {"loss_type": ["ipo"], "beta": 0.2}, {"num_samples": 8, "rollout_epochs": 2}])
def test_learns_a_planted_reward(given, world, tmp_path):
    """From under a half of the largest reward to nine tenths of it: 8 tokens of even ids, and no EOS."""
    settings = {"num_samples": 6, "beta": 0.05, "learning_rate": 1e-2, "max_steps": 60, "on_collapse": "warn", **given}
    watched = train(rlhf_online_dpo, flags_of(world, tmp_path / "run", **settings))
    scores = [line["train/score"] for line in watched.train_lines()]
    assert scores[0] < 0.5
    assert min(scores[-3:]) >= 0.9, scores


def test_what_a_step_logs(world, tmp_path):
    watched = train(rlhf_online_dpo, flags_of(world, tmp_path / "run", max_steps=2, eval_interval=1))
    first = watched.train_lines()[0]
    assert first["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["train/pairs"] == 4
    for name in ("margin", "chosen_reward", "rejected_reward", "kl_per_token", "chosen_logp_change_per_token"):
        assert first[f"train/{name}"] == pytest.approx(0, abs=1e-4)
    second = watched.train_lines()[1]
    assert second["train/score"] == pytest.approx(sum(e.score for e in watched.experiences[1]) / 8)
    assert {"val/score", "val/kl", "val/response_length", "val/eos_rate"} <= {
        k for line in watched.metrics for k in line
    }


def test_equal_rewards_make_no_pair_and_teach_nothing(world, tmp_path):
    flags = flags_of(world, tmp_path / "run", reward=world.reward("same"), max_steps=2)
    watched = train(rlhf_online_dpo, flags)
    assert [line["train/pairs"] for line in watched.train_lines()] == [0, 0]
    assert watched.gradients == []
    before, after = (load_file(Path(f) / "model.safetensors") for f in (world.sft, tmp_path / "run" / "final"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_judge_decides(world, tmp_path, monkeypatch):
    """The pairs are the judge's, whatever the rewards: the response with more spaces first, none where it is a tie."""
    seen = []
    judged = rlhf_online_dpo.pairs_judged
    monkeypatch.setattr(rlhf_online_dpo, "pairs_judged", lambda *args: seen.append(judged(*args)) or seen[-1])
    flags = flags_of(world, tmp_path / "run", judge=f"{world.rewards}:judge", rollout_size=12, mini_batch_size=12)
    watched = train(rlhf_online_dpo, flags)
    decode = tokenizer_for().decode
    spaces = [decode(e.response, skip_special_tokens=True).count(" ") for e in watched.experiences[0]]
    expected = []
    for g in range(12):
        if spaces[2 * g] != spaces[2 * g + 1]:
            better = int(spaces[2 * g + 1] > spaces[2 * g])
            expected.append((2 * g + better, 2 * g + 1 - better))
    assert [(best.position, worst.position) for best, worst in seen[0]] == expected
    assert 0 < len(expected) < 12
    assert {better % 2 for better, _ in expected} == {0, 1}
    assert watched.train_lines()[0]["train/pairs"] == len(expected)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "broken_judge",
            r"the judge broken_judge failed on rows 0 to \d+ of .*prompts_train.* \(KeyError: 'no verdict'\)",
        ),
        ("undecided_judge", r"the judge undecided_judge returned \[0.5, .* for 4 pairs"),
        ("no_judge", "has no function 'no_judge'"),
    ],
)
def test_a_judge_that_fails_is_named(name, complaint, world, tmp_path):
    with pytest.raises(UserError, match=complaint):
        train(rlhf_online_dpo, flags_of(world, tmp_path / "run", judge=f"{world.rewards}:{name}", shuffle=False))


def test_the_cut_of_a_step_changes_nothing(world, tmp_path):
    """C3: micro-batches of one pair, decoded two at a time."""
    given = {"max_steps": 2, "rollout_epochs": 2, "sft_coef": 0.1, "learning_rate": 1e-2}
    whole = train(rlhf_online_dpo, flags_of(world, tmp_path / "whole", **given))
    cut = {"micro_batch_size": 1, "rollout_mini_batch_size": 2}
    parts = train(rlhf_online_dpo, flags_of(world, tmp_path / "parts", **given, **cut))
    for one, other in zip(whole.gradients, parts.gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5 * one.abs().max().item())


def test_lora_keeps_one_copy_and_a_reference(world, tmp_path):
    given = {"finetune_mode": "lora", "lora_rank": 2, "max_steps": 3, "learning_rate": 0.05}
    lines = train(rlhf_online_dpo, flags_of(world, tmp_path / "run", **given)).train_lines()
    assert abs(lines[0]["train/kl_k3_per_token"]) <= 1e-5
    assert lines[2]["train/kl_k3_per_token"] > 1e-4


def test_without_a_reference(world, tmp_path):
    """SimPO on fresh pairs: no reference is loaded, no KL is logged."""
    flags = flags_of(world, tmp_path / "run", loss_type=["simpo"], beta=2.0, max_chosen_drop=1.0)
    (line,) = train(rlhf_online_dpo, flags).train_lines()
    assert not any("kl_per" in name for name in line)
    assert "train/chosen_logp_per_token" in line


def test_another_model_may_be_the_reference(world, tmp_path):
    moved = tmp_path / "moved"
    train(rlhf_online_dpo, flags_of(world, moved, learning_rate=1e-2))
    (line,) = train(rlhf_online_dpo, flags_of(world, tmp_path / "run", reference=str(moved))).train_lines()
    assert line["train/kl_k3_per_token"] > 1e-4


def test_a_warning_when_the_chosen_fall(world, tmp_path, capsys):
    flags = flags_of(world, tmp_path / "run", max_chosen_drop=0.001, max_steps=20, learning_rate=5e-3, beta=1.0)
    flags.num_samples = 2
    train(rlhf_online_dpo, flags)
    assert capsys.readouterr().out.count("nats a token below the reference") == 1


def test_one_step_of_trl_on_the_same_pairs(world, tmp_path):
    """Gradients of three steps, and the last weights: TRL 1.16.0's trainer on what the script sampled and scored."""
    require_trl()
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    sgd = {"optimizer": "sgd", "lr_schedule": "constant", "gradient_clip_val": 0.0, "learning_rate": 0.05}
    given = {"max_steps": 3, "missing_eos_penalty": 0.3, "beta": 0.2, **sgd}
    ours = train(rlhf_online_dpo, flags_of(world, tmp_path / "run", **given))
    rollouts, gradients = iter(ours.experiences), []

    class Replayed(OnlineDPOTrainer):
        """The trainer on responses and scores that are given."""

        def _generate(self, *_):
            rollout = next(rollouts)
            self.replayed = rollout[0::2] + rollout[1::2]  # all first responses, then all second ones
            pad_id = self.processing_class.pad_token_id
            sides = []
            for name in ("prompt", "response"):
                ids = [getattr(e, name).tolist() for e in self.replayed]
                width = max(map(len, ids))
                for values in (ids, [[1] * len(row) for row in ids]):
                    fill = pad_id if values is ids else 0
                    padding = [[fill] * (width - len(row)) for row in values]
                    pairs = zip(padding, values, strict=True)
                    rows = [pad + row if name == "prompt" else row + pad for pad, row in pairs]
                    sides.append(torch.tensor(rows))
            return (*sides, None)

        def _calculate_rewards_from_functions(self, *_, **__):
            return torch.tensor([e.score for e in self.replayed])

        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(
                lambda *_: gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters()})
            )
            return optimizer

    def language_model():
        return AutoModelForCausalLM.from_pretrained(world.sft, dtype=torch.float32)

    settings = {
        "output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "max_steps": 3, "learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0,
        "optim": "sgd", "weight_decay": 0.0, "beta": 0.2, "missing_eos_penalty": 0.3, "max_new_tokens": 8,
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "disable_dropout": True,
    }  # fmt: skip
    trainer = Replayed(
        model=language_model(),
        ref_model=language_model(),
        reward_funcs=lambda **_: None,
        args=OnlineDPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(12)]),
        processing_class=tokenizer_for(),
    )
    trainer.train()
    names = names_of(world)
    assert len(gradients) == len(ours.gradients) == 3
    for step, (one, other) in enumerate(zip(ours.gradients, gradients, strict=True)):
        gap = (one - flat(other, names)).norm() / one.norm()
        assert gap <= (1e-5 if step == 0 else 1e-4), f"step {step} differs by {gap:.1e} of the gradient"


LONG = {
    "max_steps": 6,
    "mini_batch_size": 2,
    "rollout_epochs": 2,
    "learning_rate": 5e-3,
    "eval_interval": 2,
    "save_interval": 1,
    "keep_checkpoints": 0,
    "ref_update_interval": 2,
    "ref_mixup": 1.0,
}


def without_times(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in metrics_of(folder)]


def test_iterative_dpo_and_resume(world, tmp_path):
    """Rounds of two steps, each with the policy at its beginning as the reference: the KL starts at 0 in each, the
    loss at ln 2. C4: killed in the middle of a round and resumed, bit-equal, reference included."""
    flags = flags_of(world, tmp_path / "run", **LONG)
    lines = train(rlhf_online_dpo, flags).train_lines()
    for step, line in enumerate(lines):
        if step % 2 == 0:
            assert line["train/kl_k3_per_token"] <= 1e-5
        else:
            assert line["train/kl_k3_per_token"] > 1e-4
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run", folder, symlinks=True)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > 3:
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "final")
    (folder / "summary.json").unlink()
    train(rlhf_online_dpo, dataclasses.replace(flags, experiment_dir=str(folder), resume=True))
    one, other = (load_file(f / "final" / "model.safetensors") for f in (tmp_path / "run", folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert without_times(tmp_path / "run") == without_times(folder)
