"""C17: two processes with unequal work, or with less than a row each, finish, with as many updates on each."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from tests.grpo import REWARDS
from tests.ppo import make_world, on_two_processes
from tests.splits import make_data, metrics_of, quick_flags
from tests.unequal_processes import ALL

SAMPLED = {"rollout_size": 2, "max_new_tokens": 6, "on_collapse": "warn"}
JOBS = {
    "ppo": {**SAMPLED, "critic_init": "zero", "ppo_epochs": 2, "mini_batch_size": 1, "ptx_coef": 0.1},
    "grpo": {**SAMPLED, "num_samples": 2, "kl_coef": 0.1, "mini_batch_size": 1},
    "online_dpo": {**SAMPLED, "num_samples": 2, "mini_batch_size": 1},
    "sft": {},
    "rm": {},
    "dpo": {},
    "kto": {},
}
DATA = {"odd": (5, 1), "one": (1, 1)}
"""Training and validation rows: steps of two on each process leave one of five over, and one row alone is none for the
other."""
UPDATES = {
    ("ppo", "odd"): 20,
    ("ppo", "one"): 12,
    ("grpo", "odd"): 5,
    ("online_dpo", "odd"): 2,
    ("online_dpo", "one"): 0,
}
"""More or fewer than one a step: 2 + 1 + 2 mini-batches of 4, 1 and 4 rows; PPO has two epochs and two networks."""
CASES = [(job, data) for job in JOBS for data in DATA if (job, data) != ("kto", "one")]  # KTO refuses a single row


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("unequal")
    world = make_world(root / "world")
    data = {name: make_data(root / name, num_train=train, num_validation=rest) for name, (train, rest) in DATA.items()}
    (root / "rewards.py").write_text(REWARDS)
    plan = []
    for job, name in CASES:
        given = {"mini_batch_size": 2, "max_steps": 3, "eval_interval": 1, "devices": "2", "strategy": "ddp"}
        source = "model_name" if job == "sft" else "sft_experiment_dir"
        options = {**given, **JOBS[job], source: world.sft}
        if "rollout_size" in options:
            options["reward"] = [f"function:{root}/rewards.py:distinct"]
        if job == "ppo":
            options.update(actor_learning_rate=1e-3, critic_learning_rate=1e-3)
        flags = quick_flags(ALL[job][1], data[name], root / f"{job}-{name}", **options)
        plan.append((job, dataclasses.asdict(flags)))
    (root / "plan.json").write_text(json.dumps(plan))
    on_two_processes(Path(__file__).with_name("unequal_processes.py"), str(root / "plan.json"))
    return root


@pytest.mark.parametrize(("job", "data"), CASES)
def test_c17_both_processes_take_the_same_steps(folder, job, data):
    """As many updates, to the same weights, and all three steps; what is logged is finite. Responses that are all one
    EOS have equal rewards, and make no pair: the one case without an update."""
    run = folder / f"{job}-{data}"
    one, other = (json.loads((run / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one["steps"] == 3
    assert len(one["updates"]) == UPDATES.get((job, data), 3)
    assert len(set(one["updates"])) > 1 or data == "one"
    for line in metrics_of(run):
        line.pop("val/score_error", None)  # of one row there is none
        assert [name for name, value in line.items() if value is None or not math.isfinite(value)] == []
    assert [line["step"] for line in metrics_of(run) if "val/loss" in line or "val/score" in line] == [0, 1, 2, 3]
