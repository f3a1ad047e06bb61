"""Two processes are one: the same rows, gradients, weights and numbers as one process with the whole batch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.grpo import REWARDS
from tests.ppo import on_two_processes
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags
from tests.two_processes import SCRIPTS, run_all

ROOT = Path(__file__).resolve().parents[1]

# Nine rows in steps of eight: four on each process, then one row, which leaves a process without any.
NUM_TRAIN, NUM_VALIDATION = 9, 5
SGD = {
    "optimizer": "sgd",
    "learning_rate": 0.2,
    "lr_schedule": "constant",
    "gradient_clip_val": 0.0,
    "eval_interval": 1,
    "eval_iters": 0,
    "save_interval": 0,
    "seed": 1,
}
JOBS = {
    "sft": ("sft", {"micro_batch_size": 2}),
    "sft-tokens": ("sft", {"micro_batch_tokens": 60, "gradient_checkpointing": True}),
    "rm": ("rm", {"micro_batch_size": 3, "loss_type": "per_sample"}),
    "dpo": ("dpo", {"micro_batch_size": 1, "sft_coef": 0.3}),
    "dpo-aot": (
        "dpo",
        {"micro_batch_size": 1, "loss_type": ["aot", "aot_unpaired", "orpo"], "ref_update_interval": 1},
    ),
    "dpo-lora": ("dpo", {"micro_batch_size": 3, "finetune_mode": "lora", "lora_rank": 2}),
    "kto": ("kto", {"micro_batch_size": 4}),
    "kto-cut": ("kto", {"micro_batch_size": 1, "desirable_weight": 1.5}),
    "kto-bco": ("kto", {"micro_batch_size": 3, "loss_type": "bco"}),
    "kto-padded": ("kto", {"micro_batch_size": 2, "model": "gptj"}),
    "grpo": ("grpo", {"micro_batch_size": 1, "num_samples": 3, "kl_coef": 0.5, "rollout_mini_batch_size": 5}),
    "dpo-online": ("online_dpo", {"micro_batch_size": 3, "num_samples": 3, "sft_coef": 0.1}),
    "sft-padded": ("sft", {"micro_batch_size": 2, "model": "gptj"}),
}
EVERY_JOB = pytest.mark.parametrize("job", JOBS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """All jobs on two processes with half the mini-batch each, and on one; each world with data of its own."""
    root = tmp_path_factory.mktemp("devices")
    models = {name: make_model_dir(root / name, name) for name in ("llama", "gptj")}
    (root / "my_rewards.py").write_text(REWARDS)
    found = {}
    for world_size in (1, 2):
        found[world_size] = root / str(world_size)
        data = make_data(found[world_size] / "data", num_train=NUM_TRAIN, num_validation=NUM_VALIDATION)
        runs = []
        for job, (script, given) in JOBS.items():
            options = {
                **SGD,
                "mini_batch_size": 8 // world_size,
                **given,
                "model_name": models[given.get("model", "llama")],
            }
            options.pop("model", None)
            if script in ("grpo", "online_dpo"):
                options.update(rollout_size=8 // world_size, reward=[f"function:{root}/my_rewards.py:distinct"])
            if world_size == 1:
                options.update(micro_batch_size=8, micro_batch_tokens=None)
            else:
                options.update(devices="2", strategy="ddp")
            flags = quick_flags(SCRIPTS[script][1], data, found[world_size] / job, **options)
            runs.append((script, dataclasses.asdict(flags)))
        if world_size == 2:
            options = {**runs[0][1], "experiment_dir": str(found[2] / "spoiled"), "skip_nonfinite_steps": 1}
            runs.append(("sft", {**options, "spoil": 1}))
        plan = found[world_size] / "runs.json"
        plan.write_text(json.dumps(runs))
        if world_size == 1:
            run_all(plan)
        else:
            on_two_processes(ROOT / "tests" / "two_processes.py", str(plan))
    return found


def seen(folders: dict[int, Path], world_size: int, job: str, rank: int = 0) -> list[dict]:
    return torch.load(folders[world_size] / job / f"rank-{rank}.pt", weights_only=True)


@EVERY_JOB
def test_c27_two_processes_see_the_rows_of_one(folders, job):
    """C27: the same rows of the data in the same steps."""
    rows = [[step["rows"] for step in seen(folders, n, job)] for n in (1, 2)]
    assert rows[0] == rows[1]
    assert [len(step) for step in rows[0]] == [8, 1]
    assert sorted(rows[0][0] + rows[0][1]) == list(range(NUM_TRAIN))


@EVERY_JOB
def test_c3_gradients_of_two_processes_are_those_of_one(folders, job):
    """C3, C17: to 1e-5 of their size in the first step, however each process cuts its part; the second step, in which
    one process has no row, starts from weights that differ by that rounding. Both processes hold equal weights."""
    one, two, other = seen(folders, 1, job), seen(folders, 2, job), seen(folders, 2, job, rank=1)
    for step, tolerance in ((0, 1e-5), (1, 1e-4)):
        whole = torch.stack([g.norm() for g in one[step]["gradients"]]).norm()
        assert whole > 1e-3
        for g, h in zip(one[step]["gradients"], two[step]["gradients"], strict=True):
            assert (g - h).norm() <= tolerance * (g.norm() + 0.1 * whole)
        assert all(map(torch.equal, two[step]["weights"], other[step]["weights"]))


@EVERY_JOB
def test_c20_logged_numbers_are_of_both_processes(folders, job):
    """C20: training steps and evaluations, odd numbers of rows included, as one process logs them."""
    lines = [metrics_of(folders[n] / job) for n in (1, 2)]
    assert [line["step"] for line in lines[0]] == [0, 1, 1, 2, 2]
    for one, two in zip(*lines, strict=True):
        assert list(one) == list(two)
        numbers = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in (one, two)]
        if (
            job.startswith(("dpo", "kto")) and one["step"] <= 1
        ):  # policy = reference: rounding decides between equal rewards
            for line in numbers:
                line.pop("train/accuracy", None)
                line.pop("val/auc", None) if one["step"] == 0 else None
                line.pop("val/accuracy", None) if one["step"] == 0 else None
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4, abs=2e-5)


def test_c25_both_processes_skip_a_loss_that_is_not_finite_on_one(folders):
    """C25: the gradient is finite, and only one of them sees the loss; the first step changes nothing on either."""
    start = load_file(folders[2].parent / "llama" / "model.safetensors")
    one, other = (seen(folders, 2, "spoiled", rank) for rank in range(2))
    assert all(g.isfinite().all() for step in one for g in step["gradients"])
    assert sorted(v.sum().item() for v in one[0]["weights"]) == sorted(v.sum().item() for v in start.values())
    for step in range(2):
        assert all(map(torch.equal, one[step]["weights"], other[step]["weights"]))
    assert not all(map(torch.equal, one[0]["weights"], one[1]["weights"]))
    assert metrics_of(folders[2] / "spoiled")[-1]["step"] == 2


def test_the_final_models_are_equal(folders):
    for job in ("sft", "rm", "dpo"):
        one, two = (load_file(folders[n] / job / "final" / "model.safetensors") for n in (1, 2))
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_one_process_writes(folders):
    """One metrics.jsonl, one line for each step, one folder; the plan speaks of both."""
    environment = json.loads((folders[2] / "sft" / "environment.json").read_text())
    assert environment["world_size"] == 2
    names = {p.name for p in (folders[2] / "sft").iterdir()} - {"rank-0.pt", "rank-1.pt"}
    assert names == {p.name for p in (folders[1] / "sft").iterdir()} - {"rank-0.pt"}


def test_fabric_run_starts_a_script_on_two_processes(tmp_path):
    """`fabric run --accelerator=cpu --devices=2 --strategy=ddp rlhf/rlhf_sft.py …`, as a user types it."""
    data, model = make_data(tmp_path / "data"), make_model_dir(tmp_path / "model")
    command = [
        str(Path(sys.executable).with_name("fabric")), "run", "--accelerator=cpu", "--devices=2", "--strategy=ddp",
        "rlhf/rlhf_sft.py", f"--data_dir={data}", f"--model_name={model}", f"--experiment_dir={tmp_path / 'run'}",
        "--max_steps=2", "--logger=none", "--precision=32-true", "--mini_batch_size=3", "--max_new_tokens=4",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # In a session of its own: the launcher signals its whole process group when it ends.
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
        start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 rows a step (3 on each of 2 devices" in done.stdout
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 2]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
