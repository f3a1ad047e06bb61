"""What the tests of rewards share: prompts with references of one's choice, and responses given as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.data.prompts import Prompts, load_prompts
from rlhf.data.splits import write_split
from rlhf.data.text import encode_pair, encode_prompt
from rlhf.flags import ModelFlags, RewardFlags
from rlhf.rewards.mix import Rewards, Scores, load_rewards
from tests.splits import tokenizer_for


@dataclass(kw_only=True)
class Flags(RewardFlags, ModelFlags):
    """The flags of a script that has rewards and models."""


def prompts_of(folder: Path, references: list[str]) -> Prompts:
    """A split `prompts_train` in `folder`: the prompt of row i is "Human: question i"."""
    tokenizer = tokenizer_for()
    rows = []
    for i, reference in enumerate(references):
        ids = torch.tensor(encode_prompt(tokenizer, f"Human: question {i}"))
        rows.append({"prompt_len": len(ids), "input_ids": ids, "reference": reference})
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder, "prompts", "train", rows)
    return load_prompts(str(folder), "train", tokenizer)


def response_ids(text: str) -> Tensor:
    """A response that has ended."""
    return torch.tensor(encode_pair(tokenizer_for(), "", text)[1])


def rewards_of(prompts: Prompts, *specs: str, **flags: Any) -> Rewards:
    """The mix of `--reward specs`."""
    return load_rewards(Flags(reward=list(specs), **flags), prompts, tokenizer_for())


def judged(rewards: Rewards, responses: list[str], rows: list[int] | None = None) -> Scores:
    """Scores of responses to the prompts of `rows`: the first ones unless given."""
    rows = list(range(len(responses))) if rows is None else rows
    prompts = [rewards.prompts.prompt(i) for i in rows]
    return rewards(prompts, [response_ids(text) for text in responses], rows)


def function_file(path: Path, body: str, name: str = "score") -> str:
    """The argument of `function:` for a new file that defines `name(prompts, responses, rows)`."""
    path.write_text(f"import threading, time\n\ndef {name}(prompts, responses, rows):\n    {body}\n", encoding="utf-8")
    return f"{path}:{name}"
