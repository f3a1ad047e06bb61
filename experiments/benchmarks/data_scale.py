"""A split of a million pairs: what it costs to write, to open, to plan an epoch of and to draw steps from.

    python experiments/benchmarks/data_scale.py
    python experiments/benchmarks/data_scale.py --num_pairs=100000 --output=scale.json

Pairs of random ids, with lengths like those of helpful-and-harmless pairs, are written by the project's own writers.
Fresh processes, one and then several at a time, then do what a training script does with a split: open it, fit it to a
model, plan the run, find its largest micro-batch, draw its steps and cut and pack micro-batches. After each stage a
process notes the seconds and its memory (Linux: /proc/self/smaps_rollup), as growth since before it opened the split:

own     what nobody else can use and the kernel cannot drop (Private_Dirty);
mapped  pages of the file, which all processes share and the kernel drops when it needs the room.

Also measured: a user's own `.pt` list of `--num_pt_pairs` without a twin, which the first process has to build.
"""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rlhf.data.exchange import write_pt
from rlhf.data.packed import PackedRows, offsets_of
from rlhf.data.twin import open_twin, stamp_twin, write_twin
from rlhf.experiment.fits import check_split
from rlhf.experiment.inputs import Inputs
from rlhf.files import write_json
from rlhf.flags import check_positive, launch
from rlhf.trees.batches import cut, largest_micro_batch, num_steps, rows_of_step
from rlhf.trees.forest import Forest, Tree
from rlhf.trees.rows import pair_tokens, pair_tree

VOCABULARY = 49152
MEANS = {"prompt": 91, "chosen": 33, "rejected": 40}
"""Tokens, as SmolLM2's tokenizer cuts helpful-and-harmless pairs (prompts to 256 tokens, responses to 128)."""
MOST = {"prompt": 256, "chosen": 128, "rejected": 128}
WIDTH = 0.7
"""Standard deviation of the logarithm of a length."""


@dataclass(kw_only=True)
class ScaleFlags:
    """A split of a million pairs."""

    num_pairs: int = 1_000_000
    """Pairs of the split."""
    num_pt_pairs: int = 100_000
    """Pairs of the `.pt` list without a twin."""
    num_processes: int = 2
    """Processes that open the split at the same time, after one has done so alone."""
    num_steps: int = 2000
    """Steps of the run that are drawn, cut and packed."""
    mini_batch_size: int = 8
    """Pairs of a step."""
    micro_batch_tokens: int = 1024
    """Distinct tokens of a micro-batch."""
    seed: int = 0
    """Seed of lengths, ids and order."""
    work_dir: str | None = None
    """Folder for the data, kept and used again; a temporary one unless set."""
    output: str | None = None
    """File for all figures as JSON."""


class Clock:
    """Seconds and growth of this process' memory, stage by stage."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self._before = memory()
        self._began = time.perf_counter()

    def note(self, stage: str, times: int = 1) -> None:
        """End a stage that did its work `times` times."""
        seconds = time.perf_counter() - self._began
        grown = {name: value - self._before[name] for name, value in memory().items()}
        self.stages.append({"stage": stage, "seconds": seconds / times, **grown})
        self._began = time.perf_counter()


def memory() -> dict[str, float]:
    """MB that this process has of its own, and that it has mapped from files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {name: int(value.split()[0]) / 1024 for name, value in (line.split(":") for line in lines)}
    return {"own": found["Private_Dirty"], "mapped": found["Private_Clean"] + found["Shared_Clean"]}


def lengths_of_pairs(num_pairs: int, seed: int) -> dict[str, np.ndarray]:
    """Tokens of `prompt`, `chosen` and `rejected` of each pair, (N,) int64: log-normal around `MEANS`."""
    draw = np.random.default_rng([seed, 0])
    found = {}
    for name, mean in MEANS.items():
        values = np.exp(draw.normal(np.log(mean) - WIDTH**2 / 2, WIDTH, num_pairs))
        found[name] = np.clip(np.rint(values), 2, MOST[name]).astype(np.int64)
    return found


