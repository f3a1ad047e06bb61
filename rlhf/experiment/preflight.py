"""Before the first step: how much memory the run will take at its peak, and whether its largest micro-batch fits.

Weights and optimiser state are there already and are counted as they are; gradients follow from the parameters. What a
micro-batch takes beside them (activations, the logits of a chunk, casts of the weights) is measured on a quarter and on
half of the largest one, forward and backward, and grows with its tokens from there. It falls while the gradients come,
so it is measured apart for each parameter that has its gradient by then: where an update has one micro-batch, not all
of both is there at one time. On a CPU the heap has holes, and what it takes for a byte of tensors is measured too, on
the half once more, or where gradients are small beside activations (LoRA), and holes therefore are what counts, on
rounds of training as in the run. So the estimate knows every flag and architecture, and costs about the time of one
micro-batch, with those rounds of four.

On a GPU the largest micro-batch itself is then tried, beside as many bytes as are to come, so that a run that does not
fit ends in its first minute and in one sentence. On a CPU it is not: there the kernel would end the process without a
word, and the estimate says as much. Gradients are thrown away, and no random number is used up, so the run is the same
with and without this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlhf.allocator import give_back
from rlhf.data.prompts import Prompts
from rlhf.errors import UserError
from rlhf.memory import free_memory, held_memory, peaks_of
from rlhf.models.forward import trunk_of, unwrapped
from rlhf.models.loading import Role
from rlhf.models.policy import Policy
from rlhf.trees.forest import Forest, Tree

if TYPE_CHECKING:
    from rlhf.experiment.run import Run

KERNELS = 200_000_000
"""Bytes of the kernels that oneDNN compiles for bf16 products on a CPU and keeps, one for each shape, up to 1,024 of
them; 0.1 to 0.4 GB were seen."""
FEW = 0.1
"""Gradients of less than this share of half a micro-batch's activations leave a heap whose holes decide."""
ROUNDS = 4
"""Of the two halves in turn, until holes hardly grow: with SmolLM2-135M in PPO with LoRA from 1.6 bytes for a byte of
tensors after the first pass to 2.0."""


@dataclass
class Pass:
    """One forward and backward pass of a micro-batch: PPO has two of them, the others one.

    Attributes:
        role: what it trains.
        loss: of a micro-batch of these rows.
    """

    role: Role
    loss: Callable[[list[int]], Tensor]


@dataclass
class Estimate:
    """Bytes at the run's peak.

    Attributes:
        held: what the process holds now: itself, the weights of all roles, and the optimisers' state.
        optimizer: that state.
        gradients: of what is trained.
        activations: the most that a micro-batch's forward and backward pass takes beside gradients.
        rollout: what sampling takes: a copy of the weights in the dtype of products, keys and values, logits.
        peak: the largest sum of those that are there at one time.
    """

    held: int
    optimizer: int
    gradients: int
    activations: int
    rollout: int
    peak: int


def check_memory(
    run: Run, passes: Sequence[Pass], optimizers: dict[str, Optimizer], tokens: Tensor, *, rollout: int = 0
) -> Estimate | None:
    """Estimate and print what the run will take; on a GPU, also try its largest micro-batch.

    Args:
        passes: in the order in which a micro-batch goes through them.
        tokens: distinct tokens of every row (in RL with responses of the largest length).
        rollout: bytes that sampling takes (`rollout_bytes`).

    Returns:
        None where nothing was asked for (`--memory_check=none`).

    Raises:
        UserError: the largest micro-batch does not fit into the memory of the GPU.
    """
    wanted = run.flags.memory_check
    if wanted == "none":
        return None
    rows = run.largest_micro_batch(tokens)
    try:
        with torch.random.fork_rng():
            found = estimate(run, passes, optimizers, rows, tokens, rollout)
            _say(run, found, rows, int(tokens[rows].sum()))
            if wanted == "trial" or (wanted == "auto" and run.device.type == "cuda"):
                waiting = found.gradients if _several(run, rows) else 0
                ballast = torch.empty(
                    waiting, dtype=torch.uint8, device=run.device
                )  # on a CPU no page of it is touched
                _attempt(run, passes, rows)
                del ballast
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the largest micro-batch of this run, {len(rows)} rows with {int(tokens[rows].sum()):,} tokens, does not "
            f"fit into the memory of {run.device} ({str(error).split('.')[0]}); {REMEDIES}"
        ) from None
    return found


