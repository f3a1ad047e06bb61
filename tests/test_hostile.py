"""Hostile files at every entry point: one sentence and status 2, nothing executed, and memory that stays bounded.

Every case runs a whole script in a child of this process and looks at how it ended (`hostile.in_child`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.custom import prepare_data as custom
from rlhf import rlhf_evaluate, rlhf_grpo, rlhf_rm, rlhf_sft
from rlhf.data.splits import load_split
from rlhf.errors import UserError
from rlhf.flags import ModelFlags, launch
from rlhf.models.loading import load_policy, save_model
from rlhf.untrusted import read_json, tensor_header
from tests import hostile
from tests.demo_runs import load as load_demo
from tests.splits import make_data, make_model_dir, quick_flags, tokenizer_for

MOST_MB = 100
CODE = "import pathlib\npathlib.Path({canary!r}).touch()\nclass A:\n    pass\n"


class Lab:
    """Sound folders to copy and spoil: data, a model, a reward model, an adapter, and a run with two checkpoints."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = make_data(root / "data")
        self.model = make_model_dir(root / "model")
        self.reward = make_model_dir(root / "reward", scorer=True)
        policy = load_policy(self.model, ModelFlags(finetune_mode="lora"))
        save_model(policy, tokenizer_for(), root / "adapter")
        rlhf_sft.main(
            quick_flags(rlhf_sft.SFTFlags, self.data, root / "run", model_name=self.model, save_interval=1, max_steps=3)
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def spoilt(lab, tmp_path) -> Callable[[str], Path]:
    """A copy of one of the lab's folders."""

    def copy(name: str) -> Path:
        return shutil.copytree(lab.root / name, tmp_path / name, symlinks=True)

    return copy


@pytest.fixture
def canary(tmp_path):
    """A path that must not be there when the test ends."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a file was executed"


QUICK = ("--accelerator=cpu", "--precision=32-true", "--logger=none", "--max_steps=2", "--mini_batch_size=4")


def sft(lab: Lab, tmp_path: Path, **flags) -> hostile.Outcome:
    given = {"data_dir": lab.data, "model_name": lab.model, "experiment_dir": tmp_path / "out", "eval_interval": 0}
    return script(rlhf_sft, rlhf_sft.SFTFlags, tmp_path, *QUICK, **{**given, **flags})


def script(module, flags_class: type, tmp_path: Path, *argv: str, **flags) -> hostile.Outcome:
    given = [flag for flag in argv if flag.split("=")[0][2:] not in flags]

    def call() -> None:
        with hostile.command_line(*given, *(f"--{name}={value}" for name, value in flags.items())):
            launch(module.main, flags_class)

    return hostile.in_child(call, tmp_path / "printed")


def assert_refused(outcome: hostile.Outcome, *named: str | Path) -> None:
    """Status 2, one sentence that names the thing and gives a remedy, and little memory."""
    assert outcome.status == 2, outcome.printed[-3000:]
    assert "Traceback" not in outcome.printed
    sentence = outcome.printed[outcome.printed.rindex("error: ") :].strip()
    assert "\n" not in sentence, sentence
    assert ";" in sentence, sentence
    for name in named:
        assert str(name) in sentence, sentence
    assert outcome.grown < MOST_MB


# --data_dir


@pytest.mark.parametrize("call", hostile.calls(Path("x")))
def test_a_split_that_would_execute(lab, spoilt, tmp_path, canary, call):
    """DESIGN.md §3: in a zip archive, in the formats before it, as a plain pickle and as a tar."""
    path = spoilt("data") / "finetune_train.pt"
    kinds = {
        "os.system": hostile.plain_pickle,
        "eval": lambda path, content: hostile.save(path, content, zipped=False),
        "exec": hostile.tar,
    }
    kinds.get(call, hostile.save)(path, hostile.calls(canary)[call])
    assert_refused(sft(lab, tmp_path, data_dir=path.parent), path)


@pytest.mark.parametrize("lie", hostile.LYING_ARCHIVES)
def test_a_split_that_declares_more_than_it_holds(lab, spoilt, tmp_path, lie):
    path = spoilt("data") / "finetune_train.pt"
    hostile.archive(path, hostile.LYING_ARCHIVES[lie])
    assert_refused(sft(lab, tmp_path, data_dir=path.parent), path)


@pytest.mark.parametrize("record", ["archive/data/0", "archive/data.pkl"])
def test_a_zip_bomb(lab, spoilt, tmp_path, record):
    path = spoilt("data") / "finetune_train.pt"
    hostile.zip_bomb(path, record)
    assert path.stat().st_size < 20 << 20
    assert_refused(sft(lab, tmp_path, data_dir=path.parent), path, "compressed")


@pytest.mark.parametrize("kind", ["pipe", "zeros", "loop", "dangling", "folder"])
@pytest.mark.parametrize("name", ["finetune_train.pt", "args.json", "finetune_train.safetensors"])
def test_data_that_is_no_file(lab, spoilt, tmp_path, name, kind):
    """Nothing waits for a pipe or reads a device to its end; a twin that is none is made anew."""
    folder = spoilt("data")
    hostile.no_file(folder / name, kind)
    if name.endswith(".safetensors"):
        outcome = hostile.in_child(lambda: load_split(folder, "finetune", "train"), tmp_path / "printed")
        assert (outcome.status, outcome.grown < MOST_MB) == (0, True), outcome
    elif name != "args.json" or kind != "dangling":
        assert_refused(sft(lab, tmp_path, data_dir=folder), folder)


@pytest.mark.parametrize("content", hostile.BAD_JSON)
def test_a_bad_args_json_of_data(spoilt, content):
    path = spoilt("data") / "args.json"
    path.write_bytes(hostile.BAD_JSON[content])
    with pytest.raises(UserError, match=r"args\.json .*; prepare the data again"):
        load_split(path.parent, "finetune", "train")


@pytest.mark.parametrize(
    "stages", [{"finetune": 3}, [1], {"finetune": {"arguments": {"ignore_index": "../x"}}}, {"x": {"tokenizer": [1]}}]
)
def test_an_args_json_of_other_types(spoilt, stages):
    path = spoilt("data") / "args.json"
    hostile.change_json(path, stages=stages)
    with pytest.raises(UserError, match="was not written by a prepare_data"):
        load_split(path.parent, "finetune", "train")


def _set(name: str, place, value) -> Callable:
    def change(layout, arrays, metadata) -> None:
        arrays[name][place] = value

    return change


def _layout(name: str, **values) -> Callable:
    return lambda layout, arrays, metadata: layout[name].update(values)


REBUILT_TWINS = {
    "an offset beyond the ids": _set("input_ids.offsets", 3, 1 << 40),
    "a last offset beyond the ids": _set("input_ids.offsets", -1, 1 << 40),
    "offsets that fall": _set("targets.offsets", 5, 0),
    "a negative offset": _set("input_ids.offsets", 2, -7),
    "a prompt longer than its row": _set("prompt_len", 1, 1 << 30),
    "a negative prompt": _set("prompt_len", 0, -1),
    "ids beyond the file": _layout("input_ids", data_offsets=[0, 1 << 60]),
    "negative places": _layout("input_ids", data_offsets=[-64, 0]),
    "another dtype": _layout("prompt_len", dtype="I32"),
    "an unknown dtype": _layout("prompt_len", dtype="F8"),
    "an entry that is a list": lambda layout, arrays, metadata: layout.update(prompt_len=[1]),
    "hashes of another shape": _layout("row_hashes", shape=[28, 1]),
    "a largest id that is no number": lambda layout, arrays, metadata: metadata.update(largest_id="ten"),
}


@pytest.mark.parametrize("lie", REBUILT_TWINS)
def test_a_twin_that_lies_is_made_anew(lab, spoilt, lie):
    """Its checksums are right: what is wrong is found in what it says."""
    path = spoilt("data") / "finetune_train.pt"
    rows = [row["input_ids"].tolist() for row in torch.load(path, weights_only=True)]
    before = path.with_suffix(".safetensors").read_bytes()
    hostile.change_twin(path, REBUILT_TWINS[lie])
    assert path.with_suffix(".safetensors").read_bytes() != before
    assert [row["input_ids"].tolist() for row in load_split(path.parent, "finetune", "train")] == rows
    assert path.with_suffix(".safetensors").read_bytes() == before


@pytest.mark.parametrize(("column", "value"), [("input_ids", -3), ("input_ids", 1 << 30), ("targets", -5)])
def test_a_twin_whose_ids_are_none(spoilt, column, value):
    """The hashes of its rows are right too: the row is refused when it is read."""
    path = spoilt("data") / "finetune_train.pt"
    hostile.change_twin(path, _set(column, -1, value))
    with pytest.raises(UserError, match=rf"finetune_train.safetensors, row 13, '{column}'.*remove that file"):
        list(load_split(path.parent, "finetune", "train"))


@pytest.mark.parametrize("header", [b"\xff" * 16, (1 << 62).to_bytes(8, "little") + b"{}", b"\x00\x00\x08" + bytes(9)])
def test_a_twin_with_a_bad_header_is_made_anew(spoilt, header):
    path = spoilt("data") / "finetune_train.pt"
    path.with_suffix(".safetensors").write_bytes(header + b"[" * 700_000)
    assert len(load_split(path.parent, "finetune", "train")) == 14


def test_an_example_prompt_that_would_execute(lab, spoilt, tmp_path, canary):
    path = spoilt("data") / "example_prompt.pt"
    hostile.save(path, {"input_ids": hostile.calls(canary)["os.system"]})
    assert_refused(sft(lab, tmp_path, data_dir=path.parent), path, "needs posix.system")
    assert not (tmp_path / "out").exists()


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
    "a link out of the run": lambda run, canary: (
        run.rename(canary.parent / "moved"),
        run.symlink_to(canary.parent / "moved"),
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_is_passed_over(lab, spoilt, tmp_path, canary, name):
    """The newest one is named and skipped, and the run goes on from the one before."""
    run = spoilt("run")
    before, newest = sorted((run / "checkpoints").glob("step-*"))[-2:]
    CHECKPOINTS[name](newest, canary)
    flags = {"max_steps": 3, "max_new_tokens": 4, "save_interval": 1, "learning_rate": 1e-2, "epochs": 99.0}
    outcome = sft(lab, tmp_path, experiment_dir=run, resume=True, **flags)
    assert outcome.status == 0, outcome.printed
    assert f"{newest} is broken" in outcome.printed
    assert f"after step {int(before.name[5:])}" in outcome.printed
    assert outcome.grown < MOST_MB


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


# prepare_data


def prepare(lab: Lab, tmp_path: Path, **flags) -> hostile.Outcome:
    given = {"tokenizer_name": lab.model, "destination_dir": tmp_path / "new", "stage": "finetune", "num_workers": 1}
    return script(custom, custom.PrepareFlags, tmp_path, **{**given, **flags})


@pytest.mark.parametrize(
    ("suffix", "first"),
    [
        ("jsonl", b""),
        ("json", b'[{"prompt": "'),
        ("json", b"[" * 100_000),
        ("csv", b"prompt,response\n"),
        ("csv", b'prompt,response\n"'),
        ("parquet", b"PAR1"),
    ],
)
def test_gzip_bombs(lab, tmp_path, suffix, first):
    """A line, a row or a cell of 10 GB; a file of one."""
    path = tmp_path / f"train.{suffix}.gz"
    hostile.gzip_bomb(path, first, hostile.GIGA if suffix == "parquet" else 10 * hostile.GIGA)
    assert_refused(prepare(lab, tmp_path, dataset_path=path), path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("body", ["[" * 100_000, '{"prompt": 1' + "0" * 10_000 + "}", '{"prompt": NaN}'])
def test_rows_of_hostile_json(lab, tmp_path, body):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{body}\n")
    assert_refused(prepare(lab, tmp_path, dataset_path=path), path)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation"),
        ("{{ cycler.__init__.__globals__.os.system('touch {canary}') }}", "refuses the conversation"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses the conversation"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes longer than 1 second",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the conversation"),
        ("{{ 1 / 0 }}", "refuses the conversation"),
        ("{% if %}", "refuses the conversation"),
    ],
)
def test_a_hostile_chat_template(lab, spoilt, tmp_path, canary, monkeypatch, template, named):
    """It sees nothing outside jinja's sandbox, and a loop without an end has one."""
    monkeypatch.setattr("rlhf.data.chat.LONGEST_RENDERING", 1.0)
    folder = spoilt("model")
    (folder / "chat_template.jinja").write_text(template.replace("{canary}", str(canary)))
    path = tmp_path / "train.jsonl"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    assert_refused(prepare(lab, tmp_path, dataset_path=path, tokenizer_name=folder), named)


# What is right is read.


def test_what_is_unusual_but_right(tmp_path):
    """JSON with a byte order mark; NaN where it is asked for; links to files, as in the hub's cache; empty tensors."""
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": NaN}')
    with pytest.raises(UserError, match="NaN is no JSON"):
        read_json(path)
    assert str(read_json(path, constants=True)["a"]) == "nan"
    save_file({"a": torch.zeros(0, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "w.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "w.safetensors")
    found = tensor_header(tmp_path / "link.safetensors")
    assert {name: entry.shape for name, entry in found.items()} == {"a": (0, 3), "b": (2,)}
    assert set(load_file(tmp_path / "w.safetensors")) == set(found)
    assert os.path.islink(tmp_path / "link.safetensors")
