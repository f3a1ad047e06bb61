"""Whether the rows of a split fit a model: its positions and its vocabulary, before the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.packed import SCHEMAS
from rlhf.data.splits import Split
from rlhf.errors import UserError


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer that gives ids for which the model has no embedding.

    Raises:
        UserError: naming the token, its id and the number of embeddings.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= rows:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has the token {token!r} with the id {largest}, and the model's "
            f"embedding has {rows} rows; take the model's own tokenizer, or resize_token_embeddings and save the model"
        )


def check_split(split: Split, model: PreTrainedModel, *, new_tokens: int | None = None) -> None:
    """Refuse rows that a model can't read.

    Args:
        new_tokens: tokens that are sampled after the prompt of each row; None where whole rows are read.

    Raises:
        UserError: an id without an embedding, or a row longer than the model's positions; naming split, row and length.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if split.largest_id >= rows:
        raise UserError(
            f"{split.path} holds the token id {split.largest_id}, and the model's embedding has {rows} rows; prepare "
            f"the data again with the model's own tokenizer"
        )
    most = positions_of(model.config)
    if most is None:
        return
    if new_tokens is not None:
        lengths, what = split.prompt_lens + new_tokens, f"prompt and --max_new_tokens={new_tokens}"
        remedy = "make --max_new_tokens smaller, or prepare the data again with a smaller --max_prompt_length"
    else:
        columns = [column for column in SCHEMAS[split.stage].sequences if column.endswith("input_ids")]
        lengths, what = torch.stack([split.lengths(column) for column in columns]).amax(0), "prompt and response"
        remedy = f"prepare the data again with --max_length={most}"
    longest = int(lengths.argmax())
    if lengths[longest] > most:
        raise UserError(
            f"{split.path}, row {longest}: {what} are {int(lengths[longest])} tokens, and the model has {most} "
            f"positions; {remedy}"
        )


def check_prompt(prompt: Tensor, new_tokens: int, model: PreTrainedModel, where: str) -> None:
    """Refuse one prompt (P,) of int64 ids after which `new_tokens` are sampled.

    Raises:
        UserError: an id has no embedding, or all together are more than the model's positions.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if prompt.min() < 0 or prompt.max() >= rows:
        raise UserError(
            f"{where} holds the token id {int(prompt.max() if prompt.min() >= 0 else prompt.min())}, and the model's "
            f"embedding has {rows} rows; prepare the data again"
        )
    most = positions_of(model.config)
    if most is not None and len(prompt) + new_tokens > most:
        raise UserError(
            f"{where} has {len(prompt)} tokens, and with --max_new_tokens={new_tokens} that is more than the {most} "
            f"positions of the model; make --max_new_tokens smaller"
        )


def positions_of(config: Any) -> int | None:
    """The most tokens that a configuration says its model reads; None where it says nothing."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None
