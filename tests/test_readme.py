"""What the README and the shell scripts say is so: every command parses, and nothing that it lists is missing."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from data_prep.custom import prepare_data as custom
from rlhf import losses
from rlhf.flags import parse
from rlhf.pairwise import LOSS_TYPES
from rlhf.rlhf_dpo import DPOFlags
from rlhf.rlhf_dpo import main as dpo
from rlhf.rlhf_evaluate import EvaluateFlags
from rlhf.rlhf_grpo import GRPOFlags
from rlhf.rlhf_grpo import main as grpo
from rlhf.rlhf_kto import KTOFlags
from rlhf.rlhf_kto import main as kto
from rlhf.rlhf_online_dpo import OnlineDPOFlags
from rlhf.rlhf_online_dpo import main as online_dpo
from rlhf.rlhf_ppo import PPOFlags
from rlhf.rlhf_ppo import main as ppo
from rlhf.rlhf_rm import RMFlags
from rlhf.rlhf_rm import main as rm
from rlhf.rlhf_sft import SFTFlags
from rlhf.rlhf_sft import main as sft
from tests.splits import make_data, make_model_dir
from tests.tiny_tokenizers import make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    "rlhf/rlhf_sft.py": SFTFlags,
    "rlhf/rlhf_rm.py": RMFlags,
    "rlhf/rlhf_ppo.py": PPOFlags,
    "rlhf/rlhf_dpo.py": DPOFlags,
    "rlhf/rlhf_kto.py": KTOFlags,
    "rlhf/rlhf_evaluate.py": EvaluateFlags,
    "rlhf/rlhf_grpo.py": GRPOFlags,
    "rlhf/rlhf_online_dpo.py": OnlineDPOFlags,
}
NOT_IN_WHOLE_RUNS = {"rlhf/rlhf_grpo.py", "rlhf/rlhf_online_dpo.py"}
SHELL = ("hh", "tldr")


def flags_class(script: str) -> type:
    """The dataclass that a script of this repository parses its command line into."""
    if script in SCRIPTS:
        return SCRIPTS[script]
    folder = str((ROOT / script).parent)
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location(script.replace("/", "_").removesuffix(".py"), ROOT / script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    (found,) = [
        value
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == spec.name and value.__name__.endswith("Flags")
    ]
    return found


def script_and_flags(command: str) -> tuple[str, list[str]] | None:
    """The script of `python …` or `fabric run …` and its arguments; None for another command."""
    words = shlex.split(command)
    if words[0] == "python":
        words = words[1:]
    elif words[:2] == ["fabric", "run"]:
        known = {"accelerator", "devices", "strategy", "num-nodes", "node-rank", "main-address", "precision"}
        words = words[2:]
        while words[0].startswith("--"):
            assert words.pop(0).removeprefix("--").split("=")[0] in known, command
    else:
        return None
    return words[0], words[1:]


def commands(text: str) -> list[str]:
    """The lines of the bash blocks of a Markdown text."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line.strip()]


def check_parses(command: str) -> Any:
    script, arguments = script_and_flags(command)
    assert (ROOT / script).is_file(), command
    return parse(flags_class(script), arguments)


@pytest.fixture
def in_folder_with_args(tmp_path, monkeypatch):
    """A working folder in which the README's SFT and PPO runs have left their args.json."""
    for name in ("sft", "ppo"):
        folder = f"--experiment_dir=experiments/runs/{name} "
        (command,) = [c for c in commands(README) if folder in c and f"rlhf_{name}.py" in c]
        flags = dataclasses.asdict(check_parses(command))
        path = tmp_path / flags["experiment_dir"] / "args.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(flags))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", commands(README))
def test_every_command_of_the_readme_parses(command, in_folder_with_args):
    """C29: each command line of a bash block is taken by the script's own parser, or names files that are there."""
    if script_and_flags(command) is not None:
        check_parses(command)
        return
    words = shlex.split(command)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[:2] == ["pip", "install"], f"what is {command!r}?"
        assert all((ROOT / w).is_file() for i, w in enumerate(words) if words[i - 1] == "-c")
        extras = re.findall(r"\[(.*)\]", words[-1])
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(
            re.search(rf"^{extra} = ", project, flags=re.MULTILINE) for part in extras for extra in part.split(",")
        )


