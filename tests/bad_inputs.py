"""What a user gets wrong, for every entry point: how a case is run, and the cases that several of them share.

A case replaces flags of a command line that works (None takes one away, a list gives several words), and says which
words the one sentence holds. Texts may name the folders of the `World`, as in "{llama}".
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import torch
from transformers import T5Config

from rlhf.flag_values import RANGES, item_kind
from rlhf.flags import launch
from rlhf.untrusted import LARGEST_JSON
from tests.splits import make_data, make_model_dir, tokenizer_for
from tests.tiny_tokenizers import make_tokenizer

Given = dict[str, Any]
Case = tuple[Given, str]
"""Flags that replace good ones, and words of the error."""

SOUP = re.compile(
    r"Traceback|\[Errno|<class|object at 0x|Literal\[|JSONDecodeError|OSError|KeyError|ValueError|TypeError"
)
"""What is no sentence for a user."""
REMEDY = re.compile(
    r"\b(must|give|see|save|check|set|write|take|leave|needs|pass|run|prepare|mend|remove|start|define|use|follow|make"
    r"|raise|copy|name it|the nearest is|the keys of a|did you mean)\b"
)
"""Words of which one says what to do."""


@dataclass(frozen=True)
class EntryPoint:
    """A script: its main and its flags, and the flags of a command line that works."""

    main: Callable[[Any], Any]
    flags: type
    good: Given


@dataclass(frozen=True)
class World:
    """Good folders and bad ones, by name, and the folder in which they all are."""

    root: Path
    paths: dict[str, str]

    def filled(self, value: Any) -> Any:
        """`value`, or what it holds, with the folders that its texts name."""
        if isinstance(value, dict):
            return {name: self.filled(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.filled(item) for item in value]
        if not isinstance(value, str):
            return value
        return re.sub(r"\{(\w+)\}", lambda found: self.paths.get(found[1], found[0]), value)


def make_world(root: Path) -> World:
    """Everything that the cases name: two tiny models, data of all stages, and what is wrong with others."""
    paths = {name: str(root / name) for name in ("empty", "file", "binary", "nowhere", "run", "out")}
    paths["root"] = str(root)
    (root / "empty").mkdir(parents=True)
    (root / "file").write_text("text\n")
    (root / "binary").write_bytes(bytes(range(256)) * 8)
    paths["inside_file"] = str(root / "file" / "run")
    paths["too_long"] = str(root / ("n" * 300))
    paths["data"] = make_data(root / "data", num_train=6, num_validation=2)
    paths["llama"] = make_model_dir(root / "llama")
    paths["reward"] = make_model_dir(root / "reward", scorer=True)
    paths["other_data"] = make_data(
        root / "other_data", make_tokenizer(bos=True, pad_is_eos=False), num_train=3, num_validation=1
    )
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(root / "t5")
    tokenizer_for().save_pretrained(root / "t5")
    paths["t5"] = str(root / "t5")
    shutil.copytree(root / "llama", root / "no_tokenizer", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    paths["no_tokenizer"] = str(root / "no_tokenizer")
    shutil.copytree(root / "llama", root / "broken_config")
    (root / "broken_config" / "config.json").write_text('{"model_type": ')
    paths["broken_config"] = str(root / "broken_config")
    for name, content in _broken_data():
        (root / name).mkdir()
        paths[name] = str(root / name)
        for stage in ("finetune", "preference", "feedback", "prompts"):
            if isinstance(content, bytes):
                (root / name / f"{stage}_train.pt").write_bytes(content)
            else:
                torch.save(content, root / name / f"{stage}_train.pt")
    (root / "broken_data_args").mkdir()
    shutil.copytree(root / "data", root / "broken_data_args", dirs_exist_ok=True)
    (root / "broken_data_args" / "args.json").write_text("[1, 2")
    paths["broken_data_args"] = str(root / "broken_data_args")
    (root / "taken").mkdir()
    (root / "taken" / "args.json").write_text("{}")
    paths["taken"] = str(root / "taken")
    for name, content in _args_files():
        (root / f"{name}.json").write_bytes(content)
        paths[name] = str(root / f"{name}.json")
    for name, content in _functions().items():
        (root / f"{name}.py").write_text(content)
        paths[name] = str(root / f"{name}.py")
    return World(root, paths)


def _broken_data() -> Iterator[tuple[str, Any]]:
    yield "no_rows", []
    yield "foreign_rows", [{"question": "what?", "answer": "that"}]
    yield "no_list", {"rows": 3}
    yield "damaged_data", b"PK\x03\x04 this is no torch file"


def _args_files() -> Iterator[tuple[str, bytes]]:
    yield "not_utf8", b'{"data_dir": "\xff\xfe"}'
    yield "not_json", b"data_dir: data\n"
    yield "a_list", b'["--seed=1"]'
    yield "too_deep", b'{"seed": ' + b"[" * 100_000
    yield "digits", b'{"seed": ' + b"9" * 5000 + b"}"
    yield "empty_json", b""
    yield "too_long_json", b'{"seed": 1}' + b" " * LARGEST_JSON
    for name, content in {
        "unknown_key": {"learning_rates": 1},
        "text_for_number": {"seed": "many"},
        "list_for_number": {"seed": [1]},
        "number_for_text": {"data_dir": 7},
        "nested": {"seed": {"value": 1}},
        "null_for_number": {"seed": None},
        "bool_for_number": {"seed": True},
        "fraction_for_count": {"seed": 1.5},
        "nan_inside": {"seed": math.nan},
        "too_large": {"seed": 10**30},
        "nul_inside": {"data_dir": "a\0b"},
        "surrogate_inside": {"data_dir": "\ud800"},
    }.items():
        yield name, json.dumps(content).encode()


def _functions() -> dict[str, str]:
    return {
        "good_function": "def reward(prompts, responses, rows):\n    return [0.0] * len(rows)\n",
        "no_import": "import a_package_that_is_not_there\n",
        "no_syntax": "def reward(:\n",
        "exits": "raise SystemExit(3)\n",
        "no_function": "reward = 3\n",
    }


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Every path under a folder, with its size and time of change; of folders only that they are there."""
    stats = {str(path.relative_to(root)): path.lstat() for path in root.rglob("*") if "__pycache__" not in path.parts}
    return {name: (0, 0) if (root / name).is_dir() else (s.st_size, s.st_mtime_ns) for name, s in stats.items()}


