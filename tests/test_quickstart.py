"""The whole pipeline on the real small model, as `experiments/quickstart.sh` runs it, with few steps a stage."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_quickstart(tmp_path):
    """C28: SFT, reward model, PPO, DPO and the table on a CPU, in one command."""
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "STEPS": "2", "PROMPTS": "4", "ROWS": "16"}
    run = subprocess.run(
        ["bash", "experiments/quickstart.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert list(results) == ["reward_model", "base", "sft", "ppo", "dpo"]
    assert 1 < results["sft"]["perplexity"] < results["base"]["perplexity"] < 200
    assert results["sft"]["kl_to_baseline"]["n"] == 4
    assert "| ppo |" in run.stdout
    assert "[dpo]" in run.stdout
