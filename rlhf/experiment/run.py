"""A run: its devices, its folder, its steps. What every training script does around its algorithm."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from rlhf.allocator import keep_freed_memory
from rlhf.data.prompts import Prompts, load_prompts
from rlhf.data.splits import Split, check_tokenizer, data_info, has_split, load_split
from rlhf.errors import UserError
from rlhf.experiment.checkpoints import Checkpoints
from rlhf.experiment.logs import Logs, environment
from rlhf.experiment.metrics import Metrics
from rlhf.files import atomic_dir, write_json
from rlhf.flags import check_positive
from rlhf.models.loading import Role, save_model
from rlhf.schedules import lr_multiplier
from rlhf.trees.batches import cut, num_steps, rows_of_rank, rows_of_step


def start_experiment(flags: Any, script: str) -> Run:
    """Set up devices and seeds for `script`; nothing is written before `Run.steps` begins.

    Raises:
        UserError: flags that contradict each other, or an experiment folder that is taken.
    """
    check_positive(flags, "mini_batch_size", "micro_batch_size", "micro_batch_tokens", "max_steps", "epochs")
    check_positive(flags, "log_interval", "max_new_tokens", "lora_rank")
    folder = Path(flags.experiment_dir or f"experiments/runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}")
    if flags.resume and not flags.experiment_dir:
        raise UserError("--resume needs --experiment_dir, the folder of the run to go on with")
    if not flags.resume and (folder / "args.json").exists():
        raise UserError(f"--experiment_dir={folder} holds a run already; give another folder, or --resume=True")
    fabric = make_fabric(flags)
    fabric.launch()
    folder = Path(fabric.broadcast(str(folder)))
    fabric.seed_everything(flags.seed, verbose=False)
    return Run(fabric, flags, script, folder)


def fast_bf16(accelerator: str) -> bool:
    """Whether the hardware multiplies bf16 faster than float32: CUDA 8.0 and later, CPUs with AVX512-BF16 or AMX."""
    if accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    if accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available()):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def make_fabric(flags: Any) -> Fabric:
    """Lightning Fabric from the device flags, or from what `fabric run` asked for.

    Raises:
        UserError: a device, strategy or precision that is not supported or not there.
    """
    accelerator = os.environ.get("LT_ACCELERATOR", flags.accelerator)
    precision = os.environ.get("LT_PRECISION", flags.precision)
    if precision == "auto":
        precision = "bf16-mixed" if fast_bf16(accelerator) else "32-true"
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"--precision={precision} is not supported; use 32-true or bf16-mixed")
    devices = os.environ.get("LT_DEVICES", flags.devices)
    if devices == "auto" and accelerator in ("cpu", "auto") and not torch.cuda.is_available():
        devices = "1"
    num_nodes = int(os.environ.get("LT_NUM_NODES", flags.num_nodes))
    strategy = os.environ.pop("LT_STRATEGY", flags.strategy)
    if strategy not in ("auto", "ddp"):
        raise UserError(f"--strategy={strategy} is not supported; use auto or ddp")
    several = devices not in ("1", "auto") or num_nodes > 1 or (devices == "auto" and torch.cuda.device_count() > 1)
    if several or strategy == "ddp":
        strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    for name in ("LT_ACCELERATOR", "LT_PRECISION", "LT_DEVICES", "LT_NUM_NODES"):
        os.environ.pop(name, None)
    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()
    try:
        return Fabric(
            accelerator=accelerator,
            devices=int(devices) if str(devices).isdigit() else devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"--accelerator={accelerator} --devices={devices}: {str(error).splitlines()[0]}") from None


class Run:
    """One experiment, on every device at once.

    Attributes:
        fabric, rank, world_size, device: of Lightning Fabric.
        folder: the experiment folder.
        step_index: optimiser steps finished.
    """

    def __init__(self, fabric: Fabric, flags: Any, script: str, folder: Path) -> None:
        self.fabric, self.flags, self.script, self.folder = fabric, flags, script, folder
        self.rank, self.world_size, self.device = fabric.global_rank, fabric.world_size, fabric.device
        self.precision = str(fabric.strategy.precision.precision)
        self.step_index = 0
        self.total_steps = 0
        self.skipped_steps = 0
        self.modules: list[nn.Module] = []
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=flags.keep_checkpoints)
        self.logs: Logs | None = None
        self.interrupted = False
        self._stop_requested = False
        self._evaluated_at = self._saved_at = -1
        self._values: dict[str, float] = {}
        self._step: Step | None = None
        self._data_info: dict | None = None

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
        self._data_info = data_info(self.flags.data_dir)
        return train, validation

    def load_prompts(self, name: str, tokenizer) -> Prompts | None:
        """The prompts of a split, from whatever stage the data folder has."""
        with self.fabric.rank_zero_first(local=True):
            prompts = load_prompts(self.flags.data_dir, name, tokenizer)
        self._data_info = data_info(self.flags.data_dir)
        return prompts

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
            write_json(self.folder / "args.json", dataclasses.asdict(self.flags))
            write_json(self.folder / "environment.json", environment(self.fabric))
            if self._data_info is not None:
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
            self._evaluate(assess)
            self._step.began = time.perf_counter()

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
            self._save(models, optimizers, tokenizer, extra)
            self._step.began = time.perf_counter()

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

    def batches(self, num_rows: int, limit: int) -> Iterator[list[int]]:
        """This device's rows of the first `limit` validation mini-batches (0: all), in file order."""
        size = self.global_batch
        total = math.ceil(num_rows / size)
        for i in range(min(total, limit) if limit else total):
            window = range(i * size, min((i + 1) * size, num_rows))
            rows = rows_of_rank(window, self.rank, self.world_size)
            yield from cut(rows, micro_batch_size=self.flags.micro_batch_size)

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
        return summary


