"""The words of `--reward`: `[WEIGHT*]KIND[:ARGUMENT]`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rlhf.errors import UserError
from rlhf.flags import RewardFlags

KINDS = (
    "model:FOLDER",
    "function:FILE.py:NAME",
    "http:URL",
    "exact",
    "numeric[:TOLERANCE]",
    "regex:PATTERN",
    "length:TOKENS",
    "overlong:FROM:TO",
    "repetition[:N]",
    "keyword:WORD,WORD",
)
"""Every kind with its argument, as errors show them."""

_WEIGHT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*")


@dataclass(frozen=True)
class Spec:
    """One reward of the mix.

    Attributes:
        weight: its factor in the sum.
        kind, argument: before and after the first colon.
        text: as the user wrote it; flag: where.
    """

    weight: float
    kind: str
    argument: str
    text: str
    flag: str = "reward"

    def wrong(self, why: str) -> UserError:
        """The error that names this reward."""
        return UserError(f"--{self.flag} {self.text}: {why}")


def parse_spec(text: str) -> Spec:
    """Read one word of `--reward`.

    >>> parse_spec("0.5*length:200")
    Spec(weight=0.5, kind='length', argument='200', text='0.5*length:200', flag='reward')

    Raises:
        UserError: a kind that is not one of `KINDS`, or a weight of 0.
    """
    text = text.strip()
    found = _WEIGHT.match(text)
    weight, rest = (float(found[1]), text[found.end() :].strip()) if found else (1.0, text)
    kind, _, argument = rest.partition(":")
    spec = Spec(weight, kind, argument, text)
    if kind not in {re.split(r"[:\[]", known)[0] for known in KINDS} | {"https"}:
        raise spec.wrong(f"{kind!r} is no kind of reward; write [WEIGHT*]KIND with one of {', '.join(KINDS)}")
    if weight == 0 or not math.isfinite(weight):
        raise spec.wrong(f"a weight of {weight:g} gives no reward; leave it out or give another")
    return spec


def specs_of(flags: RewardFlags) -> list[Spec]:
    """All rewards of a run: the model of `--rm_experiment_dir` first, then those of `--reward`.

    Raises:
        UserError: there is none, or one that can't be read.
    """
    given = flags.rm_experiment_dir
    own = [] if given is None else [Spec(1.0, "model", given, given, flag="rm_experiment_dir")]
    specs = own + [parse_spec(text) for text in flags.reward]
    if not specs:
        raise UserError(
            "no reward is given; set --rm_experiment_dir to a reward model, or --reward to one or more of "
            f"[WEIGHT*]KIND with KIND one of {', '.join(KINDS)}"
        )
    return specs
