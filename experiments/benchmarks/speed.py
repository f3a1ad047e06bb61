"""Seconds a step, tokens a second and memory of every stage, beside TRL's trainers and transformers' `generate`.

    bash experiments/benchmarks/speed.sh --model_name=HuggingFaceTB/SmolLM2-135M --data_file=pairs.jsonl.gz
    bash experiments/benchmarks/speed.sh --model_name=models/smollm2 --data_dir=data/hh --scaling=True --stages none

Each stage runs on both sides in turn (A B A B …), every run in a process of its own, on the same rows in the same
order, from the same weights, in the same precision (bf16 products over float32 weights), with fused AdamW, the same
batch, no gradient checkpointing, no evaluation and no writing of models. What the figures are:

- seconds: median of the steps after `--warmup`; in the table the median over runs. The ratio is of these medians; its
  spread is from the smallest to the largest ratio of two runs that followed one another.
- samples: rows, pairs, prompts or GRPO's responses; tokens: distinct real tokens (no padding; the prompt of a pair
  once), the same number on both sides; where the stage samples, prompts and sampled tokens.
- share: model FLOPs over time, of the machine's rate: the fastest of a few matrix products (speed_work.py has the
  formulas), measured at the end of the same run.
- memory: the most that the process ever held, and what it held before the first step, models loaded.

The peer runs at its best settings: `--tune` tries each alternative that speed_peer.py lists for the stage (attention
kernel, bounded logits, padding-free rows, static cache) in a run of its own, and keeps what is faster. It runs as it
is released. How malloc keeps freed memory (`rlhf/allocator.py`) is part of what is compared, and so is that TRL's PPO
samples and judges in float32; but as any program would gain from mending that, `--patched_runs` more runs give the
peer our setting of malloc and, in PPO, bf16 throughout: the rows "peer, patched".

Rows are grouped by length as the sampler of transformers does it, for both sides (where the stage samples: in file
order; TRL's PPO has no such sampler). DPO's and KTO's reference log-probabilities are stored on both sides, and
computing them is not timed. Of `grpo_long` the training pass is timed, not the sampling before it. On a CPU.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.benchmarks import speed_work
from experiments.benchmarks.speed_ours import settings as our_settings
from experiments.benchmarks.speed_peer import ALTERNATIVES
from experiments.benchmarks.speed_peer import settings as peer_settings
from experiments.benchmarks.speed_tables import scaling_table, stage_table, summary_of
from rlhf.data.splits import IGNORE_INDEX, load_split, write_split
from rlhf.errors import UserError
from rlhf.experiment.devices import fast_bf16
from rlhf.files import write_json
from rlhf.flags import check_positive, launch

ROOT = Path(__file__).resolve().parents[2]
TRL_WITH_PPO = ROOT / ".peers" / "trl-1.12.0"


@dataclass(kw_only=True)
class SpeedFlags:
    """Speed."""

    model_name: str
    """Language model that both start from: a hub id or a local folder."""
    data_dir: str | None = None
    """Folder with preference_train.pt, tokenised for the model."""
    data_file: str | None = None
    """Instead: pairs of dialogues as data_prep/helpful_harmless/prepare_data.py reads them, or the word sample."""
    stages: list[str] = field(default_factory=lambda: list(speed_work.STAGES))
    """Which of sft, rm, dpo, ppo, rollouts, dpo_long, kto, grpo and grpo_long; none beside --scaling."""
    pairs_of_runs: int = 5
    """Runs of each side, in turn."""
    steps: int = 10
    """Steps timed in each run."""
    warmup: int = 3
    """Steps before these: the first ones page in a process's memory, on either side."""
    ppo_steps: int = 3
    """Steps timed in each run of PPO, rollouts and GRPO."""
    ppo_warmup: int = 2
    """Steps before these."""
    batch: int = 8
    """Rows or pairs of a step; GRPO: responses to one prompt."""
    ppo_batch: int = 16
    """Prompts of a step of PPO and rollouts."""
    new_tokens: int = 64
    """Tokens sampled to each prompt."""
    max_prompt: int = 256
    """Longest prompt in tokens; other rows are left out."""
    max_response: int = 128
    """Longest response in tokens; other rows are left out."""
    order: Literal["grouped", "file"] = "grouped"
    """Rows of SFT, RM and DPO grouped by length, or as they stand in the file."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """As in the training scripts."""
    patched_runs: int = 1
    """Runs of the peer with our setting of malloc and bf16 throughout, besides those as it is released."""
    tune: bool = True
    """Try the peer's alternatives, one run each. False: the first of each."""
    our_flags: list[str] = field(default_factory=list)
    """More flags for our scripts, as name=value; recorded with the results."""
    scaling: bool = False
    """Also time our forward and backward as tokens and responses to a prompt grow."""
    scaling_rows: int = 4
    """Pairs of the smallest micro-batch of --scaling; the largest has 16 times as many."""
    scaling_repeats: int = 5
    """Timed passes of each case of --scaling."""
    rate_seconds: float = 2.0
    """Seconds in each run for the machine's matrix-product rate."""
    output: str = "speed.json"
    """File for all figures, settings and versions; written anew after every stage."""
    work_dir: str | None = None
    """Folder for the data and the runs; a temporary one unless set."""
    seed: int = 42
    """Seed of the order of rows and of the long prompts."""


