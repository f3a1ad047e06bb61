"""Hostile models, adapters and experiments, wherever one is given: as in test_hostile_data.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf import rlhf_evaluate, rlhf_grpo, rlhf_rm
from rlhf.errors import UserError
from tests import hostile, hostile_runs
from tests.demo_runs import load as load_demo
from tests.hostile_runs import MOST_MB, QUICK, assert_refused, script, sft

lab, spoilt, canary = hostile_runs.lab, hostile_runs.spoilt, hostile_runs.canary

CODE = "import pathlib\npathlib.Path({canary!r}).touch()\nclass A:\n    pass\n"


# --model_name


@pytest.mark.parametrize("lie", hostile.bad_safetensors())
def test_weights_with_a_bad_header(lab, spoilt, tmp_path, lie):
    path = spoilt("model") / "model.safetensors"
    hostile.safetensors(
        path, *hostile.bad_safetensors()[lie][:2], **dict([("length", 1 << 62)] if "2**62" in lie else [])
    )
    assert_refused(sft(lab, tmp_path, model_name=path.parent), path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "old pytorch_model.bin"]
)
def test_weights_that_would_execute(lab, spoilt, tmp_path, canary, name):
    """In a model and an adapter they are refused; training_args.bin is never opened."""
    folder = spoilt("adapter" if "adapter" in name else "model")
    if "training" not in name:
        (folder / ("adapter_model.safetensors" if "adapter" in name else "model.safetensors")).unlink()
    path = folder / name.split()[-1]
    content = {"a": hostile.calls(canary)["os.system"], "b": torch.zeros(10_000)}
    hostile.save(path, content, zipped="old" not in name)
    outcome = sft(lab, tmp_path, model_name=folder)
    if "training" in name:
        assert outcome.status == 0, outcome.printed
    else:
        assert_refused(outcome, folder, "posix.system")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 10**6}, "has the shape (512, 32), and its config.json asks for (512, 1000000)"),
        ({"intermediate_size": 10**7}, "config.json asks for (10000000, 32)"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"num_hidden_layers": 1000}, "num_hidden_layers=1000, and its weights are 20 tensors"),
        ({"vocab_size": 10**12}, "embed_tokens.weight has the shape (512, 32)"),
        ({"hidden_size": 10**30}, "model"),
        ({"hidden_size": -4}, "model"),
        ({"num_attention_heads": 0}, "model"),
        ({"model_type": ["llama"]}, "model"),
        ({"architectures": {"a": 1}}, None),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "code.A", "AutoModelForCausalLM": "code.A"}},
            "trust_remote",
        ),
        ({"auto_map": {"AutoConfig": "code.A", "AutoModelForCausalLM": "code.A"}}, None),
    ],
)
def test_a_config_that_lies(lab, spoilt, tmp_path, canary, changes, named):
    """What it declares is compared with the weights before anything of that size is made; no code of it is imported."""
    folder = spoilt("model")
    (folder / "code.py").write_text(CODE.format(canary=str(canary)))
    hostile.change_json(folder / "config.json", **changes)
    outcome = sft(lab, tmp_path, model_name=folder)
    if named is None:
        assert outcome.status == 0, outcome.printed[-2000:]
    else:
        assert_refused(outcome, folder, named)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["nested", "a million digits", "UTF-16", "a list"])
def test_a_model_with_bad_json(lab, spoilt, tmp_path, name, content):
    path = spoilt("model") / name
    path.write_bytes(hostile.BAD_JSON[content])
    assert_refused(sft(lab, tmp_path, model_name=path.parent), path.parent)


@pytest.mark.parametrize("kind", ["pipe", "zeros", "loop", "dangling"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_that_is_no_file(lab, spoilt, tmp_path, name, kind):
    path = spoilt("model") / name
    hostile.no_file(path, kind)
    assert_refused(sft(lab, tmp_path, model_name=path.parent), path.parent)


@pytest.mark.parametrize("target", ["../../etc/passwd", "/etc/passwd", "..", "a/../model.safetensors", "nowhere", 3])
def test_an_index_that_leads_elsewhere(lab, spoilt, tmp_path, target):
    folder = spoilt("model")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": target}}))
    assert_refused(sft(lab, tmp_path, model_name=folder), folder)


def test_a_tokenizer_with_code_of_its_own(lab, spoilt, tmp_path, canary):
    folder = spoilt("model")
    (folder / "code.py").write_text(CODE.format(canary=str(canary)))
    (folder / "tokenizer.json").unlink()
    code = {"AutoTokenizer": ["code.A", "code.A"]}
    hostile.change_json(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="A")
    assert_refused(sft(lab, tmp_path, model_name=folder), folder)


def test_a_gguf_file_is_no_model_and_is_not_opened(lab, tmp_path):
    """Huge counts of tensors, and offsets beyond the file."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 7 + b"\x00" + b"\xff" * 200)
    assert_refused(sft(lab, tmp_path, model_name=path), path, "holds no model")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_model_name_or_path": "{self}"}, "an adapter itself"),
        ({"base_model_name_or_path": "{self}/nowhere"}, "there is no such folder"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "{code}"}, "needs code of its own"),
        ({"r": 10**9}, "another rank"),
        ({"rank_pattern": {"q_proj": 10**9}}, "another rank"),
        ({"peft_type": "PROMPT_TUNING"}, "no plain LoRA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "code"}, "no plain LoRA"),
        ({"target_modules": 7}, "adapter"),
    ],
)
@pytest.mark.parametrize("mode", ["all", "lora"])
def test_an_adapter_that_lies(lab, spoilt, tmp_path, canary, changes, named, mode):
    folder, code = spoilt("adapter"), spoilt("model")
    (code / "code.py").write_text(CODE.format(canary=str(canary)))
    hostile.change_json(code / "config.json", model_type="mine", auto_map={"AutoConfig": "code.A"})
    places = {"{self}": str(folder), "{code}": str(code)}
    for key, value in changes.items():
        for place, path in places.items():
            changes = {**changes, key: value.replace(place, path)} if isinstance(value, str) else changes
            value = changes[key]
    hostile.change_json(folder / "adapter_config.json", **changes)
    assert_refused(sft(lab, tmp_path, model_name=folder, finetune_mode=mode), named)


