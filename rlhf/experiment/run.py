"""A run: its devices, its folder, its steps. What every training script does around its algorithm."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from rlhf.data.prompts import Prompts
from rlhf.data.splits import Split
from rlhf.errors import NonFiniteError, UserError
from rlhf.experiment.checkpoints import Checkpoints, Stateful, load_state, part_of, save_final
from rlhf.experiment.folder import leave_folder, take_folder
from rlhf.experiment.identity import Identity, has_ended, model_fingerprints, record_in, summary_in
from rlhf.experiment.inputs import Inputs
from rlhf.experiment.lifeline import Lifeline
from rlhf.experiment.logs import Logs, environment, finite_or_null
from rlhf.experiment.metrics import Metrics
from rlhf.experiment.signals import Signals
from rlhf.experiment.steps import Step
from rlhf.files import WriteError, claimed, sweep, write_json
from rlhf.models.forward import unwrapped
from rlhf.models.loading import Role
from rlhf.models.policy import Policy
from rlhf.rewards.mix import Rewards
from rlhf.seeds import seed_of_step
from rlhf.trees.batches import cut, largest_micro_batch, num_steps, rows_of_rank, rows_of_step


class Run:
    """One experiment, on every device at once.

    Attributes:
        fabric, rank, world_size, device: of Lightning Fabric.
        folder: the experiment folder.
        step_index: optimiser steps finished.
        interrupted: it was asked to stop, and did before its last step.
        ended: it was resumed after its end: there is nothing left to do.
        saved_at: the step of the last checkpoint that was written or resumed from; -1 before there is one.
        save_asked: SIGUSR1 came in the step before.
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
        self.checkpoints = Checkpoints(
            folder / "checkpoints", keep=flags.keep_checkpoints, keep_weights=flags.keep_weights
        )
        self.logs: Logs | None = None
        self.interrupted = self.ended = False
        self._signals, self.save_asked = Signals(), False
        self._identity = Identity(script, flags, self.world_size)
        self._log_sizes: dict[str, int] = {}
        self._evaluated_at = self.saved_at = -1
        self._values: dict[str, float] = {}
        self._step: Step | None = None
        self._inputs = Inputs(fabric, flags)

    def say(self, text: str) -> None:
        """Print once, not once a device."""
        if self.rank == 0:
            tqdm.write(text)

    def load_splits(self, stage: str, tokenizer) -> tuple[Split, Split | None]:
        """The train and validation splits of a stage (`Inputs.load_splits`)."""
        return self._inputs.load_splits(stage, tokenizer)

    def load_prompts(self, name: str, tokenizer) -> Prompts | None:
        """The prompts of a split, from whatever stage the data folder has (`Inputs.load_prompts`)."""
        return self._inputs.load_prompts(name, tokenizer)

    def setup(self, module: nn.Module) -> nn.Module:
        """Move a model to this run's device and under its strategy.

        Raises:
            UserError: a row of the splits that were loaded, or a token of their tokenizer, does not fit the model.
        """
        self._inputs.check_fit(unwrapped(module.model))
        module.own_parameters()
        module = self.fabric.setup_module(module)
        self.modules.append(module)
        return module

    def check_reference(self, source: str, policy: Policy) -> None:
        """See that a model from elsewhere can be the policy's reference (`Inputs.check_reference`)."""
        self._inputs.check_reference(source, unwrapped(policy.model))

    def check_rewards(self, rewards: Rewards) -> None:
        """See that reward models can read the prompts with responses to them (`Inputs.check_rewards`)."""
        for warning in self._inputs.check_rewards(rewards):
            self.say(f"warning: {warning}")

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

    def restore(
        self,
        models: dict[str, Role],
        optimizers: dict[str, Optimizer],
        states: Mapping[str, Stateful] | None = None,
    ) -> None:
        """With `--resume`, load the last whole checkpoint into models, optimisers and states. Call it before `open`.

        A run that was killed before its first checkpoint begins at its first step; one that has ended stays as it is.

        Raises:
            UserError: there is no whole checkpoint, a part of it is missing, or a flag, the data or a model that the
                run reads has changed.
        """
        read, models_read = self._inputs.fingerprints, model_fingerprints(self.flags)
        self._identity = dataclasses.replace(self._identity, data=read, models=models_read)
        if not self.flags.resume:
            return
        if self.rank == 0:
            for folder in (self.folder, self.checkpoints.folder):
                for name in sweep(folder):
                    self.say(f"note: cleared {folder / name}, which a killed run left")
        self.fabric.barrier()
        begun = record_in(self.folder)
        if begun is not None and has_ended(self.folder, self.total_steps):
            self._identity.check(begun, self.folder)
            self.ended, self.step_index = True, self.total_steps
            self.say(f"{self.script}: {self.folder} ended after step {self.step_index}; there is nothing left to do")
        elif self.checkpoints.any_trace():
            self.step_index, extra = self.checkpoints.load_last(self._identity, models, optimizers)
            where = self.checkpoints.of(self.step_index)
            for name, state in (states or {}).items():
                load_state(state, extra, name, where)
            self.skipped_steps, self._evaluated_at, self._log_sizes = (
                part_of(extra, name, where) for name in ("skipped_steps", "evaluated_at", "log_sizes")
            )
            self.saved_at = self.step_index
            self._on_first(lambda: self.checkpoints.settle(self.step_index))
            self.say(f"{self.script}: resumed {self.folder} after step {self.step_index}")
        elif begun is None:
            self.say(f"note: {self.folder} holds no whole record of a run yet; it begins at the first step")
        else:
            self._identity.check(begun, self.folder)
            self.say(f"note: {self.folder} holds no checkpoint yet; the run begins again at the first step")

    def open(self) -> None:
        """Create the experiment folder, or take up the one that is resumed.

        Raises:
            UserError: another run has it, or had it in the meantime.
            WriteError: the disk has no room for it.
        """
        if self.ended:
            return
        if not self.flags.experiment_dir:
            self.folder = Path(self.fabric.broadcast(str(claimed(self.folder)) if self.rank == 0 else ""))
            self.checkpoints.folder = self.folder / "checkpoints"
        self._on_first(self._open, must=True)
        self.say(f"{self.script}: writing to {self.folder}")

    def take_folder(self) -> None:
        """Keep other runs out of the experiment folder; a new one is taken by `open`.

        Raises:
            UserError: another run has it.
        """
        self._on_first(lambda: take_folder(self.folder, new=not self.flags.resume), must=True)

    def _open(self) -> None:
        take_folder(self.folder, new=not self.flags.resume)
        arguments = {**dataclasses.asdict(self.flags), "experiment_dir": str(self.folder)}
        write_json(self.folder / "args.json", arguments)
        write_json(self.folder / "environment.json", environment(self.fabric))
        write_json(self.folder / "data.json", {**self._inputs.info, "models": self._identity.models})
        self.logs = Logs(self.folder, self.flags.logger, self.script, sizes=self._log_sizes)

    def _on_first(self, write: Callable[[], None], *, must: bool = False) -> WriteError | None:
        """Call `write` on the first device; returns, on every device, why it could not write.

        Raises:
            UserError: with `must`, on every device, whatever `write` complained of.
        """
        fault = None
        if self.rank == 0:
            try:
                write()
            except UserError as error:
                if not (must or isinstance(error, WriteError)):
                    raise
                fault = error
        fault = self.fabric.broadcast(fault)
        if must and fault is not None:
            raise fault
        return fault

    def evaluate_if_due(self, assess: Callable[[], dict[str, float]]) -> None:
        """At every `--eval_interval`-th step, the first included: log what `assess` measures."""
        interval = self.flags.eval_interval
        if interval > 0 and self.step_index % interval == 0 and self._evaluated_at != self.step_index:
            began = time.perf_counter()
            self._evaluate(assess)
            self._step.began += time.perf_counter() - began
        self._seed_step()  # what follows depends neither on the evaluation nor on whether a resumed run repeats it

    def _evaluate(self, assess: Callable[[], dict[str, float]]) -> None:
        began = time.perf_counter()
        self._seed_step()
        try:
            self._values = assess()
        except NonFiniteError as error:
            self.say(f"warning: no evaluation after step {self.step_index}: {error}")
            self._values = {}
        if wrong := [name for name, value in self._values.items() if not math.isfinite(value)]:
            self.say(f"warning: {', '.join(wrong)} of the evaluation after step {self.step_index} are not finite")
        self._evaluated_at = self.step_index
        if self._values:
            self.log({**self._values, "perf/evaluation_seconds": time.perf_counter() - began})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in self._values.items())
            self.say(f"  after step {self.step_index}: {shown}")

    def save_if_due(
        self,
        models: dict[str, Role],
        optimizers: dict[str, Optimizer],
        tokenizer,
        states: Mapping[str, Stateful] | None = None,
    ) -> None:
        """At every `--save_interval`-th step, and after SIGUSR1: write a checkpoint.

        Where the disk has no room for it the run goes on, and says so; the next one is tried when it is due.
        """
        interval = self.flags.save_interval
        if self.save_asked or (interval > 0 and self.step_index > 0 and self.step_index % interval == 0):
            began = time.perf_counter()
            self._save(models, optimizers, tokenizer, states)
            self._step.began += time.perf_counter() - began

    def _save(self, models, optimizers, tokenizer, states, *, must: bool = False) -> None:
        """Write a checkpoint; where it cannot be written, raise WriteError if it `must`, else say so."""
        if self.saved_at == self.step_index:
            return

        def write() -> None:
            extra = {name: state.state_dict() for name, state in (states or {}).items()}
            extra |= {"skipped_steps": self.skipped_steps, "evaluated_at": self._evaluated_at}
            extra["log_sizes"] = self.logs.sizes()
            self.checkpoints.save(self.step_index, self._identity, models, optimizers, tokenizer, extra)

        fault = self._on_first(write)
        if fault is None:
            self.saved_at = self.step_index
        elif must:
            raise WriteError(self._go_on(fault))
        else:
            self.say(f"warning: no checkpoint after step {self.step_index}: {fault}; training goes on meanwhile")

    def _go_on(self, fault: WriteError) -> str:
        after = f"from the checkpoint after step {self.saved_at}" if self.saved_at >= 0 else "from the first step"
        return f"{fault}, then go on {after} with --resume=True"

    def save_best(self, role: Role, tokenizer, metric: str, value: float, *, higher: bool) -> None:
        """Keep these weights as `checkpoints/best` if `value` is finite and the best so far, and the disk has room."""
        if self.flags.save_interval <= 0 or not math.isfinite(value):
            return
        fault = self._on_first(
            lambda: self.checkpoints.save_best(self.step_index, role, tokenizer, metric, value, higher=higher)
        )
        if fault is not None:
            self.say(f"warning: the best weights so far are not kept: {fault}; training goes on meanwhile")

    def steps(self, num_rows: int) -> Iterator[Step]:
        """The optimiser steps that are still to do, each with this device's rows.

        A step's rows, dropout and sampling depend on the seed and the step alone, so a resumed run goes on as
        the unbroken one. SIGTERM and SIGINT end the loop after the step in hand (`interrupted` is then True); SIGUSR1
        has the next `save_if_due` save.
        """
        if self.total_steps == 0:
            self.plan(num_rows)
        bar = tqdm(
            total=self.total_steps, initial=self.step_index, desc=self.script, disable=self.rank != 0, mininterval=1.0
        )
        with bar, self._signals.listening():
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
                stop, self.save_asked = self._asked()
                if stop:
                    self.interrupted = self.step_index < self.total_steps
                    break

    def _asked(self) -> tuple[bool, bool]:
        """Whether any device was asked by a signal to stop, and to save."""
        signals = self._signals
        asked = torch.tensor([signals.stop, signals.save], dtype=torch.float32, device=self.device)
        if self.world_size > 1:
            asked = self.fabric.all_reduce(asked, reduce_op="max")
        signals.save = False
        stop, save = asked.tolist()
        return stop > 0, save > 0

    def _seed_step(self) -> None:
        """Whatever draws in this step (dropout, a reward's own code): of the seed, the step and the device."""
        seed = seed_of_step(self.flags.seed, self.step_index, f"device {self.rank}")
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

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
        states: Mapping[str, Stateful] | None = None,
    ) -> dict[str, Any]:
        """End the run: a last checkpoint, evaluation and `final/`; where it was asked to stop, the checkpoint alone.

        Returns:
            The last evaluation, the steps done, and the experiment folder; also written as summary.json.

        Raises:
            WriteError: the disk has no room for `final/`, or for the checkpoint of a run that was asked to stop.
        """
        if self.ended:
            self._let_go()
            return summary_in(self.folder)
        with self._signals.listening():
            if self.interrupted or self.flags.save_interval > 0 or self.save_asked:
                self._save(models, optimizers, tokenizer, states, must=self.interrupted)
            if self.interrupted:
                self.say(f"{self.script}: stopped after step {self.step_index}; go on with --resume=True")
            elif self._evaluated_at != self.step_index:
                self._evaluate(assess)
            summary = {**self._values, "steps": self.step_index, "experiment_dir": str(self.folder)}

            def write() -> None:
                self.logs.close()
                if not self.interrupted:
                    save_final(models["model"], tokenizer, self.folder / "final")
                    write_json(self.folder / "summary.json", finite_or_null(summary))

            fault = self._on_first(write)
            if fault is not None:
                raise WriteError(self._go_on(fault))
        self._let_go()
        return summary

    def _let_go(self) -> None:
        """Wait for the other processes; from here on each may end on its own, and another run may go on here."""
        self.fabric.barrier()
        if self.rank == 0:
            leave_folder(self.folder)
        if self._lifeline is not None:
            self._lifeline.close()
