"""The scripts in process on tiny splits: their folders, resuming, repeating, and what a user gets wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rlhf import rlhf_dpo, rlhf_kto, rlhf_rm, rlhf_sft
from rlhf.data.splits import load_split
from rlhf.errors import UserError
from rlhf.experiment.run import Step
from rlhf.flags import parse
from tests import offline
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "sft": (rlhf_sft.main, rlhf_sft.SFTFlags),
    "rm": (rlhf_rm.main, rlhf_rm.RMFlags),
    "dpo": (rlhf_dpo.main, rlhf_dpo.DPOFlags),
    "kto": (rlhf_kto.main, rlhf_kto.KTOFlags),
}
EVERY_SCRIPT = pytest.mark.parametrize("script", SCRIPTS)

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
MODEL = {*TOKENIZER, "config.json", "model.safetensors"}
ADAPTER = {*TOKENIZER, "README.md", "adapter_config.json", "adapter_model.safetensors"}

STEP = {"train/loss", "train/grad_norm", "train/learning_rate", "perf/tokens_per_second", "perf/step_seconds"}
PAIRS = {"train/accuracy", "train/margin"}
CHANGES = {f"{side}_{what}" for side in ("chosen", "rejected") for what in ("reward", "logp_change_per_token")}
LOGGED = {
    "sft": (STEP, {"val/loss", "val/perplexity"}),
    "rm": (
        STEP | PAIRS | {"train/chosen_score", "train/rejected_score"},
        {"val/loss", "val/accuracy", "val/margin"},
    ),
    "dpo": (
        STEP | PAIRS | {f"train/{name}" for name in CHANGES} | {"train/chosen_nll"},
        {"val/loss", "val/accuracy", "val/margin", "val/chosen_nll", "val/kl_k3_per_token"}
        | {f"val/{name}" for name in CHANGES},
    ),
    "kto": (
        STEP | PAIRS | {f"train/{name}" for name in CHANGES} | {"train/kl", "train/num_chosen", "train/num_rejected"},
        {"val/loss", "val/accuracy", "val/margin", "val/kl_k3_per_token", "val/kl", "val/auc"}
        | {f"val/{name}" for name in CHANGES},
    ),
}
"""What each script logs at a step, and at an evaluation."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("scripts")
    return {
        "data": make_data(root / "data"),
        "llama": make_model_dir(root / "llama"),
        "gpt2": make_model_dir(root / "gpt2", "gpt2", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2),
    }


def run(script: str, lab: dict[str, str], folder: Path, model: str = "llama", **given: Any) -> dict:
    main, flags = SCRIPTS[script]
    return main(quick_flags(flags, lab["data"], folder, **{"model_name": lab[model], **given}))


def files_of(folder: Path) -> set[str]:
    """Every file and link under a folder, by its path in it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def without_clock(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in metrics_of(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    return load_file(folder / name)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", ["all", "lora"])
@EVERY_SCRIPT
def test_the_experiment_folder_holds_exactly_this(lab, tmp_path, script, mode):
    """DESIGN.md section 6: every file, with the last two checkpoints, the best one, samples of a policy, a reward
    model's report; no leftovers."""
    run(script, lab, tmp_path, finetune_mode=mode, max_steps=4, save_interval=1, eval_interval=2, logger="csv")
    model = ADAPTER if mode == "lora" else MODEL
    if script != "rm":
        model = model | ({"generation_config.json"} if mode == "all" else set())
    elif mode == "lora":
        model = model | {"config.json"}
    top = {"args.json", "environment.json", "data.json", "lock.json", "metrics.jsonl", "summary.json"}
    top |= {"csv/metrics.csv", "report.json" if script == "rm" else "samples.jsonl"}
    checkpoints = {"checkpoints/last", "checkpoints/best/best.json"}
    checkpoints |= {f"checkpoints/best/model/{name}" for name in model}
    for step in (3, 4):
        state = {"state.json", "optimizer.pt", *(f"model/{name}" for name in model)}
        checkpoints |= {f"checkpoints/step-{step:08d}/{name}" for name in state}
    assert files_of(tmp_path) == top | checkpoints | {f"final/{name}" for name in model}
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step-00000004"


@EVERY_SCRIPT
def test_metrics_have_exactly_these_rows(lab, tmp_path, script):
    """A line each logged step; evaluations before the first step, at their interval, and at the end. In file order,
    in which good and bad responses take turns: every step has both."""
    summary = run(script, lab, tmp_path, max_steps=5, eval_interval=3, log_interval=2, shuffle=False)
    step, evaluation = LOGGED[script]
    lines = metrics_of(tmp_path)
    evaluated = evaluation | {"perf/evaluation_seconds"}
    expected = [(0, evaluated), (2, step), (3, evaluated), (4, step), (5, step), (5, evaluated)]
    assert [(line.pop("step"), set(line)) for line in lines] == expected
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {k: v for k, v in lines[-1].items() if k != "perf/evaluation_seconds"} == {
        k: v for k, v in summary.items() if k.startswith("val/")
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (summary["steps"], summary["experiment_dir"]) == (5, str(tmp_path))


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_samples_answer_the_example_prompt_at_every_evaluation(lab, tmp_path, script):
    run(script, lab, tmp_path, eval_interval=1, do_sample=False)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    prompt = torch.load(Path(lab["data"]) / "example_prompt.pt", weights_only=True)["prompt"]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(0, prompt), (1, prompt), (2, prompt)]


