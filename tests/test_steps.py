"""One optimiser step: what it computes and logs, however it is cut, against the slow way and against itself."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf import rlhf_dpo, rlhf_kto, rlhf_rm, rlhf_sft
from rlhf.data.splits import load_split
from rlhf.errors import UserError
from rlhf.experiment.run import Step
from tests import offline
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags

NUM_TRAIN = 14
SCRIPTS: dict[str, tuple[Callable, type]] = {
    "sft": (rlhf_sft.main, rlhf_sft.SFTFlags),
    "rm": (rlhf_rm.main, rlhf_rm.RMFlags),
    "dpo": (rlhf_dpo.main, rlhf_dpo.DPOFlags),
    "kto": (rlhf_kto.main, rlhf_kto.KTOFlags),
}
STAGE = {"sft": "finetune", "rm": "preference", "dpo": "preference", "kto": "feedback"}
CUTS = {
    "1": {"micro_batch_size": 1},
    "2": {"micro_batch_size": 2},
    "8": {"micro_batch_size": 8},
    "tokens": {"micro_batch_tokens": 90},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("steps")
    return {
        "data": make_data(root / "data", num_train=NUM_TRAIN),
        "llama": make_model_dir(root / "llama"),
        "gpt2": make_model_dir(root / "gpt2", "gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3),
    }


def run(script: str, lab: dict[str, str], folder: Path, model: str = "llama", **given: Any) -> dict:
    main, flags = SCRIPTS[script]
    return main(quick_flags(flags, lab["data"], folder, model_name=lab[model], **given))


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def bit_equal(one: Path, other: Path) -> bool:
    a, b = final_weights(one), final_weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained_lines(folder: Path) -> list[dict[str, float]]:
    """The lines of steps, without what depends on the clock."""
    lines = [line for line in metrics_of(folder) if "train/loss" in line]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


@pytest.mark.parametrize("script", SCRIPTS)
def test_c3_l5_gradients_do_not_depend_on_the_cut(lab, tmp_path, script):
    """C3, L5: two SGD steps, of 8 rows and of the 6 that are left, cut into micro-batches of 1, 2, 8 and by tokens.

    The lengths are very unequal. SGD without clipping moves the weights by the rate times the gradient, so their
    change shows the gradient: equal to 1e-5 of its size.
    """
    options = {"optimizer": "sgd", "learning_rate": 0.5, "lr_schedule": "constant", "gradient_clip_val": 0.0}
    start = load_file(Path(lab["llama"]) / "model.safetensors")
    moved = {}
    for name, cut in CUTS.items():
        folder = tmp_path / name
        run(script, lab, folder, **options, **cut, mini_batch_size=8)
        end = final_weights(folder)
        # A new head is drawn from the seed, the same in each run: the first run's own start is unknown, its end not.
        moved[name] = {k: v - start[k] if k in start else v for k, v in end.items()}
    whole = torch.stack([delta.norm() for delta in moved["8"].values()]).norm()
    assert whole > 1e-2
    for name in ("1", "2", "tokens"):
        for key, delta in moved["8"].items():
            error = (moved[name][key] - delta).norm()
            assert error <= 1e-5 * delta.norm() + 1e-6 * whole, (name, key, error / delta.norm())


def rows_of(lab: dict[str, str], script: str, step: int, size: int) -> list[dict]:
    """The rows of a step of a run in file order."""
    split = load_split(lab["data"], STAGE[script], "train")
    first = (step - 1) % math.ceil(NUM_TRAIN / size) * size
    return [split[i] for i in range(first, min(first + size, NUM_TRAIN))]


VARIANTS = {
    "sft": ("sft", {}, {}),
    "sft-all-tokens": ("sft", {"use_targets": False}, {}),
    "rm-last_token": ("rm", {"loss_type": "last_token"}, {}),
    "rm-average": ("rm", {"loss_type": "average"}, {}),
    "rm-per_sample": ("rm", {"loss_type": "per_sample"}, {}),
    "dpo-sigmoid": ("dpo", {"beta": 0.3, "label_smoothing": 0.1, "sft_coef": 0.5}, {}),
    "dpo-ipo": ("dpo", {"loss_type": "ipo", "beta": 0.2}, {}),
    "dpo-hinge": ("dpo", {"loss_type": "hinge", "beta": 0.2}, {}),
    "dpo-free": ("dpo", {"beta": 0.3}, {"reference_free": True}),
    "kto": ("kto", {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}, {}),
    "kto-cut": ("kto", {}, {}),
    "kto-apo": ("kto", {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5}, {}),
    "kto-bco": ("kto", {"loss_type": "bco", "beta": 0.2}, {}),
    "kto-bco-cut": ("kto", {"loss_type": "bco"}, {}),
}


@pytest.mark.parametrize(("variant", "cut"), [*zip(VARIANTS, itertools.cycle(["1", "tokens", "2", "8"]))])
def test_c20_every_logged_number_is_that_of_the_whole_step(lab, tmp_path, variant, cut):
    """C20, C19, A8: three steps in windows of 6, 6 and 2 rows; every number of metrics.jsonl against plain
    transformers models, one row at a time, over all rows of the step; so is the norm of the gradient (C3).

    GPT-2 has dropout in its configuration, and none is seen with --disable_dropout (R6). The reference is stored by
    the run, and computed online here.
    """
    script, options, more = VARIANTS[variant]
    run(
        script, lab, tmp_path, "gpt2", **options, **more, **CUTS[cut], mini_batch_size=6, max_steps=3, shuffle=False,
        disable_dropout=True, save_interval=1, keep_checkpoints=0, learning_rate=1e-3, gradient_clip_val=0.0,
        lr_schedule="linear",
    )  # fmt: skip
    lines = {line["step"]: line for line in metrics_of(tmp_path) if "train/loss" in line}
    assert list(lines) == [1, 2, 3]
    reference = None if more else offline.causal(lab["gpt2"])
    earlier = {"earlier": []} if options.get("loss_type") == "bco" else {}
    for step, line in lines.items():
        if script == "rm" and step == 1:
            continue  # its head was drawn by the run, and is first saved after the step
        folder, rows = offline.model_before(tmp_path, step, lab["gpt2"]), rows_of(lab, script, step, 6)
        if script == "sft":
            model = offline.causal(folder)
            loss, expected = offline.sft_numbers(model, rows, **options)
            tokens = sum(len(row["input_ids"]) for row in rows)
        elif script == "kto":
            model = offline.causal(folder)
            loss, expected = offline.kto_numbers(model, reference, rows, **options, **earlier)
            tokens = sum(len(row["input_ids"]) for row in rows)
            if "train/kl" in expected:
                tokens += sum(len(row["input_ids"]) - row["prompt_len"] for row in rows)
        else:
            tokens = sum(
                len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) - row["prompt_len"] for row in rows
            )
            if script == "rm":
                model = offline.classifier(folder)
                loss, expected = offline.rm_numbers(model, rows, **options)
            else:
                model = offline.causal(folder)
                loss, expected = offline.dpo_numbers(model, reference, rows, **options)
        expected["train/grad_norm"] = offline.grad_norm(model, loss)
        expected["train/learning_rate"] = 1e-3 * (1 - (step - 1) / 3)
        measured = {name: value for name, value in line.items() if name.startswith("train/")}
        if script in ("dpo", "kto") and step == 1 and not more:
            # The policy is the reference: rounding alone says which of two equal rewards is the larger.
            expected["train/accuracy"] = measured["train/accuracy"]
        assert measured == pytest.approx(expected, rel=2e-5, abs=2e-5)
        assert set(line) == {"step", *expected, "perf/tokens_per_second", "perf/step_seconds"}
        assert line["perf/tokens_per_second"] * line["perf/step_seconds"] == pytest.approx(tokens)


@pytest.mark.parametrize("script", SCRIPTS)
def test_c21_the_printed_plan_is_what_happens(lab, tmp_path, capsys, script):
    """C21: rows a step, steps an epoch and in all, as printed before the start, match the counters after the run."""
    summary = run(script, lab, tmp_path, mini_batch_size=4, max_steps=None, epochs=1.5)
    plan = re.search(
        r"(\d+) (?:rows|pairs); (\d+) \S+ a step \((\d+) on each of (\d+) devices, (\d+) at once\); (\d+) steps an "
        r"epoch, (\d+) steps in all",
        capsys.readouterr().out,
    )
    assert [int(number) for number in plan.groups()] == [NUM_TRAIN, 4, 4, 1, 8, 4, 6]
    assert summary["steps"] == 6
    assert [line["step"] for line in trained_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("script", SCRIPTS)
def test_c27_two_runs_are_bit_equal_and_another_seed_is_another_run(lab, tmp_path, script):
    """C27: with dropout and shuffling; weights, numbers and samples."""
    options = {"eval_interval": 1, "disable_dropout": False}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)  # whatever else was drawn in the process
        run(script, lab, tmp_path / name, "gpt2", seed=seed, **options)
    assert bit_equal(tmp_path / "a", tmp_path / "b")
    assert trained_lines(tmp_path / "a") == trained_lines(tmp_path / "b")
    assert not bit_equal(tmp_path / "a", tmp_path / "c")
    if script != "rm":
        samples = [(tmp_path / name / "samples.jsonl").read_text() for name in "abc"]
        assert samples[0] == samples[1]
        assert samples[0] != samples[2]


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_c27_streams_do_not_touch_each_other(lab, tmp_path, script):
    """C27: the order, the dropout and the samples each have their own stream: none moves because another is used.

    Evaluations and their samples, logging, saving, packing ahead, and the length of the samples leave the training
    as it was; in file order and without dropout the seed has nothing left to change.
    """
    run(script, lab, tmp_path / "plain", "gpt2", disable_dropout=False)
    busy = {
        "eval_interval": 1, "log_interval": 2, "save_interval": 1, "num_workers": 2, "max_new_tokens": 9,
        "temperature": 0.7, "logger": "csv",
    }  # fmt: skip
    run(script, lab, tmp_path / "busy", "gpt2", disable_dropout=False, **busy)
    assert bit_equal(tmp_path / "plain", tmp_path / "busy")
    for seed in (1, 2):
        run(script, lab, tmp_path / str(seed), "gpt2", disable_dropout=True, shuffle=False, seed=seed)
    assert bit_equal(tmp_path / "1", tmp_path / "2")


def test_c27_the_folder_says_what_a_number_depends_on(lab, tmp_path):
    """C27: configuration, versions, hardware, the data's tokenizer, and a hash of each split."""
    run("sft", lab, tmp_path)
    args = json.loads((tmp_path / "args.json").read_text())
    assert (args["seed"], args["mini_batch_size"]) == (42, 4)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert {"torch", "transformers", "lightning", "peft"} <= set(environment["versions"])
    assert environment["versions"]["torch"] == torch.__version__
    data = json.loads((tmp_path / "data.json").read_text())
    assert data["stages"]["finetune"]["tokenizer"]["fingerprint"]
    splits = [load_split(lab["data"], "finetune", name) for name in ("train", "validation")]
    assert data["read"] == {f"finetune_{split.name}": split.fingerprint for split in splits}


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradient_clipping_bounds_the_step(lab, tmp_path, script):
    """L10: the norm before clipping is logged, and an SGD step is as long as the bound."""
    options = {"optimizer": "sgd", "learning_rate": 1.0, "lr_schedule": "constant", "max_steps": 1}
    run(script, lab, tmp_path / "free", gradient_clip_val=0.0, **options)
    run(script, lab, tmp_path / "clipped", gradient_clip_val=0.01, **options)
    (line,) = trained_lines(tmp_path / "clipped")
    assert line["train/grad_norm"] > 0.02
    start = load_file(Path(lab["llama"]) / "model.safetensors")
    free, clipped = (final_weights(tmp_path / name) for name in ("free", "clipped"))
    names = [name for name in start if name in free]
    lengths = [
        torch.stack([(end[name] - start[name]).norm() for name in names]).norm().item() for end in (free, clipped)
    ]
    assert lengths[1] <= 0.01 * 1.001
    assert lengths[0] / lengths[1] == pytest.approx(line["train/grad_norm"] / 0.01, rel=1e-3)


