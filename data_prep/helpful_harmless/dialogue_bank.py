"""The bank of texts that `make_sample.py` composes the dialogue sample from.

`bank/*.txt` is a list of topics:

    @ area | mood | name        mood: goal, care, curious, feel, or alone (an answer uses one point only)
    ?2 question                 a neutral question; the digit, if any, names the point that an answer leads with
    !2 question                 the same, where something has gone wrong
    - advice ; reason           a point: an imperative in lower case and an independent clause
    * Statement ; detail        a point: a statement; without a digit, answers lead with the first
    > question ; point ; reason a follow-up question and its answer
    = refusal ; reason          only in area `unsafe`: what the assistant won't do ("I can't …, because …")
    ~ careless answer           only in area `unsafe`: what a careless assistant says

`bank/phrases.txt` holds openings, closings and the wording of weak answers, by section; a line may name the
topic as {name}, or {Name} at the start of a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

BANK = Path(__file__).resolve().parent / "bank"


@dataclass(frozen=True)
class Point:
    """One piece of advice (lower-case imperative) or one statement (capitalised), with its reason."""

    text: str
    reason: str

    @property
    def is_statement(self) -> bool:
        return self.text[0].isupper()


@dataclass(frozen=True)
class Question:
    """A question; `trouble` if something has gone wrong; `lead` is the index of the point to begin with."""

    text: str
    trouble: bool
    lead: int | None


@dataclass
class Topic:
    """What the bank knows about one topic."""

    area: str
    mood: str
    name: str
    questions: list[Question] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    follow_ups: list[tuple[str, Point]] = field(default_factory=list)
    refusal: Point | None = None
    careless: str = ""


def read_bank() -> list[Topic]:
    """All topics of `bank/*.txt` in the order of the files' names."""
    topics: list[Topic] = []
    for path in sorted(BANK.glob("*.txt")):
        if path.name == "phrases.txt":
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            mark, _, rest = line.partition(" ")
            if mark == "@":
                topics.append(Topic(*rest.split(" | ")))
            elif mark[:1] in ("?", "!"):
                lead = int(mark[1:]) - 1 if mark[1:] else None
                topics[-1].questions.append(Question(rest, mark[0] == "!", lead))
            elif mark in ("-", "*"):
                topics[-1].points.append(Point(*rest.split(" ; ")))
            elif mark == ">":
                question, text, reason = rest.split(" ; ")
                topics[-1].follow_ups.append((question, Point(text, reason)))
            elif mark == "=":
                topics[-1].refusal = Point(*rest.split(" ; "))
            elif mark == "~":
                topics[-1].careless = rest
    return topics


def read_phrases() -> dict[str, list[str]]:
    """The sections of `bank/phrases.txt`, each a list of lines."""
    sections: dict[str, list[str]] = {}
    for line in (BANK / "phrases.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            current.append(line)
    return sections


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[0].upper() + text[1:]


def sentence(text: str) -> str:
    """`text` as a sentence: a capital at the start, a full stop at the end where no mark stands there."""
    return capital(text) + ("" if text[-1] in ".!?" else ".")