REMEDIES = "lower --micro_batch_size or --micro_batch_tokens, set --gradient_checkpointing=True or --finetune_mode=lora"


def estimate(
    run: Run, passes: Sequence[Pass], optimizers: dict[str, Optimizer], rows: list[int], tokens: Tensor, rollout: int
) -> Estimate:
    """See `check_memory`."""
    held = _held(run)
    trained = [p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]]
    states = [
        value for optimizer in optimizers.values() for of_one in optimizer.state.values() for value in of_one.values()
    ]
    optimizer = sum(value.nbytes for value in states if isinstance(value, Tensor))
    gradients = sum(p.nbytes for p in trained)
    laps, holes = _laps(run, passes, rows, tokens)
    activations = int(holes * max(lap.beside for lap in laps))
    micro_batch = gradients + activations if _several(run, rows) else int(holes * max(sum(lap) for lap in laps))
    mixed = run.device.type == "cpu" and run.precision != "32-true"
    peak = held + max(micro_batch, gradients, rollout) + (KERNELS if mixed else 0)
    return Estimate(held, optimizer, gradients, activations, rollout, peak)


def _several(run: Run, rows: list[int]) -> bool:
    """Whether an update has other micro-batches than this one, whose gradients are there when it begins."""
    return len(rows) < run.flags.mini_batch_size or getattr(run.flags, "ptx_coef", 0.0) > 0


class Lap(NamedTuple):
    """Bytes at the peak of a part of the backward pass, which the next parameter's gradient ends.

    Attributes:
        gradients: that are there by then; beside: all else.
    """

    gradients: int
    beside: int


def _held(run: Run) -> int:
    """Bytes that the process holds, once it has given back what it has freed."""
    if run.device.type == "cpu":
        give_back()
    return held_memory(run.device) or 0


def _laps(run: Run, passes: Sequence[Pass], rows: list[int], tokens: Tensor) -> tuple[list[Lap], float]:
    """Those of the largest micro-batch, from what two parts of it take; what of the heap a byte of tensors takes."""
    by_size = sorted(rows, key=lambda row: -int(tokens[row]))
    small, large = by_size[::4], by_size[::2] if len(by_size) > 2 else by_size
    least = _attempt(run, passes, small)  # the first pass also finds room for what stays: compiled kernels, threads
    before = _held(run)
    most, holes = _attempt(run, passes, large), 1.0
    if run.device.type == "cpu":
        if most[-1].gradients < FEW * max(lap.beside for lap in most):
            taken = _rounds(run, passes, [large, by_size[1::2] or large]) - before
        else:
            _attempt(run, passes, large)  # which doesn't fit into all the holes that the first one has left
            taken = (held_memory(run.device) or 0) - before
        holes = max(1.0, taken / max(sum(lap) for lap in most))
    if len(small) == len(large):
        return most, holes
    if [lap.gradients for lap in least] != [lap.gradients for lap in most]:  # of a parameter that not every row uses
        least, most = ([Lap(0, max(sum(lap) for lap in laps))] for laps in (least, most))
    sizes = [int(tokens[part].sum()) for part in (small, large, by_size)]
    growth = (sizes[2] - sizes[0]) / (sizes[1] - sizes[0])
    found = [Lap(a.gradients, int(a.beside + growth * (b.beside - a.beside))) for a, b in zip(least, most, strict=True)]
    return found, holes


