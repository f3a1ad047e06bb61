"""Prompts for sampling, taken from whatever stage of the data is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.splits import Split, check_tokenizer, has_split, load_split
from rlhf.data.text import encode_pair
from rlhf.errors import UserError
from rlhf.untrusted import read_pickle

STAGES_WITH_PROMPTS = ("prompts", "finetune", "preference", "feedback")


class Prompts:
    """The prompts of one split, and the data's own answer to each where it has one.

    The answer is the `reference` of a prompts row, the response of a finetune row, the chosen one of a preference
    row, and the response of a feedback row.
    """

    def __init__(self, split: Split, tokenizer: PreTrainedTokenizerBase) -> None:
        self.split, self.tokenizer = split, tokenizer

    def __len__(self) -> int:
        return len(self.split)

    def prompt(self, i: int) -> Tensor:
        """(P,) int64 token ids."""
        row = self.split[i]
        return _ids(row)[: row["prompt_len"]]

    def row(self, i: int) -> dict[str, Any]:
        """Row `i` of the file as a dict of its own, with `row`, which is i, and `reference`: the data's answer as text,
        empty where there is none.
        """
        row = self.split[i]
        if "reference" not in row:
            answer = _ids(row)[row["prompt_len"] :]
            row["reference"] = self.tokenizer.decode(answer, skip_special_tokens=True)
        return {**row, "row": i}

    def answer(self, i: int) -> Tensor | None:
        """(A,) int64 token ids of the data's own answer, EOS included; None where there is none."""
        row = self.split[i]
        if "reference" not in row:
            return _ids(row)[row["prompt_len"] :]
        if not row["reference"]:
            return None
        return torch.tensor(encode_pair(self.tokenizer, "", row["reference"])[1], dtype=torch.long)


def _ids(row: dict) -> Tensor:
    return row["chosen_input_ids"] if "chosen_input_ids" in row else row["input_ids"]


def example_prompt(data_dir: str) -> Tensor | None:
    """Token ids (P,) of the prompt that `prepare_data.py` put beside the data; None where there is none.

    Raises:
        UserError: the file can't be read, or holds no prompt.
    """
    path = Path(data_dir) / "example_prompt.pt"
    if not path.is_file():
        return None
    found = read_pickle(path)
    ids = found.get("input_ids") if isinstance(found, dict) else None
    is_prompt = isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.layout == torch.strided
    if not is_prompt or not 0 < ids.numel() <= path.stat().st_size:
        raise UserError(f"{path} holds no prompt (a dict whose input_ids are int64); prepare the data again")
    return ids.reshape(-1)


def load_prompts(data_dir: str, name: str, tokenizer: PreTrainedTokenizerBase) -> Prompts | None:
    """The prompts of split `name`, from the first stage that has it; None where no stage has.

    Raises:
        UserError: the split was tokenised by another tokenizer, or the training split has no rows for any stage.
    """
    for stage in STAGES_WITH_PROMPTS:
        if has_split(data_dir, stage, name):
            split = load_split(data_dir, stage, name)
            check_tokenizer(split, tokenizer)
            return Prompts(split, tokenizer)
    if name == "train":
        raise UserError(
            f"--data_dir={data_dir} holds no prompts ({', '.join(f'{s}_train.pt' for s in STAGES_WITH_PROMPTS)}); "
            f"run a prepare_data.py with --stage=prompts or another stage into it"
        )
    return None