def test_a_link_out_of_an_experiment(lab, spoilt, tmp_path):
    """`last` is a link to a sibling; one that leads out of the experiment is not followed, nor is a linked final/."""
    run = spoilt("run")
    last = run / "checkpoints" / "last"
    shutil.rmtree(run / "final")
    last.unlink()
    (tmp_path / "else" / "model").mkdir(parents=True)
    shutil.copytree(lab.model, tmp_path / "else" / "model", dirs_exist_ok=True)
    last.symlink_to(tmp_path / "else")
    flags = {"data_dir": lab.data, "experiment_dir": tmp_path / "out"}
    assert_refused(script(rlhf_rm, rlhf_rm.RMFlags, tmp_path, *QUICK, sft_experiment_dir=run, **flags), "leads out of")
    (run / "final").mkdir()
    shutil.copytree(lab.model, run / "final", dirs_exist_ok=True)
    (run / "final" / "model.safetensors").unlink()
    (run / "final" / "model.safetensors").symlink_to(Path(lab.model) / "model.safetensors")
    assert_refused(script(rlhf_rm, rlhf_rm.RMFlags, tmp_path, *QUICK, sft_experiment_dir=run, **flags), "leads out of")
    shutil.rmtree(run / "final")
    (run / "final").symlink_to(lab.model)
    assert_refused(script(rlhf_rm, rlhf_rm.RMFlags, tmp_path, *QUICK, sft_experiment_dir=run, **flags), "leads out of")


@pytest.mark.parametrize("kind", ["policy", "code", "config"])
def test_a_hostile_reward_model(lab, spoilt, tmp_path, canary, kind):
    """Where rewards are made and where models are compared."""
    folder = spoilt("model" if kind == "policy" else "reward")
    if kind == "code":
        (folder / "model.safetensors").unlink()
        hostile.save(folder / "pytorch_model.bin", hostile.calls(canary)["os.system"])
    elif kind == "config":
        hostile.change_json(folder / "config.json", reward_scale="Infinity" * 3, reward_mean=[1])
    flags = {"data_dir": lab.data, "rm_experiment_dir": folder}
    grpo = script(
        rlhf_grpo,
        rlhf_grpo.GRPOFlags,
        tmp_path,
        *QUICK,
        sft_experiment_dir=lab.model,
        experiment_dir=tmp_path / "out",
        **flags,
    )
    assert_refused(grpo, folder)
    evaluated = script(
        rlhf_evaluate,
        rlhf_evaluate.EvaluateFlags,
        tmp_path,
        *QUICK[:2],
        models=f"a={lab.model}",
        split="validation",
        **flags,
    )
    assert_refused(evaluated, folder)


# --resume


def _optimizer(run: Path, canary: Path) -> None:
    hostile.save(run / "optimizer.pt", {"state": hostile.calls(canary)["eval"]})


