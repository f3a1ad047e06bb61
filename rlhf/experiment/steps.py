"""One optimiser step: its micro-batches, its gradient over all devices, its update and its measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from rlhf.errors import NonFiniteError, UserError
from rlhf.experiment.finite import Sighting, first_nonfinite, guilty, names_of
from rlhf.models.accumulation import gradients_added, weights_unchanged
from rlhf.schedules import lr_multiplier
from rlhf.trees.batches import cut, rows_of_rank

if TYPE_CHECKING:
    from rlhf.experiment.run import Run
    from rlhf.trees.forest import Forest


CLIP_EPS = 1e-6
"""What torch adds to the norm when it clips: gradients up to the bound less this stay as they are."""


class Step:
    """One optimiser step over all devices."""

    def __init__(self, run: Run, rows: Sequence[int]) -> None:
        self.run, self.global_rows = run, list(rows)
        self.weight = 1.0
        self.metrics = run.metrics()
        self.num_tokens = 0
        self.began = time.perf_counter()
        # Other strategies reduce gradients as autograd adds them up.
        self._alone = isinstance(run.fabric.strategy, SingleDeviceStrategy)
        self._losses: dict[str, Tensor] = {}
        self._checks: dict[str, Tensor] = {}
        self._sightings: dict[str, list[Sighting]] = {}
        self._rows: list[int] = []

    def micro_batches(
        self,
        pack: Callable[[list[int]], Any],
        *modules: nn.Module,
        tokens: Tensor | None = None,
        rows: Sequence[int] | None = None,
        row_of: Sequence[int] | None = None,
    ) -> Iterator[Any]:
        """`pack(rows)` of each micro-batch; gradients are synchronised in the last one only.

        Args:
            pack: builds a micro-batch; it runs in a thread with `--num_workers`.
            modules: what the micro-batches train.
            tokens: distinct tokens of every row, for `--micro_batch_tokens`.
            rows: the rows, over all devices, of this optimiser step; those of the run's step unless given.
            row_of: the split's row of each of `rows`, where those are places in a rollout.

        A device without rows gets one micro-batch of the step's first row, whose loss `weight` makes 0, so that
        all devices take part in the reduction.
        """
        cuts = self.cuts(tokens=tokens, rows=rows)
        ahead = _ahead(pack, cuts, self.run.flags.num_workers)
        with weights_unchanged(enabled=len(cuts) > 1):
            for chosen, (last, batch) in zip(cuts, ahead, strict=True):
                self._rows = [row_of[i] for i in chosen] if row_of is not None else chosen
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

    def watch(
        self, what: str, values: Tensor, forest: Forest | None = None, at: Tensor | None = None, *, name: str = ""
    ) -> None:
        """Keep a quantity of the micro-batch in hand, to name it and its rows if the update is not finite.

        That all of it is finite is part of the update's one check; which part is not, is looked at only then. Call it
        before `backward`, which shows the gradient of `values` too.

        Args:
            what: its name, in the plural.
            values: one number a target of `forest`, or a packed position of `at` in it; without a forest, numbers of
                the micro-batch's rows in order, equally many each, along the first axis.
            name: of the optimiser whose `update` it is for, as in `backward`.
        """
        if self.weight:
            nothing = (values.detach() * 0).sum().float()  # NaN where anything is not finite
            self._checks[name] = self._checks.get(name, 0.0) + nothing
            self._sightings.setdefault(name, []).append(Sighting(what, values, self._rows, forest, at))

    def backward(self, loss: Tensor, *, name: str = "") -> None:
        """Add the gradient of this device's part of the step's loss (already over the step's denominator).

        The strategy averages gradients over devices; the whole step's loss is their sum, hence the factor.

        Args:
            name: of the optimiser whose `update` this loss is for, where a step has several.
        """
        self._losses[name] = self._losses.get(name, 0.0) + loss.detach().float()
        self.watch("loss", loss.detach(), name=name)
        with gradients_added(enabled=self._alone):
            self.run.fabric.backward(loss * (self.run.world_size * self.weight))

    def update(self, optimizer: Optimizer, *, clip: float, name: str = "") -> bool:
        """Set the rate, clip, step and clear; returns False where what is not finite skipped the update.

        Norm and loss reach the host together, once; nothing else is looked at unless one of them is not finite.

        Raises:
            UserError: a non-finite loss or gradient norm, once `--skip_nonfinite_steps` are used up; the sentence
                names the quantity or the parameter, and the rows.
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
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        zero, sightings = torch.zeros((), device=run.device), self._sightings.pop(name, [])
        seen = torch.stack([self._losses.pop(name, zero), self._checks.pop(name, zero)])
        if run.world_size > 1:  # the norm is the same on every device already
            seen = run.fabric.all_reduce(seen, reduce_op="sum")
        loss, check, norm_found = torch.cat([seen, norm.float()[None].to(seen.device)]).tolist()
        whole = math.isfinite(loss + check + norm_found)
        if not whole:
            self.skip(self._blamed(name, {"loss": loss, "gradient norm": norm_found}, sightings, parameters))
        else:
            if 0 < clip < norm_found + CLIP_EPS:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        prefix = f"train/{name}_" if name else "train/"
        self.metrics.add(f"{prefix}grad_norm", norm_found, 1)
        self.metrics.put(f"{prefix}learning_rate", optimizer.param_groups[0]["lr"])
        return whole

    def drop(self, optimizer: Optimizer, *, name: str = "") -> None:
        """Forget the losses and gradients that an `update` would have used."""
        for kept in (self._losses, self._checks, self._sightings):
            kept.pop(name, None)
        optimizer.zero_grad(set_to_none=True)

    def skip(self, error: NonFiniteError) -> None:
        """Count one more update, or rollout, that is not finite and must not be trained on.

        Raises:
            UserError: `error`, with the step, once `--skip_nonfinite_steps` are used up.
        """
        run = self.run
        run.skipped_steps += 1
        if run.skipped_steps > run.flags.skip_nonfinite_steps:
            raise UserError(
                f"step {run.step_index}: {error}; lower the learning rate, look at these rows, or allow such steps "
                f"with --skip_nonfinite_steps"
            )
        run.say(f"step {run.step_index}: {error}; skipped ({run.skipped_steps} so far)")

    def _blamed(
        self, name: str, numbers: dict[str, float], sightings: list[Sighting], parameters: list[Tensor]
    ) -> NonFiniteError:
        """Say which quantity of which rows, or which parameter's gradient, is not finite; the same on all devices.

        Raises:
            UserError: the weights themselves are not finite, so that no other step would be.
        """
        run, owner = self.run, f" of the {name}" if name else ""
        wrong = [f"the {what}{owner} is {x}" for what, x in numbers.items() if not math.isfinite(x)]
        named = names_of(run.modules, parameters)
        weight = first_nonfinite(named)
        if weight is not None:
            raise UserError(
                f"step {run.step_index}: {wrong[0]}, and so is the weight {weight}; start from another model or "
                f"checkpoint, with a lower learning rate or a larger --optimizer_eps"
            )
        rows = sorted({row for of_device in run.gather([s.rows for s in sightings]) for row in of_device})
        found = run.gather(guilty(sightings))
        if found:
            first = found[0][0]
            rows = sorted({row for what, some in found if what == first for row in some})
            if first != "loss":  # of a whole micro-batch: no more than is said already
                wrong = [*wrong[:1], f"the {first} are not finite"]
        elif gradient := first_nonfinite({what: p.grad for what, p in named.items()}):
            wrong.append(f"the gradient of {gradient} is not finite")
        return NonFiniteError(f"{': '.join(wrong)} (training rows {rows})")

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