class Step:
    """One optimiser step over all devices."""

    def __init__(self, run: Run, rows: Sequence[int]) -> None:
        self.run, self.global_rows = run, list(rows)
        self.weight = 1.0
        self.metrics = run.metrics()
        self.num_tokens = 0
        self.began = time.perf_counter()

    def micro_batches(
        self,
        pack: Callable[[list[int]], Any],
        *modules: nn.Module,
        tokens: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> Iterator[Any]:
        """`pack(rows)` of each micro-batch; gradients are synchronised in the last one only.

        Args:
            pack: builds a micro-batch; it runs in a thread with `--num_workers`.
            modules: what the micro-batches train.
            tokens: distinct tokens of every row, for `--micro_batch_tokens`.
            rows: the rows, over all devices, of this optimiser step; those of the run's step unless given.

        A device without rows gets one micro-batch of the step's first row, whose loss `weight` makes 0, so that
        all devices take part in the reduction.
        """
        flags, rows = self.run.flags, self.global_rows if rows is None else rows
        mine = rows_of_rank(rows, self.run.rank, self.run.world_size)
        self.weight = 1.0 if mine else 0.0
        cuts = cut(
            mine or rows[:1],
            micro_batch_size=flags.micro_batch_size,
            micro_batch_tokens=flags.micro_batch_tokens,
            tokens=tokens,
        )
        for last, batch in _ahead(pack, cuts, flags.num_workers):
            yield from self._synchronised(batch, modules, last)

    def _synchronised(self, batch: Any, modules: Sequence[nn.Module], last: bool) -> Iterator[Any]:
        if not modules:
            yield batch
            return
        with self.run.fabric.no_backward_sync(modules[0], enabled=not last and self.run.world_size > 1):
            yield from self._synchronised(batch, modules[1:], last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this device's part of the step's loss (already over the step's denominator).

        The strategy averages gradients over devices; the whole step's loss is their sum, hence the factor.
        """
        self.run.fabric.backward(loss * (self.run.world_size * self.weight))

    def update(self, optimizer: Optimizer, *, clip: float, name: str = "") -> bool:
        """Set the rate, clip, step and clear; returns False where a non-finite gradient skipped the update.

        Raises:
            UserError: a non-finite loss or gradient norm, once `--skip_nonfinite_steps` are used up.
        """
        run, flags = self.run, self.run.flags
        rate = lr_multiplier(
            run.step_index,
            total_steps=run.total_steps,
            warmup_steps=flags.lr_warmup_steps,
            schedule=flags.lr_schedule,
        )
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf)
        finite = bool(torch.isfinite(norm))
        if finite:
            optimizer.step()
        else:
            self._nonfinite(f"the gradient norm{f' of the {name}' if name else ''} is {norm.item()}")
        optimizer.zero_grad(set_to_none=True)
        prefix = f"train/{name}_" if name else "train/"
        self.metrics.add(f"{prefix}grad_norm", norm.item(), 1)
        self.metrics.put(f"{prefix}learning_rate", optimizer.param_groups[0]["lr"])
        return finite

    def _nonfinite(self, what: str) -> None:
        run = self.run
        run.skipped_steps += 1
        if run.skipped_steps > run.flags.skip_nonfinite_steps:
            raise UserError(
                f"step {run.step_index}: {what} (training rows {sorted(self.global_rows)}); lower the learning rate, "
                f"look at these rows, or allow such steps with --skip_nonfinite_steps"
            )
        run.say(f"step {run.step_index}: {what}; update skipped ({run.skipped_steps} so far)")

    def finish(self, bar: tqdm) -> None:
        """Reduce and log what the step measured."""
        if self.run.step_index % self.run.flags.log_interval and self.run.step_index != self.run.total_steps:
            return
        self.metrics.add("perf/tokens", self.num_tokens, 1)
        values = self.metrics.reduce()
        seconds = time.perf_counter() - self.began
        values["perf/tokens_per_second"] = values.pop("perf/tokens") * self.run.world_size / seconds
        values["perf/step_seconds"] = seconds
        if self.run.skipped_steps:
            values["train/skipped_steps"] = float(self.run.skipped_steps)
        self.run.log(values)
        if "train/loss" in values:
            bar.set_postfix(loss=f"{values['train/loss']:.4f}", refresh=False)


def _ahead(pack, cuts: list[list[int]], num_workers: int) -> Iterator[tuple[bool, Any]]:
    """(is last, packed micro-batch) of each cut, packed by `num_workers` threads ahead of their use."""
    if num_workers == 0:
        for i, rows in enumerate(cuts):
            yield i == len(cuts) - 1, pack(rows)
        return
    with ThreadPoolExecutor(num_workers) as pool:
        for i, batch in enumerate(pool.map(pack, cuts)):
            yield i == len(cuts) - 1, batch
