"""What the value of a flag may be, alone: its kind, its range, its text. The same on the command line and in a file.

The range of a number belongs to the flag's name, so a name means the same thing in every script; what flags mean
beside each other is checked where they are declared.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from rlhf.errors import UserError

LARGEST = 2**31 - 1
"""Largest number, and largest count of steps, rows or tokens, of a flag whose own range has no end."""


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; `above` and `below`: without these two themselves."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        """As it follows a flag in an error.

        >>> str(Range(0, above=True)), str(Range(0)), str(Range(0, 1, below=True))
        ('must be above 0', 'must not be below 0', 'must be in [0, 1)')
        """
        low, high = (f"{x:,.10g}" for x in (self.low, self.high))
        if math.isinf(self.high):
            return f"must be above {low}" if self.above else f"must not be below {low}"
        return f"must be in {'(' if self.above else '['}{low}, {high}{')' if self.below else ']'}"


ANY, ABOVE_0, NOT_BELOW_0, SHARE = Range(), Range(0, above=True), Range(0), Range(0, 1)


def _each(names: str, allowed: Range) -> dict[str, Range]:
    return dict.fromkeys(names.split(), allowed)


RANGES = {
    **_each(
        """
        epochs max_steps mini_batch_size micro_batch_size micro_batch_tokens rollout_size rollout_mini_batch_size
        ppo_epochs rollout_epochs num_samples log_interval num_nodes lora_rank lora_alpha optimizer_eps beta
        temperature eval_temperature max_new_tokens target_kl_coeff kl_horizon reward_clip_value ref_update_interval
        loss_weights num_seeds keep_loaded num_problems limit max_length max_prompt_length max_response_length
        guard_patience
        """,
        ABOVE_0,
    ),
    **_each(
        """
        learning_rate actor_learning_rate critic_learning_rate weight_decay gradient_clip_val lr_warmup_steps
        skip_nonfinite_steps save_interval keep_checkpoints eval_interval eval_iters top_k reward_timeout
        desirable_weight undesirable_weight max_chosen_drop critic_warmup_steps init_kl_coeff kl_coef clip_coeff
        value_clip_coeff vf_coeff entropy_coef ptx_coef advantage_clip_value max_ratio target_update_kl clip_low
        clip_high max_resamples missing_eos_penalty cpo_alpha simpo_gamma orpo_lambda sft_coef num_prompts num_rows
        num_shown keep_weights guard_kl guard_eos guard_empty guard_length guard_repetition guard_score
        """,
        NOT_BELOW_0,
    ),
    **_each("ld_alpha gae_gamma gae_lambd validation_percentage test_percentage max_bad_fraction", SHARE),
    **_each("optimizer_beta1 optimizer_beta2 lora_dropout", Range(0, 1, below=True)),
    **_each("top_p ref_mixup", Range(0, 1, above=True)),
    **_each("missing_eos_value f_divergence_alpha", ANY),
    "discopop_tau": Range(0, 1, above=True, below=True),
    "label_smoothing": Range(0, 0.5, below=True),
    "seed": Range(0, 2**32 - 1),
    "num_workers": Range(0, 1024),
    "ignore_index": Range(-(2**31), -1),
    "levels": Range(1, 5),
    "port": Range(1, 65535),
}
"""What a number may be, by the name of its flag."""


def check_numbers(flags: Any, ranges: Mapping[str, Range] = RANGES) -> None:
    """Refuse a number that is not finite, or out of its range.

    Args:
        flags: any dataclass of flags.
        ranges: of numbers, by the names of their flags.

    Raises:
        UserError: names the flag, its value and what would be right.
    """
    for name, item in _items(flags):
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            _check_number(name, item, ranges.get(name, ANY))


def check_texts(flags: Any) -> None:
    """Refuse a text that says nothing, or that no file could hold.

    Raises:
        UserError: names the flag, its value and what would be right.
    """
    for name, item in _items(flags):
        if isinstance(item, str):
            _check_text(name, item)


def _items(flags: Any) -> Iterator[tuple[str, Any]]:
    """(flag, value) of all flags; a list's items one by one."""
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            yield field.name, item


def _check_text(name: str, text: str) -> None:
    if not text.strip():
        raise UserError(f"--{name} is empty; give it a value, or leave it out")
    if "\0" in text:
        raise UserError(f"--{name}={shown(text)} holds a NUL character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"--{name}={shown(text)} is not valid UTF-8; write it anew, or rename the file") from None


def _check_number(name: str, value: float, allowed: Range) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name}={value} must be a finite number")
    if value not in allowed:
        raise UserError(f"--{name}={shown(value)} {allowed}")
    if abs(value) > LARGEST and math.isinf(allowed.high):
        raise UserError(f"--{name}={shown(value)} must not be above {LARGEST:,}")


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, only characters that can be printed, a long one without its middle.

    >>> shown("/a/folder" * 20 + "/file.py")
    '/a/folder/a/folder/a/folder/a/folde.../folder/a/folder/a/folder/a/folder/file.py'
    """
    try:
        text = value if isinstance(value, str) else str(value)
    except ValueError:  # Python writes out no integer of more than some thousand digits
        text = "a number of thousands of digits"
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= 80 else f"{text[:35]}...{text[-42:]}"


def wanted(kind: Any) -> str:
    """What a value of this annotation must be, in words.

    >>> wanted(float), wanted(list[str]), wanted(int | None), wanted(Literal["sgd", "adam"])
    ('a number', 'a list, each a text', 'a whole number', 'one of sgd, adam')
    """
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return f"a list, each {wanted(get_args(kind)[0])}"
    if is_union(kind):
        return " or ".join(wanted(part) for part in get_args(kind) if part is not NoneType)
    return {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[kind]


def is_union(kind: Any) -> bool:
    """Whether an annotation says `A | B`, or `Optional[A]`."""
    return get_origin(kind) in (Union, UnionType)


def item_kind(kind: Any) -> Any:
    """The annotation of one word of the command line: of an item for a list, without None."""
    parts = [part for part in get_args(kind) if part is not NoneType] if is_union(kind) else [kind]
    return get_args(parts[0])[0] if get_origin(parts[0]) is list else parts[0]


def fits(kind: Any, value: Any) -> bool:
    """Whether a value read from JSON is of an annotation; a whole number is a number too."""
    if is_union(kind):
        return any(fits(part, value) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(get_args(kind)[0], item) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check_kinds(kinds: dict[str, Any], values: dict[str, Any], where: str) -> None:
    """Refuse values from JSON that are not of their flag's annotation.

    Args:
        kinds: annotation of each flag; values: some or all of them; where: the file, for the error.

    Raises:
        UserError: names the file, the flag and what would be right.
    """
    for name, value in values.items():
        if not fits(kinds[name], value):
            may_be_null = is_union(kinds[name]) and NoneType in get_args(kinds[name])
            raise UserError(
                f"{where}: {name!r} is {shown(_as_json(value))} and must be {wanted(kinds[name])}"
                f"{' or null' if may_be_null else ''}"
            )


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except ValueError:
        return "a number of thousands of digits"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, if any is."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return found[0] if found else None