def main(flags: SpeedFlags) -> dict[str, Any]:
    """Time the stages; prints the tables, and returns what is saved.

    Raises:
        UserError: an unknown stage, no data or no usable rows, or a run that failed.
    """
    check_positive(flags, "pairs_of_runs", "steps", "ppo_steps", "batch", "ppo_batch", "new_tokens", "scaling_rows")
    if flags.stages == ["none"] and flags.scaling:
        flags = replace(flags, stages=[])
    unknown = sorted(set(flags.stages) - set(speed_work.STAGES))
    if unknown:
        raise UserError(f"--stages: {unknown[0]!r} is not one of {', '.join(speed_work.STAGES)}")
    if (flags.data_dir is None) == (flags.data_file is None):
        raise UserError("give --data_dir (prepared data) or --data_file (pairs to prepare), one of the two")
    if "ppo" in flags.stages and not (TRL_WITH_PPO / "trl").is_dir():
        raise UserError("TRL 1.12.0, which has PPO, is not in .peers/; run `bash experiments/benchmarks/speed.sh`")
    if any("=" not in item for item in flags.our_flags):
        raise UserError("--our_flags takes name=value, for example micro_batch_tokens=4096")
    work = Path(flags.work_dir or tempfile.mkdtemp()).absolute()
    work.mkdir(parents=True, exist_ok=True)
    try:
        benchmark = Benchmark(flags, work)
        for stage in flags.stages:
            benchmark.time_stage(stage)
        if flags.scaling:
            benchmark.time_scaling()
        if len(flags.stages) > 1:
            print("\n" + stage_table(benchmark.results, flags.stages), flush=True)
        return benchmark.results
    finally:
        if flags.work_dir is None:
            shutil.rmtree(work)


