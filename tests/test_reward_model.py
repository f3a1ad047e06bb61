"""The reward model's stage: where it starts, what it learns, and how it is normalised and judged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf import rlhf_rm
from rlhf.data.splits import load_split
from rlhf.flags import ModelFlags
from rlhf.losses.reward import last_token_reward_loss
from rlhf.models.loading import load_scorer
from rlhf.rlhf_rm import RMFlags, main, pack, pair_losses
from rlhf.trees.forest import Forest, Tree
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("reward")
    return {
        "data": make_data(root / "data", num_train=40, num_validation=24),
        "llama": make_model_dir(root / "llama"),
        "gpt2": make_model_dir(root / "gpt2", "gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3),
    }


@pytest.fixture(scope="module")
def trained(lab, tmp_path_factory) -> Path:
    """Two epochs of 40 pairs, then the report."""
    folder = tmp_path_factory.mktemp("trained") / "rm"
    main(
        quick_flags(
            RMFlags, lab["data"], folder, model_name=lab["llama"], max_steps=None, epochs=2.0, eval_iters=3,
        )
    )  # fmt: skip
    return folder


def scores_of(folder: Path, data: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw scores of the validation pairs by the saved model, chosen and rejected."""
    scorer, split = (
        load_scorer(str(folder / "final"), ModelFlags(), trainable=False),
        load_split(data, "preference", "validation"),
    )
    forest, _ = pack(split, list(range(len(split))))
    with torch.no_grad():
        scores = scorer(forest, forest.branch_last)
    return scores[0::2], scores[1::2]


def test_r4_one_epoch_with_the_rate_annealed_to_0(lab, tmp_path, monkeypatch):
    """R4: by default one epoch on a cosine: the last rate is below 1 % of the peak; each pair is seen once."""
    assert (RMFlags(data_dir="d").epochs, RMFlags(data_dir="d").lr_schedule) == (1.0, "cosine")
    seen = []
    monkeypatch.setattr(
        rlhf_rm, "pack", lambda split, rows: (seen.extend((split.name, i) for i in rows), pack(split, rows))[1]
    )
    flags = quick_flags(RMFlags, lab["data"], tmp_path, model_name=lab["llama"], mini_batch_size=2)
    flags.epochs, flags.max_steps = 1.0, None
    main(flags)
    rates = [line["train/learning_rate"] for line in metrics_of(tmp_path) if "train/loss" in line]
    assert len(rates) == 20
    assert rates[0] == flags.learning_rate
    assert 0 < rates[-1] < 0.01 * rates[0]
    assert sorted(i for name, i in seen if name == "train") == list(range(40))


@pytest.mark.parametrize("loss_type", ["last_token", "average", "per_sample"])
def test_r5_c5_one_forward_of_both_is_two_forwards(lab, loss_type):
    """R5, C5: chosen and rejected as two branches of one prompt, or apart on a prompt each: equal to 1e-6."""
    scorer = load_scorer(lab["llama"], ModelFlags(), new_head=True)
    split = load_split(lab["data"], "preference", "train")
    rows = list(range(6))
    forest, differ = pack(split, rows)
    losses, chosen, rejected = pair_losses(scorer, forest, differ, loss_type)
    apart = []
    for row in (split[i] for i in rows):
        n = row["prompt_len"]
        for ids in (row["chosen_input_ids"], row["rejected_input_ids"]):
            alone = Forest([Tree.of(ids[:n], ids[n:])])
            apart.append(scorer(alone, alone.branch_last))
    apart = torch.cat(apart)
    torch.testing.assert_close(chosen, apart[0::2], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(rejected, apart[1::2], rtol=3e-6, atol=1e-6)
    if loss_type == "last_token":
        torch.testing.assert_close(losses, last_token_reward_loss(apart[0::2], apart[1::2]), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["last_token", "average", "per_sample"])
def test_r5_equal_scores_cost_ln_2(lab, loss_type):
    """R5: a head of zeros scores everything 0."""
    scorer = load_scorer(lab["llama"], ModelFlags(), new_head=True)
    with torch.no_grad():
        scorer.head.weight.zero_()
    forest, differ = pack(load_split(lab["data"], "preference", "train"), [0, 1, 2])
    losses, *_ = pair_losses(scorer, forest, differ, loss_type)
    torch.testing.assert_close(losses, torch.full((3,), math.log(2)), rtol=0, atol=1e-6)


def test_r6_dropout_is_off_by_default(lab):
    """R6: with the defaults of the script, two forwards in `train()` are bit-equal, though GPT-2 has dropout 0.3."""
    scorer = load_scorer(lab["gpt2"], RMFlags(data_dir="d"), new_head=True)
    forest, differ = pack(load_split(lab["data"], "preference", "train"), [0, 1, 2])
    assert scorer.training
    losses = [pair_losses(scorer, forest, differ, "last_token")[0] for _ in range(2)]
    assert torch.equal(*losses)


def test_r7_rewards_are_normalised_on_the_validation_set(lab, trained):
    """R7: after save and load, (score - reward_mean) / reward_scale of the chosen responses has mean 0 and deviation
    1, over the whole validation split, though evaluations looked at a part of it."""
    config = json.loads((trained / "final" / "config.json").read_text())
    chosen, _ = scores_of(trained, lab["data"])
    rewards = (chosen - config["reward_mean"]) / config["reward_scale"]
    assert rewards.mean().item() == pytest.approx(0, abs=1e-3)
    assert rewards.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_r8_r9_the_report_is_of_every_validation_pair(lab, trained):
    """R8, R9: accuracy with n and interval, by slice; margins, calibration, length correlation, best-of-n gain; from
    the scores of the saved model, whatever --eval_iters says."""
    report = json.loads((trained / "report.json").read_text())
    assert set(report) == {
        "overall", "slices", "margin", "calibration", "length_correlation", "best_of_2_gain", "best_of_2_preferred",
    }  # fmt: skip
    chosen, rejected = scores_of(trained, lab["data"])
    assert report["overall"]["n"] == 24
    assert report["overall"]["accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
    low, high = report["overall"]["interval"]
    assert 0 <= low <= report["overall"]["accuracy"] <= high <= 1
    assert report["margin"]["mean"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-4)
    for slices in report["slices"].values():
        assert sum(part["n"] for part in slices.values()) == 24


def test_c32_a_planted_rule_is_learnt(lab, trained):
    """C32: chosen responses begin with Yes, rejected ones with No; after two epochs of 40 pairs the held-out accuracy
    is above 95 %."""
    report = json.loads((trained / "report.json").read_text())
    assert report["overall"]["accuracy"] > 0.95


def test_a7_c6_a_batch_changes_no_score(lab, trained):
    """C6, A7: the saved model's scores of 24 pairs packed together, and of each response alone, to 1e-4."""
    scorer = load_scorer(str(trained / "final"), ModelFlags(), trainable=False)
    split = load_split(lab["data"], "preference", "validation")
    chosen, _ = scores_of(trained, lab["data"])
    with torch.no_grad():
        for i in range(len(split)):
            ids = split[i]["chosen_input_ids"]
            forest = Forest([Tree.of(ids)])
            assert scorer(forest, forest.branch_last).item() == pytest.approx(chosen[i].item(), abs=1e-4)
