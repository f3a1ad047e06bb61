"""Rewards that a rule computes: answers that can be checked, and the shape of a response.

Each rule is a plain function of one response; `rule_of` reads its argument from `--reward`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from rlhf.rewards.answers import Answers
from rlhf.rewards.specs import Spec

_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+−])?"  # a sign, unless something to take away from stands before it
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d+)?"
)


def exact_answer(response: str, reference: str) -> float:
    """1 if the response is the reference, but for white space around it and runs of it; else 0.

    >>> exact_answer(" New\\nYork ", "New York"), exact_answer("New York.", "New York")
    (1.0, 0.0)
    """
    return float(response.split() == reference.split())


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or None. Commas may group thousands; a minus after a digit, letter or bracket takes
    away and is no sign.

    >>> last_number("12 - 5 = 7, so it is -1,234.50."), last_number("10-3"), last_number("none")
    (Decimal('-1234.50'), Decimal('3'), None)
    """
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None
    except ArithmeticError:  # an exponent of twenty digits
        return None


def numeric_answer(response: str, reference: str, tolerance: Decimal = Decimal(0)) -> float:
    """1 if the last number of the response is that of the reference, to `tolerance`; else 0.

    Both are compared as decimal fractions, without rounding. Cobbe et al. 2021 (arXiv 2110.14168) check answers so.

    >>> numeric_answer("3 + 4 = 7.0", "#### 7"), numeric_answer("7 or 8", "7"), numeric_answer("seven", "7")
    (1.0, 0.0, 0.0)
    >>> numeric_answer("1e9999999999", "7"), numeric_answer("1e99999999999999999999", "7")
    (0.0, 0.0)

    Raises:
        ValueError: the reference holds no number.
    """
    right, given = last_number(reference), last_number(response)
    if right is None:
        raise ValueError("the reference holds no number")
    if given is None:
        return 0.0
    try:
        return float(abs(given - right) <= tolerance)
    except ArithmeticError:  # a difference beyond all bounds, such as from 1e999999999
        return float(given == right)


def pattern_found(response: str, pattern: re.Pattern) -> float:
    """1 if the pattern occurs in the response, else 0.

    >>> pattern_found("so <answer>7</answer>", re.compile("<answer>.*</answer>"))
    1.0
    """
    return float(pattern.search(response) is not None)


def length_target(num_tokens: int, target: int) -> float:
    """- |T - target| / target for a response of T tokens: 0 at the target, -1 at none and at twice as many.

    >>> length_target(200, 200), length_target(150, 200), length_target(400, 200)
    (0.0, -0.25, -1.0)
    """
    return min(num_tokens - target, target - num_tokens) / target


def overlong(num_tokens: int, start: int, end: int) -> float:
    """0 up to `start` tokens, then along a line down to -1 at `end`, and -1 beyond.

    Yu et al. 2025 (DAPO, arXiv 2503.14476), eq. 13, with L_max = end and L_cache = end - start.

    >>> [overlong(n, 100, 120) for n in (100, 105, 120, 500)]
    [0.0, -0.25, -1.0, -1.0]
    """
    return max(-1.0, min(0.0, (start - num_tokens) / (end - start)))


def repetition(response: str, n: int) -> float:
    """Minus the share of the response's n-grams of words that have stood in it before; 0 for fewer than n words.

    Case is ignored. Yeo et al. 2025 (arXiv 2502.03373) punish repeated n-grams in long answers.

    >>> repetition("a b a b a", 2), repetition("a b c", 2), repetition("a", 2)
    (-0.5, 0.0, 0.0)
    """
    words = response.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def keywords(response: str, words: list[str]) -> float:
    """The share of `words` that occur in the response, as whole words, whatever their case.

    >>> keywords("Thanks, it WORKS.", ["works", "thank"])
    0.5
    """
    found = [word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", response, flags=re.IGNORECASE)]
    return len(found) / len(words)


def rule_of(spec: Spec) -> Callable[[Answers], list[float]]:
    """The rule of one word of `--reward`, for a batch of responses.

    Raises:
        UserError: an argument that the rule can't use; later, from the rule: a row without the reference it needs.
    """
    match spec.kind:
        case "exact":
            _no_argument(spec)
            return lambda answers: _checked(spec, answers, exact_answer)
        case "numeric":
            tolerance = _number(spec, Decimal, 0, "0.01") if spec.argument else Decimal(0)
            return lambda answers: _checked(spec, answers, lambda a, b: numeric_answer(a, b, tolerance))
        case "regex":
            pattern = _pattern(spec)
            return lambda answers: [pattern_found(text, pattern) for text in answers.responses]
        case "length":
            target = _number(spec, int, 1, "200")
            return lambda answers: [length_target(len(ids), target) for ids in answers.response_ids]
        case "overlong":
            start, end = _range(spec)
            return lambda answers: [overlong(len(ids), start, end) for ids in answers.response_ids]
        case "repetition":
            n = _number(spec, int, 1, "3") if spec.argument else 3
            return lambda answers: [repetition(text, n) for text in answers.responses]
        case "keyword":
            words = [word.strip() for word in spec.argument.split(",") if word.strip()]
            if not words:
                raise spec.wrong("it names no word; write keyword:WORD or keyword:WORD,WORD")
            return lambda answers: [keywords(text, words) for text in answers.responses]
    raise ValueError(f"{spec.kind!r} is no rule")


def _checked(spec: Spec, answers: Answers, rule: Callable[[str, str], float]) -> list[float]:
    scores = []
    for i, (response, row) in enumerate(zip(answers.responses, answers.rows, strict=True)):
        try:
            if not row["reference"].strip():
                raise ValueError("the reference is empty")
            scores.append(rule(response, row["reference"]))
        except ValueError as error:
            why = f"{answers.place(i)} can't be checked ({error})"
            raise spec.wrong(f"{why}; give it a reference, or leave the row out") from None
    return scores


def _no_argument(spec: Spec) -> None:
    if spec.argument:
        raise spec.wrong(f"{spec.kind} takes no argument; write {spec.kind}")


def _number(spec: Spec, kind: type, least: int, example: str):
    try:
        value = kind(spec.argument)
        if value >= least:
            return value
    except (ValueError, ArithmeticError):
        pass
    raise spec.wrong(f"{spec.argument!r} is no number of {least} or more; write {spec.kind}:{example}")


def _range(spec: Spec) -> tuple[int, int]:
    try:
        start, end = (int(part) for part in spec.argument.split(":"))
        if 0 <= start < end:
            return start, end
    except ValueError:
        pass
    raise spec.wrong(f"{spec.argument!r} is no range of tokens; write overlong:FROM:TO, such as overlong:200:250")


def _pattern(spec: Spec) -> re.Pattern:
    if not spec.argument:
        raise spec.wrong("it has no pattern; write regex:PATTERN, such as regex:<answer>.*</answer>")
    try:
        return re.compile(spec.argument, flags=re.DOTALL)
    except re.error as error:
        raise spec.wrong(f"it is no regular expression of Python's ({error}); mend it") from None
