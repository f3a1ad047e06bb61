"""What a source row becomes before it is tokenised, and why some rows become nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class UnusableRowError(Exception):
    """A row that gives nothing to train on: `reason` in the counts, `fix` for whoever wants it back.

    `bad`: the row itself is broken, and counts towards `--max_bad_fraction`; else it is fine but not of use here.
    """

    def __init__(self, reason: str, fix: str, *, bad: bool = True) -> None:
        super().__init__(reason, fix)
        self.reason, self.fix, self.bad = reason, fix, bad

    def __str__(self) -> str:
        return f"{self.reason}; {self.fix}"


@dataclass(frozen=True)
class Response:
    """A response in the pieces that are tokenised apart, each with whether it is learnt."""

    pieces: tuple[tuple[str, bool], ...]
    closed: bool = False
    """The text carries its own end-of-turn token, so no EOS is added."""

    @classmethod
    def of(cls, text: str) -> Response:
        """A plain response: one piece, closed by EOS."""
        return cls(((text, True),))


@dataclass(frozen=True)
class Row:
    """One usable row: a prompt, and what hangs on it in the stage that is being prepared."""

    kind: str
    """How the prompt was written: `dialogue`, `summary`, `chat_template` or `plain` (rlhf/data/formats.py)."""
    prompt: str
    responses: tuple[Response, ...] = ()
    """None for prompts, one to learn, chosen and rejected, or one for each label."""
    labels: tuple[bool, ...] = ()
    reference: str = ""
    """For prompts: the data's own answer, as it would follow the prompt, or empty."""
    shorten: Callable[[Callable[[str], bool]], str | None] | None = None
    """Finds the longest shorter prompt that fits, cut where its kind of text may be cut."""
    always_shorten: bool = False
    """Shorten an over-long prompt even without --truncate."""


def staged(
    stage: str,
    kind: str,
    prompt: str,
    *,
    chosen: Response,
    rejected: Response | None = None,
    reference: str,
    **more: Any,
) -> Row:
    """The row of `stage` that a prompt with a good response, and perhaps a worse one, gives."""
    if stage == "prompts":
        return Row(kind, prompt, reference=reference, **more)
    if stage == "finetune":
        return Row(kind, prompt, (chosen,), **more)
    if rejected is None:
        raise UnusableRowError(f"no rejected response for --stage={stage}", "give chosen and rejected")
    labels = (True, False) if stage == "feedback" else ()
    return Row(kind, prompt, (chosen, rejected), labels, **more)


def text_of(record: Any, key: str, *, may_be_empty: bool = False) -> str:
    """`record[key]`, which must be a text that says something."""
    if not isinstance(record, Mapping):
        raise UnusableRowError(
            f"the row is {_name(record)}, not an object", 'write {"key": "value", ...}, one object a row'
        )
    if key not in record:
        raise UnusableRowError(f"missing key {key!r}", f"add it; the row has {sorted(map(str, record))}")
    return checked_text(record[key], key, may_be_empty=may_be_empty)


def checked_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """`value`, if it is a valid text that says something."""
    if value is None:
        raise UnusableRowError(f"{name!r} is null", "give a text")
    if not isinstance(value, str):
        raise UnusableRowError(f"{name!r} is {_name(value)}, not a text", "put it in quotes")
    if not may_be_empty and not value.strip():
        raise UnusableRowError(f"{name!r} is empty", "give a text, or leave the row out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableRowError(f"{name!r} is not valid Unicode", "save the file as UTF-8") from None
    return value


def refuse_equal(chosen: str, rejected: str, remove_same_responses: bool) -> None:
    """Skip a pair of equal responses where they are unwanted."""
    if remove_same_responses and chosen == rejected:
        raise UnusableRowError(
            "chosen equals rejected", "give two responses, or pass --remove_same_responses=False", bad=False
        )


def first_fit(positions: Sequence[int], make: Callable[[int], str], fits: Callable[[str], bool]) -> str | None:
    """The longest text that fits, of `make(position)` for positions that run from longest to shortest."""
    low, high = 0, len(positions)
    while low < high:
        middle = (low + high) // 2
        if fits(make(positions[middle])):
            high = middle
        else:
            low = middle + 1
    return make(positions[low]) if low < len(positions) else None


def _name(value: Any) -> str:
    names = {
        dict: "an object",
        str: "a text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")