def test_there_are_commands():
    """The blocks are found: every script has its command."""
    scripts = {found[0] for found in map(script_and_flags, commands(README)) if found}
    assert scripts >= {*SCRIPTS, "demos/chat.py", "data_prep/custom/prepare_data.py"}


@pytest.mark.parametrize("name", SHELL)
def test_every_command_of_the_whole_runs_parses(name):
    """C29: what the shell scripts would run parses, with flags of the command line and of the environment in it."""
    environment = {**os.environ, "DRY_RUN": "1", "OUT": "somewhere", "PPO_FLAGS": "--ppo_epochs=2", "DATA": "sample"}
    environment.pop("MODEL", None)
    printed = subprocess.run(
        ["bash", str(ROOT / f"experiments/{name}.sh"), "--max_steps=7"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = [line.removeprefix("+ ") for line in printed.splitlines()]
    flags = {script_and_flags(command)[0]: check_parses(command) for command in found}
    assert set(SCRIPTS) - NOT_IN_WHOLE_RUNS <= set(flags)
    assert all(f.max_steps == 7 for script, f in flags.items() if script in set(SCRIPTS) - {"rlhf/rlhf_evaluate.py"})
    assert flags["rlhf/rlhf_ppo.py"].ppo_epochs == 2
    assert all(f.dataset_path == "sample" for script, f in flags.items() if script.startswith("data_prep"))
    assert not Path("somewhere").exists()


def test_the_arithmetic_run_parses():
    """C29: worked answers where asked for, GRPO and RLOO on prompts that are checked, each in a folder of its own."""
    environment = {**os.environ, "DRY_RUN": "1", "OUT": "somewhere", "RLOO_FLAGS": "--num_samples=3"}
    environment["STAGES"] = "prepare sft grpo rloo"
    environment.pop("MODEL", None)
    printed = subprocess.run(
        ["bash", str(ROOT / "experiments/arithmetic.sh"), "--max_steps=7"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = [check_parses(line.removeprefix("+ ")) for line in printed.splitlines()]
    trained = {flags.experiment_dir: flags for flags in found if hasattr(flags, "experiment_dir")}
    assert list(trained) == ["somewhere/sft", "somewhere/grpo", "somewhere/rloo"]
    assert all(
        flags.max_steps == 7 and "SmolLM2" in str(trained["somewhere/sft"].model_name) for flags in trained.values()
    )
    assert {flags.sft_experiment_dir for name, flags in trained.items() if "sft" not in name} == {"somewhere/sft"}
    assert trained["somewhere/grpo"].advantage == "grpo"
    assert trained["somewhere/rloo"].advantage == "rloo"
    assert trained["somewhere/rloo"].num_samples == 3
    assert trained["somewhere/grpo"].reward == ["numeric"]


def test_several_devices_are_launched_by_fabric():
    """C29: with DEVICES set, the same training commands run under `fabric run`."""
    environment = {**os.environ, "DRY_RUN": "1", "DEVICES": "2", "STAGES": "dpo"}
    printed = subprocess.run(
        ["bash", str(ROOT / "experiments/hh.sh")], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith("+ fabric run --accelerator=auto --devices=2 --strategy=ddp rlhf/rlhf_dpo.py")
    check_parses(printed.removeprefix("+ "))


def test_every_form_of_row_in_the_readme_is_accepted(tmp_path):
    """C40: the JSON rows under "Your own data" go through data_prep/custom, each for the stage that it is meant for."""
    (block,) = re.findall(r"^```json\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    rows = block.splitlines()
    stages = ("finetune", "preference", "feedback", "prompts", "finetune", "preference")
    make_tokenizer(bos=False, pad_is_eos=False).save_pretrained(tmp_path / "tokenizer")
    for i, (row, stage) in enumerate(zip(rows, stages, strict=True)):
        (tmp_path / "mine.jsonl").write_text(row + "\n")
        found = custom.main(
            custom.PrepareFlags(
                destination_dir=str(tmp_path / f"data-{i}"),
                tokenizer_name=str(tmp_path / "tokenizer"),
                dataset_path=str(tmp_path / "mine.jsonl"),
                stage=stage,
                validation_percentage=0.0,
                test_percentage=0.0,
            )
        )
        assert found["counts"]["train"]["kept"] == 1, row


def test_every_module_is_listed_and_every_listed_file_is_there():
    listed = set(re.findall(r"`((?:rlhf|demos|experiments|tests|data_prep)/[\w/]+\.\w+)`", README))
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "rlhf").rglob("*.py") if p.name != "__init__.py"}
    assert modules - listed == set()
    assert {path for path in listed if not (ROOT / path).is_file()} == set()


def loss_types(flags: type) -> tuple[str, ...]:
    if flags is DPOFlags:
        return LOSS_TYPES
    hints = inspect.get_annotations(flags)["loss_type"]
    return tuple(ast.literal_eval(hints.removeprefix("Literal"))) if isinstance(hints, str) else get_args(hints)


def test_every_loss_type_and_every_loss_is_in_the_table():
    table = README.split("## Which loss is where")[1].split("\n## ")[0]
    for script, flags in (("rm", RMFlags), ("dpo", DPOFlags), ("kto", KTOFlags), ("grpo", GRPOFlags)):
        for name in loss_types(flags):
            assert f"| `{name}` ({script}) |" in table
    listed = dict(re.findall(r"`(\w+_loss)`, `(rlhf/losses/\w+\.py)`", table))
    found = {}
    for path in Path(losses.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"rlhf.losses.{path.stem}") if path.stem != "__init__" else losses
        for name, value in vars(module).items():
            if inspect.isfunction(value) and name.endswith("_loss") and value.__module__ == module.__name__:
                found[name] = str(path.relative_to(ROOT))
    assert listed == {name: path for name, path in found.items() if not name.startswith("_")}


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> set[str]:
    """Every key of metrics.jsonl of tiny runs of the scripts, with what is off by default switched on."""
    root = tmp_path_factory.mktemp("readme")
    data, model = make_data(root / "data"), make_model_dir(root / "model")
    reward = make_model_dir(root / "reward", scorer=True)
    settings = {
        "data_dir": data,
        "max_steps": 1,
        "save_interval": 0,
        "eval_iters": 1,
        "logger": "none",
        "accelerator": "cpu",
        "precision": "32-true",
        "mini_batch_size": 4,
    }
    sampling = {"max_new_tokens": 4}
    runs = (
        (sft, SFTFlags, {"model_name": model, **sampling}),
        (rm, RMFlags, {"model_name": model}),
        (dpo, DPOFlags, {"model_name": model, "sft_coef": 0.1, "wpo_weighting": True, **sampling}),
        (dpo, DPOFlags, {"model_name": model, "loss_type": ["orpo"], **sampling}),
        (kto, KTOFlags, {"model_name": model, **sampling}),
        (kto, KTOFlags, {"model_name": model, "loss_type": "bco", **sampling}),
        (ppo, PPOFlags, {"sft_experiment_dir": model, "rm_experiment_dir": reward, "rollout_size": 4, "ppo_epochs": 1,
                         "ptx_coef": 0.1, **sampling}),
        (grpo, GRPOFlags, {"sft_experiment_dir": model, "rm_experiment_dir": reward, "rollout_size": 4,
                           "num_samples": 2, "kl_coef": 0.1, **sampling}),
        (online_dpo, OnlineDPOFlags, {"sft_experiment_dir": model, "rm_experiment_dir": reward, "rollout_size": 4,
                                      **sampling}),
    )  # fmt: skip
    keys: set[str] = set()
    for main, flags, changes in runs:
        folder = root / f"{flags.__name__}-{len(keys)}"
        main(flags(**{**settings, **changes, "experiment_dir": str(folder)}))
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            keys |= {re.sub(r"/reward_\w+$", "/reward_<name>", key) for key in json.loads(line)} - {"step"}
    return keys


def glossary() -> set[str]:
    table = README.split("## Logged metrics")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([\w/<>]+)`", row)}


def test_every_logged_metric_is_in_the_glossary(logged):
    """C31, W1: nothing is logged without a word on what it means, and the glossary holds nothing else."""
    in_code = {
        name
        for path in (ROOT / "rlhf").rglob("*.py")
        for name in re.findall(r'"((?:train|val|perf)/\w+)"', path.read_text(encoding="utf-8"))
    }
    assert (logged | in_code) - glossary() - {"perf/tokens"} == set()
    assert glossary() - logged - in_code == set()
