"""What the tests on hostile files share: sound folders to copy and spoil, and scripts run on them in a child."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf import rlhf_sft
from rlhf.flags import ModelFlags, launch
from rlhf.models.loading import load_policy, save_model
from tests import hostile
from tests.splits import make_data, make_model_dir, quick_flags, tokenizer_for

MOST_MB = 100


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
