"""Long runs: memory that stays where it is, counters that do not overflow, names and clocks; bf16's small steps."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file

from experiments import soak
from rlhf import monitoring, rlhf_dpo, rlhf_sft
from rlhf.advantages import RunningMoments
from rlhf.experiment.checkpoints import Checkpoints
from rlhf.experiment.metrics import Metrics
from rlhf.files import claimed
from rlhf.schedules import AdaptiveKL, lr_multiplier
from rlhf.trees.batches import epoch_order, rollout_sizes, rows_of_step
from rlhf.trees.masks import causal_mask
from tests import ppo
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("long")
    return {"data": make_data(root / "data"), "llama": make_model_dir(root / "llama"), "root": str(root)}


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("script", ["ppo", "dpo"])
def test_c26_memory_handles_and_threads_stay_where_they_are(tmp_path, script):
    """C26: 60 updates with evaluations and checkpoints: the peak of updates 50 to 60 is at most 1.02 times that of
    updates 5 to 15, and live tensors, handles and threads have not grown; a line of metrics.jsonl an update."""
    readings = soak.soak(script, 60, tmp_path)
    early, late = (max(r.peak for r in readings[a:b]) for a, b in ((4, 15), (49, 60)))
    assert late <= 1.02 * early
    assert soak.memory_faults(readings) == []
    assert soak.log_faults(tmp_path / "run", 60) == []


LEAKS = {
    "memory": ([(100 + i, 8, 3) for i in range(60)], "memory"),
    "handles": ([(100, 8 + i // 20, 3) for i in range(60)], "handles"),
    "threads": ([(100, 8, 3 + i // 20) for i in range(60)], "threads"),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_c26_the_soak_finds_what_grows(leak):
    """Readings of 60 updates that rise by a MB an update, a handle or a thread in twenty; steady ones are fine."""
    numbers, word = LEAKS[leak]
    steady = [soak.Reading(100 << 20, 100 << 20, 8, 3, 500)] * 60
    assert soak.memory_faults(steady) == []
    readings = [soak.Reading(mb << 20, mb << 20, handles, threads, 500) for mb, handles, threads in numbers]
    (fault,) = soak.memory_faults(readings)
    assert word in fault
    tensors = [r._replace(tensors=500 + i) for i, r in enumerate(steady)]
    assert soak.memory_faults(tensors) == ["tensors: 509 after 10 updates, 559 after 60"]


def test_c26_the_soak_reads_the_logs(tmp_path):
    """A line too few, one that is out of order, a number that is not finite, a negative time: each is told."""
    lines = [{"step": s, "train/loss": 1.0, "perf/step_seconds": 0.5} for s in (1, 2, 3)]

    def faults(*changed: dict[str, Any]) -> str:
        text = "".join(json.dumps(line) + "\n" for line in changed)
        (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
        return "; ".join(soak.log_faults(tmp_path, 3))

    assert faults(*lines) == ""
    assert "one line" in faults(*lines[:2])
    assert "order" in faults(lines[1], lines[0], lines[2])
    assert "train/loss of step 3 is not finite" in faults(*lines[:2], {**lines[2], "train/loss": None})
    assert "perf/step_seconds is -1" in faults(*lines[:2], {**lines[2], "perf/step_seconds": -1})


def test_causal_masks_of_any_size_are_parts_of_a_few():
    """C26: the masks of 300 lengths are kept as one for each power of 2; each is the one that it says."""
    from rlhf.trees import masks

    masks._causal_mask.cache_clear()
    for keys in range(1, 301):
        queries = keys - keys // 3
        mask = causal_mask(queries, keys, torch.float32, torch.device("cpu"))
        first = keys - queries
        assert mask.shape == (queries, keys)
        assert torch.equal(mask == 0, torch.arange(keys) <= torch.arange(first, keys)[:, None])
    assert masks._causal_mask.cache_info().currsize <= 20


def test_evaluations_log_a_bounded_number_of_answers(lab, tmp_path, monkeypatch):
    """Six held-out prompts, of which the first two are logged, the same at each evaluation; means are over all six."""
    monkeypatch.setattr(monitoring, "LOGGED_SAMPLES", 2)
    world = ppo.make_world(tmp_path)
    flags = ppo.flags_of(world, tmp_path / "run", eval_interval=1, eval_iters=0)
    from rlhf import rlhf_ppo

    rlhf_ppo.main(flags)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    prompts = [[s["prompt"] for s in samples if s["step"] == step and "score" in s] for step in (0, 1)]
    assert len(prompts[0]) == 2
    assert prompts[0] == prompts[1]


# ---------------------------------------------------------------------------------------------------------- numbers


def test_running_moments_after_a_thousand_million_samples():
    """10^9 scores of mean 1,000 and deviation 2, then 64 of 1,003: the mean rises by 3 * 64 / (10^9 + 64), which
    float32 cannot hold, and the sum of squares by 9 * 64 (1 - 6.4e-8)."""
    moments = RunningMoments()
    moments.load_state_dict({"count": 1e9, "mean": 1000.0, "m2": 4.0 * (1e9 - 1)})
    moments.update(torch.full((64,), 1003.0))
    assert moments.count == 1e9 + 64
    assert moments.mean - 1000.0 == pytest.approx(3 * 64 / (1e9 + 64), rel=1e-5)
    assert moments.state_dict()["m2"] - 4.0 * (1e9 - 1) == pytest.approx(576.0, rel=1e-3)


def test_a_kl_controller_over_a_million_updates_stays_within_its_bounds():
    """K3: a million updates at twice the target, of 64 of 10^9 responses each: beta grows by exp(0.2 * 0.064)."""
    controller = AdaptiveKL(0.1, target=6.0, horizon=1e9)
    for _ in range(1_000_000):
        controller.update(kl=12.0, n=64)
    assert controller.value == pytest.approx(0.1 * math.exp(0.2 * 64e6 / 1e9), rel=1e-6)


def test_counts_beyond_what_float32_can_hold(lab):
    """C20: 2^24 tokens and then one at a time: float32 would stop at 16,777,216, and the mean would be 8 % off."""
    metrics = Metrics(Fabric(accelerator="cpu", devices=1))
    metrics.add("nll", torch.tensor(2.0**24), torch.tensor(2.0**24))
    one = torch.tensor(1.0)
    for _ in range(1000):
        metrics.add("nll", 0.0, one)
    assert metrics.reduce()["nll"] == pytest.approx(2**24 / (2**24 + 1000), rel=1e-9)


def test_a_thousand_million_steps(lab):
    """Rates, orders, rows and the plan of steps near 10^9: distinct, in range, and without a list of them all."""
    total = 10**9
    for schedule in ("linear", "cosine"):
        rates = [
            lr_multiplier(s, total_steps=total, warmup_steps=10, schedule=schedule) for s in (10, total // 2, total - 1)
        ]
        assert rates[0] == 1.0
        assert rates == sorted(rates, reverse=True)
        assert 0 <= rates[2] < 1e-8
    assert lr_multiplier(total - 1, total_steps=total, warmup_steps=0, schedule="linear") == pytest.approx(1e-9)
    rows = rows_of_step(total, 10, 4, seed=2**31, shuffle=True)
    assert set(rows) <= set(range(10))
    orders = [epoch_order(1000, seed=42, epoch=e, shuffle=True).tolist() for e in (total, total + 1, total + 1)]
    assert orders[0] != orders[1] == orders[2]
    # An epoch of 10 prompts is two rollouts of 4 and one of 2.
    assert rollout_sizes(10, 4, num_steps=3 * total + 1) == {4: 2 * total + 1, 2: total}
    assert rollout_sizes(8, 4, num_steps=total) == {4: total}


def test_checkpoints_past_the_eighth_digit_are_the_newest(tmp_path):
    """step-100000000 comes after step-99999999, though not in the alphabet."""
    for step in (99_999_998, 99_999_999, 100_000_000):
        (tmp_path / f"step-{step:08d}").mkdir()
    names = [path.name for path in Checkpoints(tmp_path, keep=2).steps()]
    assert names == ["step-99999998", "step-99999999", "step-100000000"]


# ------------------------------------------------------------------------------------------------- names and clocks


def test_two_runs_of_one_second_have_two_folders(lab, tmp_path, monkeypatch):
    """Both come to one name; the second run takes it with -2, and neither touches the other's files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    folders = []
    for _ in range(2):
        flags = quick_flags(rlhf_sft.SFTFlags, lab["data"], tmp_path, model_name=lab["llama"], max_steps=1)
        flags.experiment_dir = None
        folders.append(rlhf_sft.main(flags)["experiment_dir"])
    assert folders == [f"experiments/runs/rlhf_sft-20260101-000000{end}" for end in ("", "-2")]
    for folder in folders:
        assert json.loads((tmp_path / folder / "args.json").read_text())["experiment_dir"] == folder
        assert (tmp_path / folder / "final" / "model.safetensors").is_file()
    assert claimed(tmp_path / folders[0]).name.endswith("-3")