def blocks_of_pairs(lengths: dict[str, np.ndarray], seed: int, size: int = 10_000) -> Iterator[PackedRows]:
    """Pairs of random ids, chosen and rejected behind the same prompt, `size` at a time."""
    draw = np.random.default_rng([seed, 1])
    for start in range(0, len(lengths["prompt"]), size):
        prompt_lens, *others = (values[start : start + size] for values in lengths.values())
        prompts = draw.integers(0, VOCABULARY, prompt_lens.sum(), dtype=np.int32)
        prompt_starts = offsets_of(prompt_lens)
        flat, offsets = {}, {}
        for column, response_lens in zip(("chosen_input_ids", "rejected_input_ids"), others, strict=True):
            offsets[column] = offsets_of(prompt_lens + response_lens)
            flat[column] = draw.integers(0, VOCABULARY, offsets[column][-1], dtype=np.int32)
            shift = np.repeat(offsets[column][:-1] - prompt_starts[:-1], prompt_lens)
            flat[column][shift + np.arange(len(shift))] = prompts
        yield PackedRows("preference", flat, offsets, {"prompt_len": prompt_lens})


def make(folder: Path, num_pairs: int, seed: int) -> dict[str, float]:
    """Write `preference_train.pt` and its twin; returns seconds, GB and the process' peak memory in MB."""
    folder.mkdir(parents=True, exist_ok=True)
    pt, twin = (folder / f"preference_train{suffix}" for suffix in (".pt", ".safetensors"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lengths = lengths_of_pairs(num_pairs, seed)
    columns = {f"{name}_input_ids": lengths["prompt"] + lengths[name] for name in ("chosen", "rejected")}
    found = {}
    began = time.perf_counter()
    write_twin(twin, "preference", columns, blocks_of_pairs(lengths, seed))
    found["twin_seconds"] = time.perf_counter() - began
    began = time.perf_counter()
    write_pt(pt, open_twin(twin).rows)
    found["pt_seconds"] = time.perf_counter() - began
    began = time.perf_counter()
    stamp_twin(twin, pt)
    found["stamp_seconds"] = time.perf_counter() - began
    found |= {"twin_gb": twin.stat().st_size / 1e9, "pt_gb": pt.stat().st_size / 1e9}
    return found | {"peak_mb_more": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}


def train(flags: ScaleFlags, folder: Path, barrier: Any) -> list[dict[str, Any]]:
    """What a training script does with a split, in this process, stage by stage."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model, tokenizer = LlamaForCausalLM(config), PreTrainedTokenizerBase()
    inputs = Inputs(Fabric(accelerator="cpu", devices=1), SimpleNamespace(data_dir=str(folder)))
    batches = {"micro_batch_size": flags.mini_batch_size, "micro_batch_tokens": flags.micro_batch_tokens}
    order = {"seed": flags.seed, "shuffle": True}
    Forest([Tree.of(torch.arange(3), torch.arange(2)) for _ in range(2)])  # what torch loads late is none of the data's
    barrier.wait()
    clock = Clock()
    split, _ = inputs.load_splits("preference", tokenizer)
    barrier.wait()
    clock.note("open")
    check_split(split, model)
    clock.note("fit the model")
    columns = split.lengths("chosen_input_ids"), split.lengths("rejected_input_ids")
    tokens = pair_tokens(split.prompt_lens, *columns)
    total = num_steps(len(split), flags.mini_batch_size, 1.0)
    for budget in (None, flags.micro_batch_tokens):
        largest_micro_batch(
            tokens, total_steps=total, mini_batch=flags.mini_batch_size, world_size=1,
            micro_batch_size=flags.mini_batch_size, micro_batch_tokens=budget, **order,
        )  # fmt: skip
    clock.note("plan")
    steps = (rows_of_step(i, len(split), flags.mini_batch_size, **order) for i in range(total))
    cuts = (rows for step in steps for rows in cut(step, tokens=tokens, **batches))
    Forest([pair_tree(split[i]) for i in next(cuts)])
    clock.note("first micro-batch")
    drawn = sum(1 for _ in islice(steps, flags.num_steps))
    clock.note("a step's rows", drawn)
    packed = sum(len([Forest([pair_tree(split[i]) for i in rows])]) for rows in islice(cuts, drawn))
    clock.note("a micro-batch", packed)
    seen = sum(len(rows) for step in steps for rows in cut(step, tokens=tokens, **batches))
    clock.note(f"cut the rest of the epoch ({seen:,} rows)")
    barrier.wait()
    return clock.stages


def open_once(folder: Path) -> list[dict[str, Any]]:
    """Open a split: the seconds, and the memory during and after it."""
    inputs = Inputs(Fabric(accelerator="cpu", devices=1), SimpleNamespace(data_dir=str(folder)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    clock = Clock()
    inputs.load_splits("preference", PreTrainedTokenizerBase())
    clock.note("open")
    return [{**clock.stages[0], "peak_mb_more": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}]


def _send(queue: Any, work: Any, arguments: tuple) -> None:
    queue.put(work(*arguments))


def in_processes(work: Any, *arguments: Any, num_processes: int = 1, together: bool = False) -> list[Any]:
    """What `work(*arguments)` returns in each of some fresh processes; with `together`, it also gets their barrier."""
    context = multiprocessing.get_context("spawn")
    queue, more = context.Queue(), ((context.Barrier(num_processes),) if together else ())
    request = (queue, work, arguments + more)
    processes = [context.Process(target=_send, args=request, daemon=True) for _ in range(num_processes)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def table(stages: list[dict[str, Any]]) -> str:
    """Milliseconds and memory of each stage.

    >>> print(table([{"stage": "open", "seconds": 0.25, "own": 1.5, "mapped": 40.0}]))
    stage                                                 ms   own MB  mapped MB
    open                                             250.000      1.5       40.0
    """
    lines = [f"{'stage':<44} {'ms':>11} {'own MB':>8} {'mapped MB':>10}"]
    for found in stages:
        seconds, own, mapped = (found[name] for name in ("seconds", "own", "mapped"))
        lines.append(f"{found['stage']:<44} {1000 * seconds:>11.3f} {own:>8.1f} {mapped:>10.1f}")
    return "\n".join(lines)


def main(flags: ScaleFlags) -> dict[str, Any]:
    """Make, open, plan and draw; returns all figures."""
    check_positive(flags, "num_pairs", "num_pt_pairs", "num_processes", "num_steps", "mini_batch_size")
    work = Path(flags.work_dir or tempfile.mkdtemp())
    found: dict[str, Any] = {}
    try:
        large, small = work / f"pairs-{flags.num_pairs}-{flags.seed}", work / f"list-{flags.num_pt_pairs}-{flags.seed}"
        if not (large / "preference_train.pt").is_file():
            (found["make"],) = in_processes(make, large, flags.num_pairs, flags.seed)
            print("written: " + ", ".join(f"{name} {value:.2f}" for name, value in found["make"].items()), flush=True)
        for number in dict.fromkeys((1, flags.num_processes)):
            name = f"{number} process{'es' if number > 1 else ''}"
            results = in_processes(train, flags, large, num_processes=number, together=True)
            found[name] = results
            print(f"\n{flags.num_pairs:,} pairs, {name}" + (": the first of them" if number > 1 else ""))
            print(table(results[0]), flush=True)
        if not (small / "preference_train.pt").is_file():
            in_processes(make, small, flags.num_pt_pairs, flags.seed)
        (small / "preference_train.safetensors").unlink(missing_ok=True)
        for name in ("without a twin", "with the twin"):
            ((found[name],),) = in_processes(open_once, small)
            peak = found[name]["peak_mb_more"]
            print(f"\n{flags.num_pt_pairs:,} pairs, a .pt {name}; at the peak {peak:.0f} MB more")
            print(table([found[name]]), flush=True)
    finally:
        if flags.work_dir is None:
            shutil.rmtree(work)
    if flags.output:
        write_json(flags.output, found)
    return found


if __name__ == "__main__":
    launch(main, ScaleFlags)