def words_of(given: Given) -> list[str]:
    """A command line; what stands under "" is a word of its own."""
    words = [given[""]] if "" in given else []
    for name, value in given.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None and name:
            words.append(f"--{name}={value}")
    return words


def outcome(entry: EntryPoint, world: World, given: Given, monkeypatch, capsys) -> tuple[str, list[str]]:
    """Run an entry point as a shell does, on a wrong command line: its sentence, and what is wrong with how it ends.

    It must end with status 2, one line on stderr that says what would be right, and nothing written.
    """
    argv = words_of(world.filled({**entry.good, **given}))
    monkeypatch.setattr(sys, "argv", ["script", *argv])
    monkeypatch.chdir(world.root)
    before, status = listing(world.root), None
    capsys.readouterr()
    try:
        launch(entry.main, entry.flags)
    except SystemExit as ended:
        status = ended.code
    except Exception as error:
        status = f"{type(error).__name__}: {error}"
    changed = sorted(name for name, _ in set(listing(world.root).items()) ^ set(before.items()))
    lines = capsys.readouterr().err.strip().splitlines() or [""]
    sentence = lines[-1]
    faults = {
        f"it ends with {status}": status != 2,
        f"it says {lines}": [line[:7] for line in lines] != ["error: "] or len(sentence) > 700,
        "it shows Python's own words": SOUP.search(sentence),
        "it says no remedy": not REMEDY.search(sentence),
        f"it leaves {changed[:3]} behind": changed,
    }
    shutil.rmtree(world.paths.get("run", world.root / "run"), ignore_errors=True)  # so that one fault stays one
    return sentence, [fault for fault, is_so in faults.items() if is_so]