def test_the_wall_clock_may_go_backwards(lab, tmp_path, monkeypatch):
    """Every duration is from a clock that only goes forward: with `time.time` an hour back at each call none is
    negative; and nothing in the package takes the difference of two wall clocks."""
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    flags = quick_flags(
        rlhf_sft.SFTFlags, lab["data"], tmp_path / "run", model_name=lab["llama"], eval_interval=1, save_interval=1
    )
    rlhf_sft.main(flags)
    numbers = [x for line in metrics_of(tmp_path / "run") for n, x in line.items() if n.startswith("perf/")]
    assert numbers
    assert min(numbers) > 0
    package = Path(rlhf_sft.__file__).parent
    users = [
        path.name for path in package.rglob("*.py") if re.search(r"\btime\.time\(|datetime\.now", path.read_text())
    ]
    assert users == []


# -------------------------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_c25_bf16_moves_the_weights_as_float32_does_at_small_rates(lab, tmp_path, script):
    """C25: 100 steps at a rate of 1e-6: the total change of the weights has cosine >= 0.95 with that in float32.

    A change of 1e-4 in all is below what bf16 can tell from a weight of 0.2 (8e-4): weights kept in bf16 would stand
    still. The weights, and the state of the optimiser, are float32.
    """
    module, flags_class = {"sft": (rlhf_sft, rlhf_sft.SFTFlags), "dpo": (rlhf_dpo, rlhf_dpo.DPOFlags)}[script]
    start = load_file(Path(lab["llama"]) / "model.safetensors")
    changes = {}
    for precision in ("32-true", "bf16-mixed"):
        folder = tmp_path / precision
        flags = quick_flags(
            flags_class, lab["data"], folder, model_name=lab["llama"], precision=precision, learning_rate=1e-6,
            max_steps=100, lr_schedule="constant", mini_batch_size=4, log_interval=100, save_interval=100,
        )  # fmt: skip
        module.main(flags)
        end = load_file(folder / "final" / "model.safetensors")
        changes[precision] = torch.cat([(end[name].double() - start[name]).flatten() for name in start])
        assert all(value.dtype == torch.float32 for value in end.values())
        state = torch.load(folder / "checkpoints" / "step-00000100" / "optimizer.pt", weights_only=True)["state"]
        assert {x.dtype for part in state.values() for x in part.values()} == {torch.float32}
    one, other = changes.values()
    assert one.norm() > 0
    assert torch.cosine_similarity(one, other, 0) >= 0.95
    assert not torch.equal(one, other)