CHECKPOINTS = {
    "an optimizer that executes": _optimizer,
    "an optimizer of 10 GB": lambda run, canary: hostile.zip_bomb(run / "optimizer.pt", "archive/data/0"),
    "an optimizer of 2**40": lambda run, canary: hostile.archive(
        run / "optimizer.pt", hostile.LYING_ARCHIVES["a storage of 2**40 values"]
    ),
    "a pipe for an optimizer": lambda run, canary: hostile.no_file(run / "optimizer.pt", "pipe"),
    "a nested state": lambda run, canary: (run / "state.json").write_bytes(hostile.BAD_JSON["nested"]),
    "a state of zeros": lambda run, canary: hostile.no_file(run / "state.json", "zeros"),
    "weights beyond the file": lambda run, canary: hostile.safetensors(
        run / "model" / "model.safetensors", *hostile.bad_safetensors()["offsets beyond the file"]
    ),
    "an index that leads elsewhere": lambda run, canary: (run / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../../../etc/passwd"}})
    ),
    "weights from elsewhere": lambda run, canary: (
        (run / "model" / "model.safetensors").rename(canary.parent / "moved"),
        (run / "model" / "model.safetensors").symlink_to(canary.parent / "moved"),
    ),
    "a link out of the run": lambda run, canary: (
        run.rename(canary.parent / "moved"),
        run.symlink_to(canary.parent / "moved"),
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_is_passed_over(lab, spoilt, tmp_path, canary, name):
    """The newest one is named and skipped, and the run goes on from the one before."""
    run = spoilt("run")
    (run / "summary.json").unlink()  # it has not ended yet
    before, newest = sorted((run / "checkpoints").glob("step-*"))[-2:]
    CHECKPOINTS[name](newest, canary)
    flags = {"max_steps": 3, "max_new_tokens": 4, "save_interval": 1, "learning_rate": 1e-2, "epochs": 99.0}
    outcome = sft(lab, tmp_path, experiment_dir=run, resume=True, **flags)
    assert outcome.status == 0, outcome.printed
    assert f"{newest} is broken" in outcome.printed
    assert f"after step {int(before.name[5:])}" in outcome.printed
    assert outcome.grown < MOST_MB


def _change(path: Path, change: Callable[[dict], None]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


STATES = {
    "no groups": lambda state: state.update(param_groups=3),
    "groups of no dicts": lambda state: state.update(param_groups=[[1]]),
    "parameters of no list": lambda state: state["param_groups"][0].update(params="0"),
    "a rate that is a text": lambda state: state["param_groups"][0].update(lr="x"),
    "moments of no dict": lambda state: state.update(state=[1]),
    "a moment that is a text": lambda state: state["state"][0].update(exp_avg="x"),
    "a moment that is NaN": lambda state: state["state"][0]["exp_avg"].fill_(float("nan")),
    "a moment of another shape": lambda state: state["state"][0].update(exp_avg=torch.zeros(3, 3)),
}


@pytest.mark.parametrize("name", STATES)
def test_an_optimizer_of_other_types(lab, spoilt, tmp_path, name):
    """A whole file that torch reads, whose content is none of an optimiser: refused, with the file's name."""
    run = spoilt("run")
    (run / "summary.json").unlink()
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    _change(newest / "optimizer.pt", STATES[name])
    flags = {"max_steps": 3, "max_new_tokens": 4, "save_interval": 1, "learning_rate": 1e-2, "epochs": 99.0}
    assert_refused(sft(lab, tmp_path, experiment_dir=run, resume=True, **flags), newest / "optimizer.pt")


# demos


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("args.json", b"[" * 1_000_000, "args.json"),
        ("args.json", b'{"data_dir": 3, "model_name": [1]}', None),
        ("args.json", b'{"sft_experiment_dir": "{run}"}', None),
        ("args.json", b'{"model_name": "../../etc/passwd"}', None),
        ("data.json", b'{"stages": [1]}', None),
        ("checkpoints/best/best.json", b'{"step": "x"}', "best.json"),
        ("checkpoints/best/best.json", b"\xff\xfe", "best.json"),
        ("final/config.json", b"{" * 1_000_000, "config.json"),
    ],
)
def test_the_demos_on_a_hostile_experiment(spoilt, name, content, named):
    """A list of models or one sentence, also where an experiment says that it started from itself."""
    run, find = spoilt("run"), load_demo("checkpoints").find_checkpoints
    (run / name).parent.mkdir(exist_ok=True)
    assert (run / "checkpoints" / "best" / "model").is_dir()
    (run / name).write_bytes(content.replace(b"{run}", str(run).encode()))
    if named is None:
        assert find([str(run)])[0].source == str(run / "final")
    else:
        with pytest.raises(UserError, match=named):
            find([str(run)])
