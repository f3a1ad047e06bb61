"""Tiny experiments for the tests of the demos, and the modules of demos/ as a script finds them."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from rlhf.data.formats import format_of
from tests.splits import make_model_dir, tokenizer_for

DEMOS = Path(__file__).resolve().parents[1] / "demos"


def load(name: str) -> ModuleType:
    """A module of demos/; they import each other as they do when one of them is run."""
    sys.path.insert(0, str(DEMOS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DEMOS))


class Pace:
    """Holds every token back until `go` lets it through, so that how an answer is cut into parts is no accident."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens = load("serving")._Tokens
        put, self._permits = tokens.put, threading.Semaphore(2)  # the prompt and the first token

        def held(queue, value) -> None:
            assert self._permits.acquire(timeout=60)
            put(queue, value)

        monkeypatch.setattr(tokens, "put", held)

    def go(self, num: int = 1) -> None:
        self._permits.release(num)


def make_runs(root: Path) -> Path:
    """A tiny SFT experiment from a pretrained folder, and a DPO experiment that went on from it."""
    make_model_dir(root / "base")
    data = {"stages": {"finetune": {"format": format_of("dialogue", tokenizer_for())}}}
    starts = {
        "sft": {"model_name": str(root / "base"), "sft_experiment_dir": None},
        "dpo": {"model_name": None, "sft_experiment_dir": "sft"},
    }
    for seed, (name, args) in enumerate(starts.items(), start=1):
        run = root / name
        for place in ("final", "checkpoints/best/model", "checkpoints/step-00000020/model"):
            make_model_dir(run / place, seed=seed)
        (run / "checkpoints" / "step-00000100").mkdir()
        (run / "checkpoints" / "last").symlink_to("step-00000020")
        best = {"step": 10, "metric": "val/loss", "value": 1.25}
        (run / "checkpoints" / "best" / "best.json").write_text(json.dumps(best))
        (run / "args.json").write_text(json.dumps({**args, "data_dir": str(root / "nowhere")}))
        (run / "data.json").write_text(json.dumps(data))
    return root
