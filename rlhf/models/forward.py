"""One forward pass over a forest: hidden states of its packed tokens, by tree attention or by padded rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import UserError
from rlhf.models.attention import BranchAttention, KeepingAttention, TreeAttention, active_plan, attending
from rlhf.models.layers import is_lean
from rlhf.models.trained import trained_states
from rlhf.trees.forest import Forest

KEEP = "keep"
"""Adapter name: leave the model's adapters as they are."""


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model under an optional peft wrapper; its adapters stay in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def using_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run with one LoRA adapter (`None`: with none), leaving `requires_grad` alone.

    Several roles share one base this way. peft's own `set_adapter` also freezes and thaws parameters, which the
    roles must not do to each other.
    """
    layers = [] if name == KEEP else [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = name is None
            layer._active_adapter = [name] if name is not None else layer._active_adapter
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def trunk_of(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The model without its head: token ids to hidden states."""
    hf = unwrapped(model)
    trunk = hf.get_decoder() if hasattr(hf, "get_decoder") else None
    return trunk if trunk is not None and trunk is not hf else hf.base_model


def packed_states(
    model: PreTrainedModel | PeftModel, forest: Forest, *, plan: TreeAttention | None = None
) -> tuple[Tensor, TreeAttention]:
    """(T, H) last hidden states of the packed tokens, each token computed once, and the plan that made them."""
    plan = plan or TreeAttention(forest)
    with attending(plan):
        output = trunk_of(model)(
            input_ids=forest.input_ids[None], position_ids=forest.positions[None], use_cache=False, return_dict=True
        )
    return output.last_hidden_state[0], plan


def forest_states(
    model: PreTrainedModel | PeftModel,
    forest: Forest,
    *,
    keeping: KeepingAttention | None = None,
    at: Tensor | None = None,
) -> Tensor:
    """(T, H) last hidden states of the packed tokens: on a CPU in few operations, where the architecture is known.

    Args:
        keeping: takes every layer's keys and values.
        at: (N,) packed positions whose states are asked for, (N, H); all of them unless given.
    """
    trunk = trunk_of(model)
    drops = trunk.training and getattr(trunk.config, "attention_dropout", 0.0)
    if forest.input_ids.device.type == "cpu" and not drops and is_lean(trunk):
        return trained_states(trunk, forest, keep=None if keeping is None else keeping.keep, at=at)
    states, _ = packed_states(model, forest, plan=keeping)
    return states if at is None else states[at]


@torch.no_grad()
def states_beside(
    model: PreTrainedModel | PeftModel, beside: Forest, forest: Forest, states: Tensor, kept: KeepingAttention
) -> Tensor:
    """(T', H) last hidden states of a forest whose roots went through the model in another one; without gradient.

    Only the tokens below the roots are computed.

    Args:
        beside: T' packed tokens; tree by tree its roots are those of `forest`.
        states, kept: (T, H) states of `forest`, and the plan that made them.

    Raises:
        ValueError: the roots differ in length.
    """
    roots, fresh, known = beside.root_index, beside.fresh_index, forest.root_index
    if beside.root_lengths != forest.root_lengths:
        raise ValueError("the trees of two forests that go side by side must have the same roots")
    whole = states.new_empty(beside.num_tokens, states.shape[1])
    whole[roots] = states.detach()[known]
    with attending(BranchAttention(beside, kept.layers, known)):
        ids, positions = beside.input_ids[fresh], beside.positions[fresh]
        output = trunk_of(model)(input_ids=ids[None], position_ids=positions[None], use_cache=False, return_dict=True)
    whole[fresh] = output.last_hidden_state[0]
    return whole


def padded_rows(forest: Forest) -> dict[str, Tensor]:
    """Model inputs of the fallback: every root-to-leaf path as one right-padded row."""
    rows, mask = forest.rows()
    positions = torch.where(mask, forest.positions[rows], 0)
    return {
        "input_ids": torch.where(mask, forest.input_ids[rows], 0),
        "attention_mask": mask.long(),
        "position_ids": positions,
    }


def place_in_rows(forest: Forest) -> tuple[Tensor, Tensor]:
    """For every packed token one (row, column) of `padded_rows` that holds it: two (T,) index tensors."""
    rows, mask = forest.rows()
    row, column = torch.zeros_like(forest.input_ids), torch.zeros_like(forest.input_ids)
    at = mask.nonzero()
    row[rows[mask]], column[rows[mask]] = at[:, 0], at[:, 1]
    return row, column


def accepted(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop `position_ids` for models that derive positions themselves (ALiBi, or from the attention mask)."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in names or name != "position_ids"}


def enable_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Recompute activations in the backward pass, under the attention plan of their forward pass.

    Raises:
        UserError: the architecture has no such switch.
    """

    def contexts():
        return nullcontext(), attending(active_plan())

    hf = unwrapped(model)
    if not hf.supports_gradient_checkpointing:
        raise UserError(f"{type(hf).__name__} has no --gradient_checkpointing; leave it at False")
    settings = {"use_reentrant": False, "context_fn": contexts}
    if hasattr(hf, "activation_checkpointing_enable"):
        hf.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:  # its name in earlier releases of transformers
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
