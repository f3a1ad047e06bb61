"""rlhf_dpo.py beyond DPO: every loss learns, references that move or are not there, and what each logs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rlhf import rlhf_dpo
from rlhf.data.splits import load_split
from rlhf.errors import UserError
from rlhf.experiment.run import Step
from rlhf.models.loading import load_policy
from rlhf.pairwise import LOSS_TYPES, REFERENCE_FREE
from rlhf.rlhf_dpo import DPOFlags, main
from tests import offline
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags

NEEDS = {
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.1},
    "simpo": {"beta": 2.0},
    "apo_down": {"beta": 2.0, "length_normalize": True},
}
MOVING = {"ref_update_interval": 2, "ref_mixup": 0.25, "beta": 0.5}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("family")
    return {
        "data": make_data(root / "data", num_train=64, num_validation=40),
        "model": make_model_dir(root / "model"),
        "wide": make_model_dir(root / "wide", hidden_size=64),
    }


def run(lab: dict[str, str], folder: Path, **given) -> dict:
    return main(quick_flags(DPOFlags, lab["data"], folder, **{"model_name": lab["model"], **given}))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_c32_every_loss_learns_a_planted_rule(lab, tmp_path, name):
    """C32's rule, without a reward model: chosen responses begin with Yes, rejected ones with No, whatever their
    lengths. Held-out pairs are told apart, by the loss's own reward, above 95 %; at the start they are not."""
    given = {"max_steps": 80, "learning_rate": 5e-3, "mini_batch_size": 8, "eval_interval": 80, "eval_iters": 0}
    found = run(lab, tmp_path, loss_type=[name], **given, **NEEDS.get(name, {}))
    start = metrics_of(tmp_path)[0]
    if name in REFERENCE_FREE:
        assert start["val/accuracy"] < 0.6
    else:  # rounding decides between rewards that are all 0
        assert start["val/margin"] == pytest.approx(0.0, abs=1e-5)
    assert found["val/accuracy"] > 0.95
    assert found["val/loss"] < start["val/loss"]


# ------------------------------------------------------------------------------------------------- no reference


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_reference_free_losses_load_and_store_nothing(lab, tmp_path, monkeypatch, capsys, name):
    """One model is loaded, no log-probabilities are stored, no change against a reference is logged or warned of."""
    loaded = []
    load = rlhf_dpo.load_policy
    monkeypatch.setattr(rlhf_dpo, "load_policy", lambda *args, **options: loaded.append(args) or load(*args, **options))
    data = make_data(tmp_path / "data", num_train=4, num_validation=4)
    run({**lab, "data": data}, tmp_path / "run", loss_type=[name])
    printed = capsys.readouterr().out
    assert len(loaded) == 1
    assert f"no reference (--loss_type {name})" in printed
    assert "warning" not in printed
    assert not (Path(data) / "reference_logps").exists()
    keys = set().union(*metrics_of(tmp_path / "run"))
    assert {f"{part}/chosen_logp_per_token" for part in ("train", "val")} <= keys
    assert not any("change" in key or "kl" in key for key in keys)


@pytest.mark.parametrize(("name", "prompts"), [("orpo", True), ("cpo", False), ("sigmoid", False)])
def test_held_out_loss_has_its_likelihood(lab, tmp_path, name, prompts):
    """val/loss by a plain model: the pairs' mean, and the likelihood a token of chosen responses (ORPO: sequences)."""
    given = {"sft_coef": 0.5, "reference_free": True} if name == "sigmoid" else {}
    found = run(lab, tmp_path, loss_type=[name], eval_iters=0, save_interval=2, **given)
    model, losses, nll, tokens = offline.causal(tmp_path / "final"), [], 0.0, 0
    with torch.no_grad():
        for row in load_split(lab["data"], "preference", "validation"):
            path = {side: offline.logps(model, row[f"{side}_input_ids"]) for side in ("chosen", "rejected")}
            own = {side: logps[row["prompt_len"] - 1 :] for side, logps in path.items()}
            if name == "orpo":
                p = {side: logps.mean().exp() for side, logps in own.items()}
                odds = {side: x / (1 - x) for side, x in p.items()}
                losses.append(0.1 * (1 + odds["rejected"] / odds["chosen"]).log())
            else:
                losses.append((1 + torch.exp(-0.1 * (own["chosen"].sum() - own["rejected"].sum()))).log())
            counted = path["chosen"] if prompts else own["chosen"]
            nll, tokens = nll - counted.sum().item(), tokens + len(counted)
    weight = 0.5 if name == "sigmoid" else 1.0
    assert found["val/loss"] == pytest.approx(torch.stack(losses).mean().item() + weight * nll / tokens, rel=1e-4)


# ------------------------------------------------------------------------------------------------ AOT over a step