def check_all(entry: EntryPoint, world: World, cases: Iterable[Case], monkeypatch, capsys) -> None:
    """Every case is refused as `outcome` wants it, with its words."""
    failures = []
    for given, words in cases:
        sentence, faults = outcome(entry, world, given, monkeypatch, capsys)
        if world.filled(words) not in sentence:
            faults.append(f"it does not say {words!r}")
        failures += [f"{given}: {', '.join(faults)}: {sentence}"] if faults else []
    assert not failures, "\n".join(failures)


def wrong_values(entry: EntryPoint, known: set[str]) -> Iterator[tuple[str, str]]:
    """(flag, value that it can't have): for flags in `known` one, for others every kind there is."""
    hints = get_type_hints(entry.flags)
    for field in dataclasses.fields(entry.flags):
        values = _wrong_for(item_kind(hints[field.name]), field.name)
        for value in values[:1] if field.name in known else values:
            yield field.name, value
        known.add(field.name)


def _wrong_for(kind: Any, name: str) -> list[str]:
    if get_origin(kind) is Literal:
        return ["neither", ""]
    if kind is bool:
        return ["perhaps", ""]
    if kind is str:
        return ["", "  "]
    allowed = RANGES.get(name)
    outside = [] if allowed is None or math.isinf(allowed.low) else [allowed.low - 1]
    outside += [allowed.low] if allowed is not None and allowed.above else []
    outside += [] if allowed is None or math.isinf(allowed.high) else [allowed.high + 1]
    if kind is int:
        return ["many", "", "1.5", "9" * 5000, str(10**30), *(str(math.floor(x)) for x in outside)]
    return ["nan", "many", "", "inf", "1e400", *map(str, outside)]


ARGS_FILES: list[Case] = [
    ({"args_file": "{nowhere}"}, "--args_file {nowhere}: there is no such file"),
    ({"args_file": "{empty}"}, "--args_file {empty}: is a folder"),
    ({"args_file": "{too_long}"}, "file name too long"),
    ({"args_file": ""}, "--args_file is empty"),
    ({"args_file": "{not_utf8}"}, "is not valid UTF-8"),
    ({"args_file": "{binary}"}, "is not valid UTF-8"),
    ({"args_file": "{not_json}"}, "is not valid JSON (line 1, column 1"),
    ({"args_file": "{empty_json}"}, "is not valid JSON"),
    ({"args_file": "{too_long_json}"}, "--args_file {too_long_json} has more than 4 MB"),
    ({"args_file": "{a_list}"}, "holds no JSON object"),
    ({"args_file": "{too_deep}"}, "nests too deeply"),
    ({"args_file": "{digits}"}, "thousands of digits"),
    ({"args_file": "{unknown_key}"}, "'learning_rates' is not a flag of this script"),
]
"""Whatever the script."""

TYPES_IN_ARGS_FILES: list[Case] = [
    ({"args_file": "{text_for_number}"}, "'seed' is \"many\" and must be a whole number"),
    ({"args_file": "{list_for_number}"}, "'seed' is [1] and must be a whole number"),
    ({"args_file": "{nested}"}, "'seed' is {\"value\": 1} and must be a whole number"),
    ({"args_file": "{null_for_number}"}, "'seed' is null and must be a whole number"),
    ({"args_file": "{bool_for_number}"}, "'seed' is true and must be a whole number"),
    ({"args_file": "{fraction_for_count}"}, "'seed' is 1.5 and must be a whole number"),
    ({"args_file": "{nan_inside}"}, "'seed' is NaN and must be a whole number"),
    ({"args_file": "{too_large}"}, "--seed=1000000000000000000000000000000 must be in [0, "),
]
"""Where there is a --seed."""

TEXTS_IN_ARGS_FILES: list[Case] = [
    ({"args_file": "{number_for_text}"}, "'data_dir' is 7 and must be a text"),
    ({"data_dir": None, "args_file": "{nul_inside}"}, "--data_dir=a\N{REPLACEMENT CHARACTER}b holds a NUL character"),
    ({"data_dir": None, "args_file": "{surrogate_inside}"}, "is not valid UTF-8"),
]
"""Where there is a --data_dir."""

WORDS: list[Case] = [
    ({"no_such_flag": "1"}, "--no_such_flag is no flag of this script"),
    ({"": "stray"}, "'stray' belongs to no flag"),
    ({"": "-x"}, "--x is no flag of this script"),
    ({"": "--=3"}, "is no flag of this script"),
]
"""Words of a command line that are no flags."""