def test_tensorboard_is_the_default_logger(lab, tmp_path):
    """Its event file stands beside metrics.jsonl."""
    assert rlhf_sft.SFTFlags(data_dir="d").logger == "tensorboard"
    run("sft", lab, tmp_path, logger="tensorboard", max_steps=1)
    assert any("tfevents" in name for name in files_of(tmp_path / "tensorboard"))


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("mode", ["all", "last_layer", "lora"])
@EVERY_SCRIPT
def test_c4_four_steps_are_two_and_a_resume_and_two(lab, tmp_path, monkeypatch, script, mode):
    """C4, C11: killed in the fourth step, resumed from the checkpoint after the second: bit for bit the same weights,
    optimiser state, best, numbers and samples; the lines of the lost steps are not there twice.

    With dropout on, in windows of 6 of 14 rows, so that the run goes over the end of an epoch.
    """
    options = {
        "finetune_mode": mode, "max_steps": 4, "mini_batch_size": 6, "micro_batch_size": 4, "save_interval": 2,
        "eval_interval": 2, "disable_dropout": False, "keep_checkpoints": 0, "lr_warmup_steps": 2, "model": "gpt2",
    }  # fmt: skip
    run(script, lab, tmp_path / "straight", **options)
    update = Step.update

    def killed(self, *args, **kwargs):
        if self.run.step_index == 3:
            raise _Killed
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "update", killed)
        with pytest.raises(_Killed):
            run(script, lab, tmp_path / "broken", **options)
    assert metrics_of(tmp_path / "broken")[-1]["step"] == 3
    run(script, lab, tmp_path / "broken", **options, resume=True)
    straight, resumed = tmp_path / "straight", tmp_path / "broken"
    assert without_clock(straight) == without_clock(resumed)
    assert files_of(straight) == files_of(resumed)
    for folder in ("final", "checkpoints/step-00000002/model", "checkpoints/best/model"):
        assert same(weights(straight / folder), weights(resumed / folder)), folder
    if script != "rm":
        assert (straight / "samples.jsonl").read_text() == (resumed / "samples.jsonl").read_text()
    config = [json.loads((folder / "final" / "config.json").read_text()) for folder in (straight, resumed)
              if (folder / "final" / "config.json").exists()]  # fmt: skip
    assert config == config[:1] * len(config)


def test_c4_a_second_interruption_goes_on_as_well(lab, tmp_path, monkeypatch):
    """C4: stop after steps 1 and 3, each time by the signal, each time in the middle of an epoch."""
    options = {"max_steps": 5, "mini_batch_size": 5, "save_interval": 0}
    run("sft", lab, tmp_path / "straight", **options)
    for stops in (1, 3, None):
        finish = Step.finish

        def stopping(self, bar, stops=stops, finish=finish):
            finish(self, bar)
            if self.run.step_index == stops:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Step, "finish", stopping)
            summary = run("sft", lab, tmp_path / "stopped", **options, resume=stops != 1)
        assert summary["steps"] == (stops or 5)
        assert (tmp_path / "stopped" / "final").exists() == (stops is None)
    assert same(weights(tmp_path / "straight" / "final"), weights(tmp_path / "stopped" / "final"))
    assert without_clock(tmp_path / "straight") == without_clock(tmp_path / "stopped")