def gradients(monkeypatch, lab, folder: Path, **given) -> list[torch.Tensor]:
    """Those of the first step, which starts where the reference is not, so that no two margins are equal."""
    found: list[torch.Tensor] = []
    update = Step.update

    def watched(self, optimizer, **options):
        found.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
        return update(self, optimizer, **options)

    monkeypatch.setattr(Step, "update", watched)
    options = {"max_steps": 1, "mini_batch_size": 6, "eval_iters": 1, "gradient_clip_val": 0.0}
    run(lab, folder, reference=lab["wide"], length_normalize=True, beta=1.0, **options, **given)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_c3_aot_sorts_the_whole_step(lab, tmp_path, monkeypatch, name):
    """C3: micro-batches of one, of four and two, and by tokens give the gradient of six pairs at once."""
    whole = gradients(monkeypatch, lab, tmp_path / "whole", loss_type=[name], micro_batch_size=6)
    size = torch.stack([g.norm() for g in whole]).norm()
    for cut in ({"micro_batch_size": 1}, {"micro_batch_size": 4}, {"micro_batch_tokens": 40}):
        parts = gradients(monkeypatch, lab, tmp_path / str(cut), loss_type=[name], **cut)
        for a, b in zip(whole, parts, strict=True):
            assert (a - b).norm() <= 1e-5 * (a.norm() + 0.1 * size)
    plain = gradients(monkeypatch, lab, tmp_path / "dpo", micro_batch_size=6)
    assert max((a - b).norm() for a, b in zip(whole, plain, strict=True)) > 1e-3 * size, "ranks agreed: nothing sorted"


def test_aot_needs_no_second_pass_where_a_step_is_one_micro_batch(lab, tmp_path, monkeypatch):
    passes, run_pairs = [], rlhf_dpo.pair_logps
    monkeypatch.setattr(
        rlhf_dpo, "pair_logps", lambda *args: (passes.append(torch.is_grad_enabled()), run_pairs(*args))[1]
    )
    given = {"loss_type": ["aot"], "max_steps": 1, "mini_batch_size": 4, "eval_iters": 1}
    run(lab, tmp_path / "one", micro_batch_size=4, **given)
    assert passes == [True, False]  # the step, the evaluation
    passes.clear()
    run(lab, tmp_path / "two", micro_batch_size=2, **given)
    assert passes == [False, False, True, True, False, False]


# ---------------------------------------------------------------------------------------------- moving references


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_reference_moves_as_tr_dpo_says(lab, tmp_path, capsys):
    """After steps 2 and 4 of 5, ref = 1/4 policy + 3/4 ref; nothing is stored. The hard update copies the policy."""
    data = make_data(tmp_path / "data")
    run({**lab, "data": data}, tmp_path / "run", max_steps=5, save_interval=1, keep_checkpoints=0, **MOVING)
    assert not (Path(data) / "reference_logps").exists()
    assert "none of its log-probabilities are stored" in capsys.readouterr().out
    before = weights(offline.causal(lab["model"]))
    for step in (1, 2, 3, 4):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        policy = weights(offline.causal(folder / "model"))
        reference = load_policy(lab["model"], DPOFlags(data_dir="d"))
        reference.load_state_dict(load_file(folder / "reference.safetensors"), strict=False)
        if step % 2 == 0:
            before = {name: 0.25 * policy[name] + 0.75 * before[name] for name in before}
        for name, value in weights(reference.model).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    lines = [line for line in metrics_of(tmp_path / "run") if "train/chosen_reward" in line]
    assert lines[1]["train/chosen_reward"] != 0.0

    run(lab, tmp_path / "hard", max_steps=3, ref_update_interval=1, ref_mixup=1.0)
    for line in metrics_of(tmp_path / "hard"):  # before each step the reference is the policy
        if "train/margin" in line:
            assert line["train/margin"] == pytest.approx(0.0, abs=1e-5)
            assert line["train/loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("given", [MOVING, {"loss_type": ["aot", "orpo"], "micro_batch_size": 3}])
def test_c4_resumed_is_unbroken(lab, tmp_path, given):
    """C4: four steps are two, a stop, and two more, bit for bit: with a reference that has moved, and with AOT."""
    run(lab, tmp_path / "whole", max_steps=4, save_interval=1, **given)
    run(lab, tmp_path / "parts", max_steps=4, save_interval=2, **given)
    for gone in ("checkpoints/step-00000004", "final"):
        folder = tmp_path / "parts" / gone
        if folder.exists():
            folder.rename(tmp_path / f"gone-{folder.name}")
    run(lab, tmp_path / "parts", max_steps=4, save_interval=2, resume=True, **given)
    whole, parts = (weights(offline.causal(tmp_path / name / "final")) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [
        {line["step"]: line["train/loss"] for line in metrics_of(tmp_path / n) if "train/loss" in line}
        for n in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_a_reference_of_another_shape_cannot_move(lab, tmp_path):
    with pytest.raises(UserError, match="--ref_update_interval mixes the weights of policy and --reference"):
        run(lab, tmp_path, reference=lab["wide"], **MOVING)


def test_the_last_layer_alone_moves(lab, tmp_path):
    """--finetune_mode=last_layer: the checkpoint's reference holds what is trained, and nothing else."""
    run(lab, tmp_path, finetune_mode="last_layer", save_interval=2, max_steps=3, **MOVING)
    stored = load_file(tmp_path / "checkpoints" / "step-00000002" / "reference.safetensors")
    assert stored
    assert not any("layers.0." in name for name in stored)


def test_options_are_logged(lab, tmp_path):
    """--wpo_weighting logs its weights, in (0, 1] of unlikely responses; ORPO the likelihood of whole sequences."""
    run(lab, tmp_path, loss_type=["sigmoid", "orpo"], wpo_weighting=True, ld_alpha=0.5, max_steps=1)
    first = metrics_of(tmp_path)[0]
    assert 0 < first["train/wpo_weight"] < 1
    assert first["train/path_nll"] > 0
