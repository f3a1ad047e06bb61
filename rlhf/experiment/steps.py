"""One optimiser step: its micro-batches, its gradient over all devices, its update and its measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from rlhf.errors import UserError
from rlhf.schedules import lr_multiplier
from rlhf.trees.batches import cut, rows_of_rank

if TYPE_CHECKING:
    from rlhf.experiment.run import Run


class Step:
    """One optimiser step over all devices."""

    def __init__(self, run: Run, rows: Sequence[int]) -> None:
        self.run, self.global_rows = run, list(rows)
        self.weight = 1.0
        self.metrics = run.metrics()
        self.num_tokens = 0
        self.began = time.perf_counter()
        self._losses: dict[str, Tensor] = {}

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
        cuts = self.cuts(tokens=tokens, rows=rows)
        for last, batch in _ahead(pack, cuts, self.run.flags.num_workers):
            yield from self._synchronised(batch, modules, last)

    def cuts(self, *, tokens: Tensor | None = None, rows: Sequence[int] | None = None) -> list[list[int]]:
        """The rows of each of this device's `micro_batches`; sets `weight`."""
        flags, rows = self.run.flags, self.global_rows if rows is None else rows
        mine = rows_of_rank(rows, self.run.rank, self.run.world_size)
        self.weight = 1.0 if mine else 0.0
        return cut(
            mine or rows[:1],
            micro_batch_size=flags.micro_batch_size,
            micro_batch_tokens=flags.micro_batch_tokens,
            tokens=tokens,
        )

    def _synchronised(self, batch: Any, modules: Sequence[nn.Module], last: bool) -> Iterator[Any]:
        if not modules:
            yield batch
            return
        with self.run.fabric.no_backward_sync(modules[0], enabled=not last and self.run.world_size > 1):
            yield from self._synchronised(batch, modules[1:], last)

    def backward(self, loss: Tensor, *, name: str = "") -> None:
        """Add the gradient of this device's part of the step's loss (already over the step's denominator).

        The strategy averages gradients over devices; the whole step's loss is their sum, hence the factor.

        Args:
            name: of the optimiser whose `update` this loss is for, where a step has several.
        """
        self._losses[name] = self._losses.get(name, 0.0) + loss.detach().float()
        self.run.fabric.backward(loss * (self.run.world_size * self.weight))

    def update(self, optimizer: Optimizer, *, clip: float, name: str = "") -> bool:
        """Set the rate, clip, step and clear; returns False where what is not finite skipped the update.

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
        loss = self._losses.pop(name, torch.zeros(())).to(norm.device)
        if run.world_size > 1:  # the norm is the same on every device already
            loss = run.fabric.all_reduce(loss, reduce_op="sum")
        found = dict(zip(("gradient norm", "loss"), torch.stack([norm.float(), loss]).tolist(), strict=True))
        wrong = [
            f"the {what}{f' of the {name}' if name else ''} is {x}" for what, x in found.items() if not math.isfinite(x)
        ]
        if wrong:
            self._nonfinite(wrong[0])
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        prefix = f"train/{name}_" if name else "train/"
        self.metrics.add(f"{prefix}grad_norm", found["gradient norm"], 1)
        self.metrics.put(f"{prefix}learning_rate", optimizer.param_groups[0]["lr"])
        return not wrong

    def drop(self, optimizer: Optimizer, *, name: str = "") -> None:
        """Forget the losses and gradients that an `update` would have used."""
        self._losses.pop(name, None)
        optimizer.zero_grad(set_to_none=True)

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
