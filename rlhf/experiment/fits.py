"""Whether the rows of a split fit the models that will read them: positions and vocabulary, before the first step."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.packed import SCHEMAS
from rlhf.data.prompts import Prompts
from rlhf.data.splits import Split
from rlhf.errors import UserError
from rlhf.models.fits import positions_of
from rlhf.models.forward import unwrapped
from rlhf.rewards.models import RewardModel

LOOKED_AT = 64
"""Prompts, the longest, that a reward model with a tokenizer of its own encodes: all of them could take minutes."""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str = "the model") -> None:
    """Refuse a tokenizer that gives ids for which the model has no embedding.

    Args:
        name: of the model, for the sentence.

    Raises:
        UserError: naming the token, its id and the number of embeddings.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= rows:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has the token {token!r} with the id {largest}, and {name}'s "
            f"embedding has {rows} rows; take the model's own tokenizer, or resize_token_embeddings and save the model"
        )


def check_split(
    split: Split, model: PreTrainedModel, *, new_tokens: int | None = None, name: str = "the model"
) -> None:
    """Refuse rows that a model can't read.

    Args:
        name: of the model, for the sentence.
        new_tokens: tokens that are sampled after the prompt of each row; None where whole rows are read.

    Raises:
        UserError: an id without an embedding, or a row longer than the model's positions; naming split, row and length.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if split.largest_id >= rows:
        raise UserError(
            f"{split.path} holds the token id {split.largest_id}, and {name}'s embedding has {rows} rows; prepare "
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
            f"{split.path}, row {longest}: {what} are {int(lengths[longest])} tokens, and {name} has {most} "
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


def check_reward_model(prompts: Prompts, reward: RewardModel, new_tokens: int) -> str | None:
    """See that a reward model can read these prompts with responses of up to `new_tokens` of the policy's tokens.

    With the policy's tokenizer that can be told; with one of its own, the `LOOKED_AT` longest prompts are encoded, and
    a response is taken to have as many tokens as it has for the policy.

    Returns:
        What may turn out too long while the run goes on (`RewardModel` raises then); None where nothing will.

    Raises:
        UserError: an id without an embedding; prompt and response, or with its own tokenizer the prompt alone, are more
            than its positions; naming row and length.
    """
    model, split = unwrapped(reward.scorer.model), prompts.split
    check_vocabulary(reward.tokenizer, model, reward.name)
    if reward.same_tokenizer:
        check_split(split, model, new_tokens=new_tokens, name=reward.name)
        return None
    if reward.positions is None or not len(split):
        return None
    longest = split.prompt_lens.topk(min(LOOKED_AT, len(split))).indices.tolist()
    lengths = [reward.prompt_length(prompts.prompt(row)) for row in longest]
    most = max(lengths)
    where = f"{split.path}, row {longest[lengths.index(most)]}: the prompt is {most} tokens of {reward.name}"
    if most >= reward.positions:
        raise UserError(
            f"{where}, which has {reward.positions} positions; prepare the data again with a smaller "
            f"--max_prompt_length"
        )
    if most + new_tokens > reward.positions:
        return (
            f"{where}, which has {reward.positions} positions: a response of --max_new_tokens={new_tokens} may not fit "
            f"beside it, and would stop the run; make --max_new_tokens smaller"
        )
    return None
