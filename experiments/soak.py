"""Hundreds of updates on a tiny model: memory, handles and threads stay where they are, and so do the logs.

    python experiments/soak.py ppo
    python experiments/soak.py sft rm dpo kto grpo online_dpo --updates=100

Each script runs in a process of its own, on a random two-layer Llama and prompts of very unequal lengths, with
evaluations and checkpoints on the way. After each update it notes the peak of the resident memory since the one before
(Linux: the kernel's own peak, which is reset through /proc/self/clear_refs; where that is not allowed, the memory as it
stands), open handles and threads. The first sixth of the updates is the warm-up. The exit status is 0 if

- the peak of the last third is at most 2 % above that of the second sixth to the half,
- handles and threads are no more at the end than at the end of the warm-up, and live tensors have grown by less than
  one in ten updates (a cache takes in its last sizes late),
- metrics.jsonl has one line for each update, in order, all of it finite.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf import rlhf_dpo, rlhf_grpo, rlhf_kto, rlhf_online_dpo, rlhf_ppo, rlhf_rm, rlhf_sft
from rlhf.data.splits import IGNORE_INDEX, write_split
from rlhf.experiment.steps import Step

WORDS = (
    "the",
    "a",
    "garden",
    "river",
    "stone",
    "bird",
    "green",
    "old",
    "runs",
    "sings",
    "grows",
    "under",
    "over",
    "very",
)
SCRIPTS = {
    "sft": (rlhf_sft.main, rlhf_sft.SFTFlags),
    "rm": (rlhf_rm.main, rlhf_rm.RMFlags),
    "dpo": (rlhf_dpo.main, rlhf_dpo.DPOFlags),
    "kto": (rlhf_kto.main, rlhf_kto.KTOFlags),
    "ppo": (rlhf_ppo.main, rlhf_ppo.PPOFlags),
    "grpo": (rlhf_grpo.main, rlhf_grpo.GRPOFlags),
    "online_dpo": (rlhf_online_dpo.main, rlhf_online_dpo.OnlineDPOFlags),
}
SAMPLING = ("ppo", "grpo", "online_dpo")
SLACK = 1.02


class Reading(NamedTuple):
    """What a process holds after an update.

    Attributes:
        peak, rss: bytes of resident memory: the most since the reading before, and now.
        handles, threads: open file descriptors, and threads.
        tensors: live tensors; None where they were not counted.
    """

    peak: int
    rss: int
    handles: int
    threads: int
    tensors: int | None = None


def read_process(*, count_tensors: bool = False) -> Reading:
    """A reading of this process; the next peak counts from here."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, rss = (int(status[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        peak = rss
    tensors = None
    if count_tensors:
        gc.collect()
        tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    return Reading(peak, rss, len(os.listdir("/proc/self/fd")), int(status["Threads"]), tensors)


def make_world(folder: Path) -> dict[str, str]:
    """A tokenizer of whole words, a policy and a reward model of two layers, and data of every stage in `folder`."""
    special = ["<eos>", "<pad>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, pad_token_id=1, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "scorer")
    for name in ("policy", "scorer"):
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    for name, num in (("train", 120), ("validation", 8)):
        for stage, row_of in ROWS.items():
            write_split(folder / "data", stage, name, [row_of(draw, i) for i in range(num)])
    return {name: str(folder / name) for name in ("policy", "scorer", "data")}


def _ids(draw: random.Random, low: int, high: int) -> torch.Tensor:
    """Between `low` and `high` words, most of them few."""
    num = low + int((high - low) * draw.random() ** 3)
    return torch.tensor([draw.randrange(2, 2 + len(WORDS)) for _ in range(num)])


def _answered(draw: random.Random, prompt: torch.Tensor) -> torch.Tensor:
    return torch.cat([prompt, _ids(draw, 1, 80), torch.tensor([0])])


def _finetune(draw: random.Random, _: int) -> dict[str, Any]:
    prompt = _ids(draw, 2, 300)
    ids = _answered(draw, prompt)
    targets = ids.clone()
    targets[: len(prompt)] = IGNORE_INDEX
    return {"prompt_len": len(prompt), "input_ids": ids, "targets": targets}


def _preference(draw: random.Random, _: int) -> dict[str, Any]:
    prompt = _ids(draw, 2, 300)
    chosen, rejected = _answered(draw, prompt), _answered(draw, prompt)
    return {"prompt_len": len(prompt), "chosen_input_ids": chosen, "rejected_input_ids": rejected}


def _feedback(draw: random.Random, i: int) -> dict[str, Any]:
    row = _finetune(draw, i)
    return {"prompt_len": row["prompt_len"], "input_ids": row["input_ids"], "label": i % 2 == 0}


def _prompts(draw: random.Random, _: int) -> dict[str, Any]:
    prompt = _ids(draw, 2, 300)
    return {"prompt_len": len(prompt), "input_ids": prompt, "reference": ""}


ROWS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "finetune": _finetune, "preference": _preference, "feedback": _feedback, "prompts": _prompts,
}  # fmt: skip