def _spoil(monkeypatch, steps: tuple[int, ...]) -> None:
    """Make the gradient of these steps (from 0) NaN."""
    update = Step.update

    def spoiled(self, optimizer, **options):
        if self.run.step_index in steps:
            next(p for group in optimizer.param_groups for p in group["params"]).grad.fill_(float("nan"))
        return update(self, optimizer, **options)

    monkeypatch.setattr(Step, "update", spoiled)


def test_c25_a_gradient_that_is_not_finite_stops_the_run_with_its_rows(lab, tmp_path, monkeypatch):
    """C25: the step and its rows are named; nothing of it reaches the weights."""
    _spoil(monkeypatch, (1,))
    what = r"the gradient of model.layers.0.self_attn.q_proj.weight is not finite \(training rows \[4, 5, 6, 7\]\)"
    with pytest.raises(UserError, match=f"step 1: the gradient norm is nan: {what}"):
        run("sft", lab, tmp_path, shuffle=False)
    assert not (tmp_path / "final").exists()


def test_c25_such_steps_may_be_skipped_and_are_counted(lab, tmp_path, monkeypatch):
    """C25: with --skip_nonfinite_steps=1 the second step changes nothing, and a second bad one is one too many."""
    _spoil(monkeypatch, (1,))
    run("sft", lab, tmp_path / "skipped", max_steps=2, skip_nonfinite_steps=1, lr_schedule="constant")
    line = trained_lines(tmp_path / "skipped")[-1]
    assert line["train/skipped_steps"] == 1
    assert line["train/grad_norm"] is None  # JSON has no NaN
    run("sft", lab, tmp_path / "one", max_steps=1, lr_schedule="constant")
    assert bit_equal(tmp_path / "skipped", tmp_path / "one")
    _spoil(monkeypatch, (0,))
    with pytest.raises(UserError, match="step 1"):
        run("sft", lab, tmp_path / "two", skip_nonfinite_steps=1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_c25_a_loss_that_is_not_finite_is_not_trained_on(lab, tmp_path, monkeypatch, script):
    """C25: also where its gradient is finite, in one of two micro-batches, whose rows are named: the step is skipped,
    or stops the run."""
    backward, first = Step.backward, set()

    def spoiled(self, loss, **options):
        if self.run.step_index == 1 and not first & {id(self)}:
            first.add(id(self))
            loss = loss + float("inf")
        return backward(self, loss, **options)

    options = {"micro_batch_size": 2, "shuffle": False, "lr_schedule": "constant"}
    run(script, lab, tmp_path / "one", max_steps=1, **options)
    monkeypatch.setattr(Step, "backward", spoiled)
    with pytest.raises(UserError, match=r"step 1: the loss is inf \(training rows \[4, 5\]\)"):
        run(script, lab, tmp_path / "stopped", **options)
    first.clear()
    run(script, lab, tmp_path / "skipped", max_steps=3, skip_nonfinite_steps=1, save_interval=2, **options)
    assert trained_lines(tmp_path / "skipped")[-1]["train/skipped_steps"] == 1
    skipped = load_file(tmp_path / "skipped" / "checkpoints" / "step-00000002" / "model" / "model.safetensors")
    assert all(torch.equal(skipped[name], value) for name, value in final_weights(tmp_path / "one").items())
    assert not bit_equal(tmp_path / "skipped", tmp_path / "one")