def _attempt(run: Run, passes: Sequence[Pass], rows: list[int]) -> list[Lap]:
    """Forward and backward of one micro-batch, as in the run; leaves no gradients."""
    laps, there = [], 0
    parameters = list(dict.fromkeys(p for one in passes for p in one.role.parameters() if p.requires_grad))
    with peaks_of(run.device) as lap, run.fabric.autocast():

        def arrived(parameter: Tensor) -> None:
            nonlocal there
            laps.append(Lap(there, lap() - there))
            there += parameter.grad.nbytes

        hooks = [p.register_post_accumulate_grad_hook(arrived) for p in parameters]
        try:
            for one in passes:
                run.fabric.backward(one.loss(rows))
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in parameters:
                parameter.grad = None
        laps.append(Lap(there, lap() - there))
    return laps


def _rounds(run: Run, passes: Sequence[Pass], parts: Sequence[list[int]]) -> int:
    """Train on these parts in turn, as a run does, but for the update; leaves no gradients.

    A block does not fit where one of its size was freed while a small one, of a tensor that lives longer, lies in the
    room that its alignment needs. Such are left by passes without a graph, as of a reference, and by gradients of one
    role in the pass of the next.

    Returns:
        bytes that the process holds at the end.
    """
    for i in range(ROUNDS):
        part = parts[i % len(parts)]
        with run.fabric.autocast():
            with torch.no_grad():
                for one in passes:
                    one.loss(part)
            for one in passes:
                run.fabric.backward(one.loss(part))
        for one in passes:
            for parameter in one.role.parameters():
                parameter.grad = None
    return held_memory(run.device) or 0


def rollout_bytes(run: Run, actor: Policy, prompts: Prompts, num_responses: int) -> int:
    """Bytes that sampling takes: a copy of the weights where products have another dtype, keys and values, logits.

    Args:
        num_responses: of a rollout on this device, of which `--rollout_mini_batch_size` are decoded at once.
    """
    hf, num = unwrapped(actor.model), min(num_responses, run.flags.rollout_mini_batch_size)
    config, weights = hf.config.get_text_config(), next(hf.parameters())
    with run.fabric.autocast():
        mixed = torch.is_autocast_enabled(run.device.type)
        dtype = torch.get_autocast_dtype(run.device.type) if mixed else weights.dtype
    layers = [m for m in [*trunk_of(hf).modules(), hf.get_output_embeddings()] if isinstance(m, torch.nn.Linear)]
    copied = sum(m.weight.numel() for m in layers) if dtype != weights.dtype else 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    columns = int(prompts.split.prompt_lens.max()) + run.flags.max_new_tokens
    kept = 2 * config.num_hidden_layers * num * columns * heads * size
    logits = 4 * num * config.vocab_size  # logits, their exponentials, these in blocks, and a sum or noise
    return (copied + kept) * dtype.itemsize + logits * torch.float32.itemsize


def trial_forest(run: Run, prompts: Prompts, rows: list[int], num_samples: int, length: int) -> Forest:
    """These prompts on the run's device, each with `num_samples` responses of `length` tokens: the most there is."""
    response = torch.zeros(length, dtype=torch.long)
    return Forest([Tree.of(prompts.prompt(row), *[response] * num_samples) for row in rows]).to(run.device)


def _say(run: Run, found: Estimate, rows: list[int], num_tokens: int) -> None:
    free = free_memory(run.device)
    parts = {
        "gradients": found.gradients,
        f"the largest micro-batch ({len(rows)} rows, {num_tokens:,} tokens)": found.activations,
        "sampling": found.rollout,
    }
    listed = ", ".join(f"{name} {_gb(value)}" for name, value in parts.items() if value)
    share = run.fabric.strategy.num_processes if run.device.type == "cpu" and run.world_size > 1 else 1
    room = None if free is None else free // share + found.held
    of = "" if room is None else f" of {_gb(room)} GB that this process may have"
    run.say(
        f"{run.script}: about {_gb(found.peak)} GB at the peak{of}: {_gb(found.held)} held now (the weights of all "
        f"roles and {_gb(found.optimizer)} of the optimiser's state among them), {listed}"
    )
    if room is not None and found.peak > room:
        run.say(f"warning: about {_gb(found.peak)} GB will not fit into {_gb(room)} GB; {REMEDIES}")


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f}" if value < 1e9 else f"{value / 1e9:.1f}"
