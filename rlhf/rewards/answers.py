"""Sampled responses as every kind of reward sees them, and where in the data their prompts stand."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

SHOWN_ROWS = 3
"""Rows that an error names before it counts the rest."""


@dataclass(frozen=True)
class Answers:
    """N responses to prompts of one file.

    Attributes:
        prompt_ids, response_ids: N tensors of token ids each.
        ended: whether each response holds its stop token.
        prompts, responses: their texts, without control tokens.
        rows: the rows of the data, with `reference` (a text, may be empty), `row` (number in the file) and
            `response_ids` (a list).
        file: that the rows come from.
    """

    prompt_ids: Sequence[Tensor]
    response_ids: Sequence[Tensor]
    ended: Sequence[bool]
    prompts: list[str]
    responses: list[str]
    rows: list[dict[str, Any]]
    file: Path

    def __len__(self) -> int:
        return len(self.responses)

    def place(self, i: int) -> str:
        """Where the i-th prompt stands, for an error."""
        return f"row {self.rows[i]['row']} of {self.file}"

    def places(self) -> str:
        """Where all prompts stand: the first few rows, and how many more."""
        if len(self) == 1:
            return self.place(0)
        shown = ", ".join(str(row["row"]) for row in self.rows[:SHOWN_ROWS])
        more = f" and {len(self) - SHOWN_ROWS} more" if len(self) > SHOWN_ROWS else ""
        return f"rows {shown}{more} of {self.file}"


def token_at(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, end: int) -> int:
    """Index of the token that completes the first `end` characters of `text`, the decoded `ids`.

    A character that several tokens spell is complete with the last of them.

    Args:
        ids: T token ids; text: their text without control tokens; end: in 1 .. len(text).
    """

    def complete(count: int) -> bool:
        return tokenizer.decode(ids[:count], skip_special_tokens=True)[:end] == text[:end]

    return bisect_left(range(1, len(ids) + 1), True, key=complete)