def soak(script: str, updates: int, folder: Path) -> list[Reading]:
    """Run a script for so many updates in this process; returns a reading after each."""
    world = make_world(folder)
    main, flags_class = SCRIPTS[script]
    settings = {
        "data_dir": world["data"], "experiment_dir": str(folder / "run"), "max_steps": updates, "epochs": 1e9,
        "mini_batch_size": 4, "micro_batch_size": 2, "eval_interval": max(1, updates // 10), "eval_iters": 1,
        "save_interval": max(1, updates // 10), "keep_checkpoints": 2, "accelerator": "cpu", "precision": "32-true",
    }  # fmt: skip
    if script in SAMPLING:
        settings |= {"sft_experiment_dir": world["policy"], "rollout_size": 4, "max_new_tokens": 16}
        settings["on_collapse"] = "warn"  # a tiny random policy may well collapse; what is watched is the process
        settings |= {"rm_experiment_dir": world["scorer"]} if script == "ppo" else {"reward": ["length:8"]}
    else:
        settings["model_name"] = world["policy"]
    if script in ("sft", "dpo", "kto"):
        settings["max_new_tokens"] = 8
    readings: list[Reading] = []
    finish = Step.finish

    def watched(self, bar) -> None:
        finish(self, bar)
        done = len(readings) + 1
        readings.append(read_process(count_tensors=done in (updates // 6, updates)))

    Step.finish = watched
    try:
        main(flags_class(**settings))
    finally:
        Step.finish = finish
    return readings


def memory_faults(readings: list[Reading]) -> list[str]:
    """What has grown, a sentence each."""
    updates = len(readings)
    warm = updates // 6
    early = max(r.peak for r in readings[warm : updates // 2])
    late = max(r.peak for r in readings[2 * updates // 3 :])
    faults = []
    if late > SLACK * early:
        faults.append(f"the peak of the memory rose from {early / 2**20:.1f} to {late / 2**20:.1f} MB")
    for name in ("handles", "threads", "tensors"):
        one, other = (getattr(readings[i], name) for i in (warm - 1, updates - 1))
        if other - one > (updates - warm) // 10 * (name == "tensors"):
            faults.append(f"{name}: {one} after {warm} updates, {other} after {updates}")
    return faults


def log_faults(folder: Path, updates: int) -> list[str]:
    """What is wrong with metrics.jsonl: a line an update, in order, every number finite."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    faults = [] if steps == sorted(steps) else ["metrics.jsonl: its steps are not in order"]
    if [line["step"] for line in lines if "perf/step_seconds" in line] != list(range(1, updates + 1)):
        faults.append("metrics.jsonl: not one line for each update")
    faults += [f"metrics.jsonl: {n} of step {x['step']} is not finite" for x in lines for n in x if x[n] is None]
    faults += [f"metrics.jsonl: {n} is {x[n]}" for x in lines for n in x if n.startswith("perf/") and x[n] < 0]
    return faults


def report(script: str, readings: list[Reading], folder: Path) -> int:
    """Print what was measured; returns the number of faults."""
    updates = len(readings)
    marks = sorted({updates // 6, updates // 2, 2 * updates // 3, updates})
    for mark in marks:
        r = readings[mark - 1]
        tensors = "" if r.tensors is None else f", {r.tensors} tensors"
        print(
            f"{script}: after {mark} updates {r.rss / 2**20:.1f} MB, peak {r.peak / 2**20:.1f} MB, "
            f"{r.handles} handles, {r.threads} threads{tensors}"
        )
    run = folder / "run"
    sizes = {path.name: path.stat().st_size for path in [*run.glob("*.jsonl"), *run.glob("tensorboard/*")]}
    print(
        f"{script}: " + ", ".join(f"{name[:18]} {size / updates:.0f} bytes an update" for name, size in sizes.items())
    )
    faults = [*memory_faults(readings), *log_faults(run, updates)]
    for fault in faults:
        print(f"{script}: FAULT: {fault}")
    return len(faults)


def main() -> int:
    """Returns 0 where nothing has grown and no log is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scripts", nargs="+", choices=list(SCRIPTS))
    parser.add_argument("--updates", type=int, default=300, help="updates of each script (default: 300)")
    given = parser.parse_args()
    if given.updates < 12:
        parser.error(f"--updates={given.updates} leaves nothing to compare; take 12 or more")
    if len(given.scripts) > 1:
        command = [sys.executable, __file__, f"--updates={given.updates}"]
        return max(subprocess.run([*command, script], check=False).returncode for script in given.scripts)
    (script,) = given.scripts
    with tempfile.TemporaryDirectory() as folder:
        faults = report(script, soak(script, given.updates, Path(folder)), Path(folder))
    print(f"{script}: {given.updates} updates, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
