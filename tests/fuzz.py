"""What the fuzzing tests share: how long they try, and values of every kind in every place.

The suite tries the same few examples every time. `RLHF_FUZZ_EXAMPLES=20000 pytest tests/test_fuzz_*.py` tries that
many new ones for each property.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rlhf.errors import UserError

_ASKED = os.environ.get("RLHF_FUZZ_EXAMPLES")


def fuzz(examples: int) -> settings:
    """Settings of a property: this many examples in the suite, always the same."""
    return settings(
        max_examples=int(_ASKED or examples),
        derandomize=_ASKED is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def attempt(call: Callable[[], Any], mistake: type[Exception] = UserError) -> tuple[Any, Exception | None]:
    """What a call returns, or how it refuses: anything but the `mistake` that a user is meant to read goes through."""
    try:
        return call(), None
    except mistake as error:
        return None, error


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
"""Lone surrogates, NUL and control characters too."""

WORDS = st.sampled_from(
    ["", " ", "\n", "yes", "no", "7", "{prompt}", "user", "assistant", "system", "\ud800", "\0", "🙂"]
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
"""Whatever Python's json reads: NaN and infinities too."""


@st.composite
def damaged(draw: st.DrawFn, good: list[Any]) -> Any:
    """One of the good rows, up to three times changed: any value in any place, a key gone, a key too many."""
    row = copy.deepcopy(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(0, 3))):
        holder, place = None, None
        inside = row
        while isinstance(inside, (dict, list)) and inside and draw(st.booleans() | st.just(holder is None)):
            holder = inside
            place = draw(st.sampled_from(sorted(inside, key=str) if isinstance(inside, dict) else range(len(inside))))
            inside = holder[place]
        if holder is None:
            return draw(JSON)
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            holder[place] = draw(JSON)
        elif change == "remove":
            del holder[place]
        elif isinstance(holder, dict):
            holder[draw(WORDS | ANY_TEXT)] = draw(JSON)
        else:
            holder.append(draw(JSON))
    return row