def test_sigterm_saves_and_exits_0(lab, tmp_path):
    """The script as a user starts it: SIGTERM ends it with status 0 and a checkpoint, from which it goes on."""
    flags = quick_flags(
        rlhf_sft.SFTFlags, lab["data"], tmp_path / "run", model_name=lab["llama"], max_steps=100_000, eval_interval=0
    )
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(flags)))
    process = subprocess.Popen(
        [sys.executable, "rlhf/rlhf_sft.py", f"--args_file={tmp_path / 'args.json'}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "go on with --resume=True" in out
    last = (tmp_path / "run" / "checkpoints" / "last").resolve()
    step = int(last.name.removeprefix("step-"))
    assert metrics_of(tmp_path / "run")[-1]["step"] == step >= 3
    state = json.loads((last / "state.json").read_text())
    assert state["step"] == step


@EVERY_SCRIPT
def test_args_file_repeats_a_run(lab, tmp_path, script):
    """DESIGN.md section 6: args.json into another folder: the same weights, bit for bit."""
    run(script, lab, tmp_path / "first", learning_rate=0.003, seed=5)
    main, flags = SCRIPTS[script]
    again = parse(flags, [f"--args_file={tmp_path / 'first' / 'args.json'}", f"--experiment_dir={tmp_path / 'second'}"])
    main(again)
    assert same(weights(tmp_path / "first" / "final"), weights(tmp_path / "second" / "final"))


def validation_rows(lab: dict[str, str], stage: str) -> list[dict]:
    return list(load_split(lab["data"], stage, "validation"))


@pytest.mark.parametrize("mode", ["all", "last_layer", "lora"])
@EVERY_SCRIPT
def test_final_gives_our_numbers_with_nothing_of_ours(lab, tmp_path, script, mode):
    """The last evaluation, computed again by transformers (and peft) alone from `final/`, to 1e-4."""
    summary = run(script, lab, tmp_path, finetune_mode=mode, max_steps=3)
    load = offline.classifier if script == "rm" else offline.causal
    if mode == "lora":
        model = load(lab["llama"])
        if script == "rm":
            model = offline.AutoModelForSequenceClassification.from_pretrained(lab["llama"], num_labels=1)
        model = PeftModel.from_pretrained(model, tmp_path / "final").eval().merge_and_unload()
    else:
        model = load(tmp_path / "final")
    with torch.no_grad():
        if script == "sft":
            _, found = offline.sft_numbers(model, validation_rows(lab, "finetune"))
        elif script == "rm":
            _, found = offline.rm_numbers(model, validation_rows(lab, "preference"), "last_token")
        elif script == "kto":
            _, found = offline.kto_numbers(model, offline.causal(lab["llama"]), validation_rows(lab, "feedback"))
        else:
            rows = validation_rows(lab, "preference")
            _, found = offline.dpo_numbers(model, offline.causal(lab["llama"]), rows)
    shared = {name.replace("train/", "val/") for name in found} & set(summary)
    assert "val/loss" in shared
    for name in shared:
        assert summary[name] == pytest.approx(found[name.replace("val/", "train/")], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("mode", ["last_layer", "lora"])
@EVERY_SCRIPT
def test_what_is_frozen_stays(lab, tmp_path, script, mode):
    """--finetune_mode: only the last block, the final norm and the head move; or only the adapter is written."""
    run(script, lab, tmp_path, finetune_mode=mode)
    start, end = load_file(Path(lab["llama"]) / "model.safetensors"), weights(tmp_path / "final")
    if mode == "lora":
        assert all("lora_" in name or "score" in name for name in end)
    else:
        moved = {name for name in end if name not in start or not torch.equal(start[name], end[name])}
        assert moved
        assert all(".layers.1." in name or name in ("model.norm.weight", "score.weight") for name in moved)


@EVERY_SCRIPT
def test_data_without_a_validation_split_trains(tmp_path, lab, script):
    """Nothing to evaluate: no val/ numbers, but a final model."""
    data = make_data(tmp_path / "data", num_train=5, num_validation=0)
    summary = run(script, {**lab, "data": data}, tmp_path / "run", eval_interval=1)
    assert not any(name.startswith("val/") for name in summary)
    assert (tmp_path / "run" / "final" / "config.json").exists()


def test_data_without_an_example_prompt_trains(tmp_path, lab):
    data = make_data(tmp_path / "data", num_train=5, num_validation=2)
    (tmp_path / "data" / "example_prompt.pt").unlink()
    run("sft", {**lab, "data": data}, tmp_path / "run", eval_interval=1)
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_a_taken_folder_is_refused_and_left_alone(lab, tmp_path):
    run("sft", lab, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="holds a run already"):
        run("sft", lab, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_resuming_with_another_rate_is_refused(lab, tmp_path):
    run("sft", lab, tmp_path, save_interval=1)
    with pytest.raises(UserError, match="--learning_rate=1e-06 differs"):
        run("sft", lab, tmp_path, save_interval=1, resume=True, learning_rate=1e-6)
    with pytest.raises(UserError, match="--resume needs --experiment_dir"):
        rlhf_sft.main(rlhf_sft.SFTFlags(data_dir=lab["data"], model_name=lab["llama"], resume=True))


def test_a_later_stage_takes_an_earlier_one_by_its_folder(lab, tmp_path):
    """SFT -> RM, DPO and KTO by --sft_experiment_dir; the tokenizer comes along."""
    run("sft", lab, tmp_path / "sft")
    given = json.loads((Path(lab["llama"]) / "tokenizer.json").read_text())
    for script in ("rm", "dpo", "kto"):
        summary = run(script, lab, tmp_path / script, model_name=None, sft_experiment_dir=str(tmp_path / "sft"))
        assert summary["steps"] == 2
        saved = json.loads((tmp_path / script / "final" / "tokenizer.json").read_text())
        assert saved["model"]["vocab"] == given["model"]["vocab"]