class Benchmark:
    """One call of the command: what it runs on, and what it has found so far (`results`)."""

    def __init__(self, flags: SpeedFlags, work: Path) -> None:
        self.flags, self.work = flags, work
        local = Path(flags.model_name)
        self.model_name = str(local.absolute()) if local.is_dir() else flags.model_name
        self.model = speed_work.dimensions(self.model_name)
        self.precision = flags.precision
        if flags.precision == "auto":
            self.precision = "bf16-mixed" if fast_bf16("cpu") else "32-true"
        self.rows = self._load_rows()
        self.results: dict[str, Any] = {"flags": asdict(flags), "precision": self.precision, "stages": {}}

    def _load_rows(self) -> list[dict[str, Any]]:
        flags, folder = self.flags, self.flags.data_dir
        if flags.data_file is not None:
            folder = str(self.work / "source")
            _prepare(flags, self.model_name, folder)
        limits = flags.max_prompt, flags.max_response
        split = load_split(folder, "preference", "train")
        steps = max((flags.steps + flags.warmup) * flags.batch, (flags.ppo_steps + flags.ppo_warmup) * flags.ppo_batch)
        rows = speed_work.usable_rows(split, max(steps, 16 * flags.scaling_rows), *limits)
        if not rows:
            raise UserError(f"no row of {split.path} is within --max_prompt={limits[0]}, --max_response={limits[1]}")
        return rows

    def time_stage(self, stage: str) -> None:
        """Settle the peer's settings, run both sides in turn, print the stage's table and save."""
        plan = self._plan(stage)
        chosen, trials = self._tune(stage, plan)
        request = {**plan["request"], "settings": chosen}
        sides: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for pair in range(self.flags.pairs_of_runs):
            for side, runs in sides.items():
                runs.append(self._measured(side, plan, request))
                note = f"{stage} {side} {pair + 1}/{self.flags.pairs_of_runs}"
                print(f"{note}: {runs[-1]['seconds']:.3f} s a step", flush=True)
        patched = {**plan["request"], "settings": {**chosen, "patched": True}}
        sides["peer, patched"] = []
        for i in range(self.flags.patched_runs):
            sides["peer, patched"].append(self._measured("peer", plan, patched))
            seconds = sides["peer, patched"][-1]["seconds"]
            print(f"{stage} peer, patched {i + 1}/{self.flags.patched_runs}: {seconds:.3f} s a step", flush=True)
        self.results["machine"] = sides["ours"][0]["machine"]
        self.results["stages"][stage] = {
            "summary": summary_of(sides),
            "settings": {
                "ours": our_settings(plan["request"]),
                "peer": {**(peer_settings(request) if stage != "rollouts" else {}), **chosen},
            },
            "order": plan["order"],
            "peer_trials": trials,
            "work": {name: plan[name] for name in ("warmup", "steps", "batch", "tokens", "flops")},
            "runs": sides,
        }
        self._save()
        print("\n" + stage_table(self.results, [stage]) + "\n", flush=True)

    def _plan(self, stage: str) -> dict[str, Any]:
        """Write the rows of a stage's runs; what each run is asked for, and the work of each timed step."""
        flags, sampled = self.flags, stage in speed_work.SAMPLED
        batch = flags.ppo_batch if stage in ("ppo", "rollouts") else flags.batch
        steps, warmup = (flags.ppo_steps, flags.ppo_warmup) if sampled else (flags.steps, flags.warmup)
        step_rows = 1 if stage in speed_work.GROUPS else batch
        num = (steps + warmup) * step_rows
        rows = [self.rows[i % len(self.rows)] for i in range(num)]
        if stage in speed_work.LONG:
            rows = speed_work.long_rows(self.rows, num, flags.seed)
        if stage == "kto":
            rows = [_feedback_row(row, good=i % 2 == 0) for i, row in enumerate(rows)]
        grouped = flags.order == "grouped" and not sampled
        if grouped:
            first = warmup * step_rows
            parts = (rows[:first], rows[first:])
            rows = [
                row for part in parts if part for row in speed_work.grouped_by_length(part, stage, batch, flags.seed)
            ]
        data = self.work / stage / "data"
        if stage == "sft":
            write_split(data, "finetune", "train", [_finetune_row(row) for row in rows])
        else:
            write_split(data, "feedback" if stage == "kto" else "preference", "train", rows)
        request = {
            "stage": stage,
            "model": self.model_name,
            "reward_model": str(self.work / "reward_model"),
            "data_dir": str(data),
            "num_steps": steps + warmup,
            "batch": batch,
            "new_tokens": flags.new_tokens,
            "precision": self.precision,
            "flags": dict(item.split("=", 1) for item in flags.our_flags),
            "rate_seconds": flags.rate_seconds,
        }
        timed = [rows[i : i + step_rows] for i in range(warmup * step_rows, num, step_rows)]
        if stage == "ppo" and not Path(request["reward_model"]).exists():
            self.run("ours", {**request, "stage": "reward_model"})
        return {
            "request": request,
            "warmup": warmup,
            "steps": steps,
            "batch": batch,
            "order": "grouped by length" if grouped else "as in the file",
            "tokens": [speed_work.step_work(stage, step, flags.new_tokens, batch).tokens for step in timed],
            "flops": [speed_work.step_flops(stage, step, flags.new_tokens, self.model, batch) for step in timed],
        }

    def _tune(self, stage: str, plan: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The peer's settings: from the first of each, every alternative that makes it faster; and what was tried."""
        choices = {**ALTERNATIVES[stage], "patched": [False], "attention": ["sdpa", "eager"]}
        chosen = {name: values[0] for name, values in choices.items()}
        others = [(name, value) for name, values in choices.items() for value in values[1:]]
        if not self.flags.tune or not others:
            return chosen, []
        trials: list[dict[str, Any]] = []
        best = math.inf
        for change in ({}, *({name: value} for name, value in others)):
            settings = {**chosen, **change}
            try:
                seconds = self._measured("peer", plan, {**plan["request"], "settings": settings})["seconds"]
            except UserError as error:
                trials.append({"settings": settings, "failed": str(error)[-500:]})
                continue
            trials.append({"settings": settings, "seconds": seconds})
            print(f"{stage} peer at {settings}: {seconds:.3f} s a step", flush=True)
            if seconds < best:
                chosen, best = settings, seconds
        if best == math.inf:
            raise UserError(f"the peer ran {stage} at none of its settings; the last: {trials[-1]['failed']}")
        return chosen, trials

    def time_scaling(self) -> None:
        """Time forward and backward of our policy and reward model as the work grows, print the table and save."""
        data = self.work / "scaling"
        num = 16 * self.flags.scaling_rows
        write_split(data, "preference", "train", [self.rows[i % len(self.rows)] for i in range(num)])
        answer = self.run(
            "ours",
            {
                "stage": "scaling",
                "model": self.model_name,
                "data_dir": str(data),
                "base": self.flags.scaling_rows,
                "repeats": self.flags.scaling_repeats,
                "precision": self.precision,
                "rate_seconds": self.flags.rate_seconds,
            },
        )
        for case in answer["cases"]:
            case["flops"] = speed_work.Work(**case["work"]).flops(self.model, head=case["series"] != "scored")
        self.results["scaling"] = answer
        self.results["machine"] = answer["machine"]
        self._save()
        print("\n" + scaling_table(answer) + "\n", flush=True)

    def _measured(self, side: str, plan: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        """One run, and the figures of its timed steps."""
        answer = self.run(side, request)
        seconds = answer["step_seconds"][plan["warmup"] :]
        if len(seconds) != plan["steps"]:
            raise UserError(f"{request['stage']} ({side}): {len(seconds)} steps were timed, not {plan['steps']}")
        rates = {
            "tokens_per_second": statistics.median(n / s for n, s in zip(plan["tokens"], seconds, strict=True)),
            "flops_per_second": statistics.median(n / s for n, s in zip(plan["flops"], seconds, strict=True)),
        }
        middle = statistics.median(seconds)
        share = rates["flops_per_second"] / answer["matmul_flops_per_second"]
        return {**answer, "seconds": middle, "samples_per_second": plan["batch"] / middle, **rates, "share": share}

    def run(self, side: str, request: dict[str, Any]) -> dict[str, Any]:
        """One run in a process of its own; its answer.

        Raises:
            UserError: the process failed; with the end of what it said.
        """
        folder = Path(tempfile.mkdtemp(dir=self.work))
        request = {**request, "work": str(folder)}
        write_json(folder / "request.json", request)
        environment = dict(os.environ)
        if side == "peer" and request["stage"] == "ppo":
            environment["PYTHONPATH"] = str(TRL_WITH_PPO)
            environment["TRL_EXPERIMENTAL_SILENCE"] = "1"
        module = f"experiments.benchmarks.speed_{side}"
        answer = folder / "answer.json"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, str(folder / "request.json"), str(answer)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            if done.returncode:
                said = done.stderr.strip()[-3000:]
                raise UserError(f"{request['stage']} ({side}) ended with status {done.returncode}: {said}")
            return json.loads(answer.read_text(encoding="utf-8"))
        finally:
            shutil.rmtree(folder)

    def _save(self) -> None:
        write_json(Path(self.flags.output), self.results)


def _finetune_row(row: dict[str, Any]) -> dict[str, Any]:
    """A pair's chosen side as a row of supervised fine-tuning."""
    targets = row["chosen_input_ids"].clone()
    targets[: row["prompt_len"]] = IGNORE_INDEX
    return {"prompt_len": row["prompt_len"], "input_ids": row["chosen_input_ids"], "targets": targets}


def _feedback_row(row: dict[str, Any], *, good: bool) -> dict[str, Any]:
    """One side of a pair as a row of labelled responses."""
    side = "chosen" if good else "rejected"
    return {"prompt_len": row["prompt_len"], "input_ids": row[f"{side}_input_ids"], "label": good}


def _prepare(flags: SpeedFlags, model_name: str, folder: str) -> None:
    """Pairs of `--data_file` within the limits, in the order of the file."""
    from data_prep.helpful_harmless import prepare_data

    prepare_data.main(
        prepare_data.PrepareFlags(
            destination_dir=folder,
            tokenizer_name=model_name,
            dataset_path=flags.data_file,
            stage="preference",
            max_length=flags.max_prompt + flags.max_response,
            max_prompt_length=flags.max_prompt,
            max_response_length=flags.max_response,
            shuffle=False,
            validation_percentage=0.0,
            test_percentage=0.0,
            num_workers=1,
        )
    )


if __name__ == "__main__":
    launch(main, SpeedFlags)
