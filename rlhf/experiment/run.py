"""A run: its devices, its folder, its steps. What every training script does around its algorithm."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from rlhf.data.prompts import Prompts, load_prompts
from rlhf.data.splits import Split, check_tokenizer, data_info, has_split, load_split
from rlhf.errors import UserError
from rlhf.experiment.checkpoints import Checkpoints
from rlhf.experiment.devices import make_fabric
from rlhf.experiment.lifeline import Lifeline, hold
from rlhf.experiment.logs import Logs, environment
from rlhf.experiment.metrics import Metrics
from rlhf.experiment.steps import Step
from rlhf.files import atomic_dir, write_json
from rlhf.flags import check_positive
from rlhf.models.loading import Role, save_model
from rlhf.trees.batches import cut, largest_micro_batch, num_steps, rows_of_rank, rows_of_step


def start_experiment(flags: Any, script: str) -> Run:
    """Set up devices and seeds for `script`; nothing is written before `Run.steps` begins.

    Raises:
        UserError: flags that contradict each other, or an experiment folder that is taken.
    """
    check_positive(flags, "mini_batch_size", "micro_batch_size", "micro_batch_tokens", "max_steps", "epochs")
    check_positive(flags, "log_interval", "max_new_tokens", "temperature", "top_p", "lora_rank")
    folder = Path(flags.experiment_dir or f"experiments/runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}")
    if flags.resume and not flags.experiment_dir:
        raise UserError("--resume needs --experiment_dir, the folder of the run to go on with")
    if not flags.resume and (folder / "args.json").exists():
        raise UserError(f"--experiment_dir={folder} holds a run already; give another folder, or --resume=True")
    fabric, why = make_fabric(flags)
    if not os.environ.get("LT_CLI_USED"):  # `fabric run` has launched the processes already
        fabric.launch()
    lifeline = hold(fabric.global_rank, fabric.world_size, fabric.broadcast)
    folder = Path(fabric.broadcast(str(folder)))
    fabric.seed_everything(flags.seed, verbose=False)
    run = Run(fabric, flags, script, folder, lifeline)
    run.say(f"{script}: {why}")
    return run


class Run:
    """One experiment, on every device at once.

    Attributes:
        fabric, rank, world_size, device: of Lightning Fabric.
        folder: the experiment folder.
        step_index: optimiser steps finished.
    """

    def __init__(self, fabric: Fabric, flags: Any, script: str, folder: Path, lifeline: Lifeline | None = None) -> None:
        self._lifeline = lifeline
        self.fabric, self.flags, self.script, self.folder = fabric, flags, script, folder
        self.rank, self.world_size, self.device = fabric.global_rank, fabric.world_size, fabric.device
        self.precision = str(fabric.strategy.precision.precision)
        self.step_index = 0
        self.total_steps = 0
        self.skipped_steps = 0
        self.modules: list[nn.Module] = []
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=flags.keep_checkpoints, world_size=self.world_size)
        self.logs: Logs | None = None
        self.interrupted = False
        self._stop_requested = False
        self._evaluated_at = self._saved_at = -1
        self._values: dict[str, float] = {}
        self._step: Step | None = None
        self._data_info: dict = {}

    def say(self, text: str) -> None:
        """Print once, not once a device."""
        if self.rank == 0:
            tqdm.write(text)

    def load_splits(self, stage: str, tokenizer) -> tuple[Split, Split | None]:
        """The train and validation splits of a stage (None where there is no validation file).

        Raises:
            UserError: no training split, or one tokenised by another tokenizer than the model's.
        """
        with self.fabric.rank_zero_first(local=True):
            train = load_split(self.flags.data_dir, stage, "train")
            has_validation = has_split(self.flags.data_dir, stage, "validation")
            validation = load_split(self.flags.data_dir, stage, "validation") if has_validation else None
        for split in (train, validation):
            if split is not None:
                check_tokenizer(split, tokenizer)
                self._note(split)
        return train, validation

    def load_prompts(self, name: str, tokenizer) -> Prompts | None:
        """The prompts of a split, from whatever stage the data folder has."""
        with self.fabric.rank_zero_first(local=True):
            prompts = load_prompts(self.flags.data_dir, name, tokenizer)
        if prompts is not None:
            self._note(prompts.split)
        return prompts

    def _note(self, split: Split) -> None:
        """For data.json: how the data was made, and a hash of the rows of every split that the run reads."""
        read = {**self._data_info.get("read", {}), f"{split.stage}_{split.name}": split.fingerprint}
        self._data_info = {**data_info(self.flags.data_dir), "read": read}

    def setup(self, module: nn.Module) -> nn.Module:
        """Move a model to this run's device and under its strategy."""
        module.own_parameters()
        module = self.fabric.setup_module(module)
        self.modules.append(module)
        return module

    @property
    def global_batch(self) -> int:
        """Rows of one step over all devices: a mini-batch, or in RL a rollout, on each."""
        return getattr(self.flags, "rollout_size", self.flags.mini_batch_size) * self.world_size

    def plan(self, num_rows: int, *, what: str = "rows") -> int:
        """Compute the length of the run and print every derived size once; returns the steps."""
        flags = self.flags
        self.total_steps = num_steps(num_rows, self.global_batch, flags.epochs, flags.max_steps)
        micro = f"{flags.micro_batch_tokens} tokens" if flags.micro_batch_tokens else f"{flags.micro_batch_size}"
        each = self.global_batch // self.world_size
        self.say(
            f"{self.script}: {num_rows:,} {what}; {self.global_batch} {what} a step ({each} on each of "
            f"{self.world_size} devices, {micro} at once); {math.ceil(num_rows / self.global_batch):,} steps an "
            f"epoch, {self.total_steps:,} steps in all; {self.precision} on {self.device}"
        )
        return self.total_steps

    def open(self) -> None:
        """Create the experiment folder, or take up the one that is resumed."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            arguments = {**dataclasses.asdict(self.flags), "experiment_dir": str(self.folder)}
            write_json(self.folder / "args.json", arguments)
            write_json(self.folder / "environment.json", environment(self.fabric))
            write_json(self.folder / "data.json", self._data_info)
            self.logs = Logs(self.folder, self.flags.logger, self.script, resume_at=self.step_index)
        self.fabric.barrier()
        self.say(f"{self.script}: writing to {self.folder}")

    def restore(self, models: dict[str, Role], optimizers: dict[str, Optimizer]) -> dict[str, Any]:
        """With `--resume`, load the last whole checkpoint into models and optimisers; returns its extra state.

        Without, an empty dict. Call it before `open`.

        Raises:
            UserError: there is no whole checkpoint, a part of it is missing, or a flag would make it another run.
        """
        if not self.flags.resume:
            return {}
        self.step_index, extra = self.checkpoints.load_last(self.flags, models, optimizers)
        self.skipped_steps, self._evaluated_at = extra.pop("skipped_steps"), extra.pop("evaluated_at")
        self._saved_at = self.step_index
        self.say(f"{self.script}: resumed {self.folder} after step {self.step_index}")
        return extra

    def evaluate_if_due(self, assess: Callable[[], dict[str, float]]) -> None:
        """At every `--eval_interval`-th step, the first included: log what `assess` measures."""
        interval = self.flags.eval_interval
        if interval > 0 and self.step_index % interval == 0 and self._evaluated_at != self.step_index:
            began = time.perf_counter()
            self._evaluate(assess)
            self._step.began += time.perf_counter() - began

    def _evaluate(self, assess: Callable[[], dict[str, float]]) -> None:
        began = time.perf_counter()
        self._values = assess()
        self._evaluated_at = self.step_index
        if self._values:
            self.log({**self._values, "perf/evaluation_seconds": time.perf_counter() - began})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in self._values.items())
            self.say(f"  after step {self.step_index}: {shown}")

    def save_if_due(
        self, models: dict[str, Role], optimizers: dict[str, Optimizer], tokenizer, extra: dict | None = None
    ) -> None:
        """At every `--save_interval`-th step: write a checkpoint."""
        interval = self.flags.save_interval
        if interval > 0 and self.step_index > 0 and self.step_index % interval == 0:
            began = time.perf_counter()
            self._save(models, optimizers, tokenizer, extra)
            self._step.began += time.perf_counter() - began

    def _save(self, models, optimizers, tokenizer, extra) -> None:
        if self._saved_at == self.step_index:
            return
        if self.rank == 0:
            kept = {"skipped_steps": self.skipped_steps, "evaluated_at": self._evaluated_at}
            self.checkpoints.save(self.step_index, self.flags, models, optimizers, tokenizer, {**(extra or {}), **kept})
        self._saved_at = self.step_index
        self.fabric.barrier()

    def save_best(self, role: Role, tokenizer, metric: str, value: float, *, higher: bool) -> None:
        """Keep these weights as `checkpoints/best` if `value` beats the best so far."""
        if self.rank == 0 and self.flags.save_interval > 0:
            self.checkpoints.save_best(self.step_index, role, tokenizer, metric, value, higher=higher)
        self.fabric.barrier()

    def steps(self, num_rows: int) -> Iterator[Step]:
        """The optimiser steps that are still to do, each with this device's rows.

        A step's rows, dropout and sampling depend on the seed and the step alone, so a resumed run goes on as
        the unbroken one. SIGTERM and SIGINT end the loop after the step in hand (`interrupted` is then True).
        """
        if self.total_steps == 0:
            self.plan(num_rows)
        previous = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for s in previous:
            signal.signal(s, self._request_stop)
        bar = tqdm(
            total=self.total_steps, initial=self.step_index, desc=self.script, disable=self.rank != 0, mininterval=1.0
        )
        try:
            while self.step_index < self.total_steps:
                rows = rows_of_step(
                    self.step_index, num_rows, self.global_batch, seed=self.flags.seed, shuffle=self.flags.shuffle
                )
                self._seed_step()
                self._step = Step(self, rows)
                yield self._step
                self.step_index += 1
                bar.update(1)
                self._step.finish(bar)
                if self._asked_to_stop():
                    self.interrupted = self.step_index < self.total_steps
                    break
        finally:
            bar.close()
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _request_stop(self, *_: Any) -> None:
        self._stop_requested = True

    def _asked_to_stop(self) -> bool:
        if self.world_size == 1:
            return self._stop_requested
        flag = torch.tensor(float(self._stop_requested), device=self.device)
        return bool(self.fabric.all_reduce(flag, reduce_op="max") > 0)

    def _seed_step(self) -> None:
        """Dropout masks of this step: of the seed, the step and the device."""
        seed = (self.flags.seed * 1_000_003 + self.step_index) * 1_009 + self.rank
        torch.manual_seed(seed % 2**63)

    def rows_to_train(self, num_rows: int) -> list[int]:
        """The rows of all steps of the run, each once: where `plan` ends within the first epoch, not all rows."""
        flags = self.flags
        window = self.total_steps * self.global_batch
        return sorted(rows_of_step(0, num_rows, window, seed=flags.seed, shuffle=flags.shuffle))

    def largest_micro_batch(self, tokens: Tensor) -> list[int]:
        """The rows of the micro-batch, of all steps and devices, with the most distinct tokens ((num_rows,) `tokens`).

        In RL that of the prompts, were a rollout trained on in the order in which it was sampled.
        """
        flags = self.flags
        return largest_micro_batch(
            tokens,
            total_steps=self.total_steps,
            mini_batch=self.global_batch // self.world_size,
            world_size=self.world_size,
            micro_batch_size=min(flags.micro_batch_size, flags.mini_batch_size),
            micro_batch_tokens=flags.micro_batch_tokens,
            seed=flags.seed,
            shuffle=flags.shuffle,
        )

    def rows_to_evaluate(self, num_rows: int, limit: int) -> range:
        """The rows of the first `limit` validation mini-batches (0: all), over all devices, in file order."""
        return range(min(num_rows, limit * self.global_batch) if limit else num_rows)

    def batches(self, num_rows: int, limit: int) -> Iterator[list[int]]:
        """This device's share of `rows_to_evaluate`, a micro-batch at a time."""
        size = self.global_batch
        rows = self.rows_to_evaluate(num_rows, limit)
        for start in range(0, len(rows), size):
            window = rows[start : start + size]
            mine = rows_of_rank(window, self.rank, self.world_size)
            yield from cut(mine, micro_batch_size=self.flags.micro_batch_size)

    def metrics(self) -> Metrics:
        return Metrics(self.fabric)

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all devices, on every device."""
        if self.world_size == 1:
            return items
        parts: list[list[Any]] = [[]] * self.world_size
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def gather_rows(self, table: Tensor) -> Tensor:
        """Put the rows that every device measured under each other: (n_r, C) on device r to (sum n_r, C)."""
        if self.world_size == 1:
            return table.cpu()
        return torch.cat(self.gather([table.cpu()]))

    def progress(self, items: Sequence[Any], what: str) -> Iterator[Any]:
        """Iterate with a progress bar on the first device."""
        yield from tqdm(items, desc=what, disable=self.rank != 0, mininterval=1.0)

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """Lines of samples.jsonl."""
        if self.logs is not None:
            self.logs.write_samples(self.step_index, samples)

    def log(self, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the logger."""
        if self.logs is not None:
            self.logs.write(self.step_index, values)

    def finish(
        self,
        models: dict[str, Role],
        optimizers: dict[str, Optimizer],
        tokenizer,
        assess: Callable[[], dict[str, float]],
        extra: dict | None = None,
    ) -> dict[str, Any]:
        """End the run: the last evaluation and `final/`, or, where it was asked to stop, a checkpoint to resume.

        Returns:
            The last evaluation, the steps done, and the experiment folder; also written as summary.json.
        """
        if self.interrupted:
            self._save(models, optimizers, tokenizer, extra)
            self.say(f"{self.script}: stopped after step {self.step_index}; go on with --resume=True")
        else:
            if self._evaluated_at != self.step_index:
                self._evaluate(assess)
            if self.rank == 0:
                with atomic_dir(self.folder / "final") as temporary:
                    save_model(models["model"], tokenizer, temporary)
        summary = {**self._values, "steps": self.step_index, "experiment_dir": str(self.folder)}
        if self.rank == 0:
            if not self.interrupted:
                write_json(self.folder / "summary.json", summary)
            self.logs.close()
        self.fabric.barrier()
        if self._lifeline is not None:
            self._lifeline.close()
        return summary