MODELS: list[Case] = [
    ({"model_name": None}, "no model is given; set --model_name"),
    ({"model_name": "{nowhere}"}, "--model_name={nowhere}: there is no such folder"),
    ({"model_name": "~/no/such/model"}, "--model_name=~/no/such/model: there is no such folder"),
    ({"model_name": "{empty}"}, "--model_name={empty} holds no model"),
    ({"model_name": "{file}"}, "--model_name={file} holds no model"),
    ({"model_name": "{data}"}, "--model_name={data} holds no model"),
    ({"model_name": "{too_long}"}, "file name too long"),
    ({"model_name": "nobody/nothing"}, "'nobody/nothing'"),
    ({"model_name": "./nobody"}, "--model_name=./nobody: there is no such folder"),
    ({"model_name": "experiments/runs/nobody"}, "--model_name=experiments/runs/nobody: there is no such folder"),
    ({"model_name": "runs/"}, "--model_name=runs/: there is no such folder"),
    ({"model_name": "my model"}, "--model_name=my model: there is no such folder"),
    ({"model_name": "runs\\sft"}, "--model_name=runs\\sft: there is no such folder"),
    ({"model_name": "{no_tokenizer}"}, "{no_tokenizer}"),
    ({"model_name": "{broken_config}"}, "{broken_config}"),
    ({"model_name": "{t5}"}, "{t5} is an encoder-decoder"),
]
"""Models that are none."""

DATA: list[Case] = [
    ({"data_dir": None}, "--data_dir is missing"),
    ({"data_dir": ""}, "--data_dir is empty"),
    ({"data_dir": "{too_long}"}, "file name too long"),
    ({"data_dir": "{nowhere}"}, "{nowhere}"),
    ({"data_dir": "{file}"}, "{file}"),
    ({"data_dir": "{empty}"}, "{empty}"),
    ({"data_dir": "{other_data}"}, "was tokenised by 'tiny'"),
    ({"data_dir": "{no_rows}"}, "{no_rows}"),
    ({"data_dir": "{foreign_rows}"}, "row 0: lacks"),
    ({"data_dir": "{no_list}"}, "it must hold a list of dicts"),
    ({"data_dir": "{damaged_data}"}, "is damaged or no torch file"),
    ({"data_dir": "{broken_data_args}"}, "{broken_data_args}/args.json"),
]
"""Data that can't be trained on."""

RUN: list[Case] = [
    ({"experiment_dir": "{file}"}, "--experiment_dir={file} is a file; give a folder"),
    ({"experiment_dir": "{inside_file}"}, "lies inside {file}, which is a file"),
    ({"experiment_dir": "/proc/nothing/run"}, "--experiment_dir=/proc/nothing/run can't be written"),
    ({"experiment_dir": "{too_long}"}, "file name too long"),
    ({"experiment_dir": "{taken}"}, "holds a run already"),
    ({"experiment_dir": None, "resume": "True"}, "--resume needs --experiment_dir"),
    ({"resume": "True"}, "--resume"),
    ({"logger": "wandb"}, "--logger=wandb needs the wandb package"),
]
"""The experiment folder and its loggers."""

DEVICES: list[Case] = [
    ({"devices": "none"}, "--devices=none must be auto or a number from 1"),
    ({"devices": "0"}, "--devices=0 must be auto or a number from 1"),
    ({"devices": "-1"}, "--devices=-1 must be"),
    ({"devices": "1.5"}, "--devices=1.5 must be"),
    ({"devices": "0,1"}, "--devices=0,1 must be"),
    ({"devices": "99999"}, "--devices=99999 must be"),
    ({"accelerator": "tpux"}, "--accelerator=tpux must be one of auto, cpu, cuda, gpu, mps"),
    ({"accelerator": "cuda"}, "--accelerator=cuda: torch finds none here"),
    ({"accelerator": "mps"}, "--accelerator=mps: torch finds none here"),
    ({"strategy": "fsdp"}, "--strategy=fsdp must be one of auto, ddp"),
    ({"precision": "16"}, "--precision=16 must be one of"),
]
"""Devices that are not there."""
