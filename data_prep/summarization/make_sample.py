"""Write `sample.jsonl`: 186 pairs of summaries in the schema of CarperAI/openai_summarize_comparisons.

A row is `{"prompt": "SUBREDDIT: r/…\\nTITLE: …\\nPOST: …", "chosen": "TL;DR: …", "rejected": "TL;DR: …"}`. All
text was written for this project. The chosen summary is faithful and says in one or two sentences what happened
and what the writer asks; the rejected one is weak in one of the ways of `WEAK_KINDS`. About one pair in ten is a
close call: two faithful summaries.

The bank, `bank/*.txt`, is a list of skeletons, each filled in `VARIANTS` times:

    @ r/…                       the forum
    $ slot: a | b | c           values of {slot}; the variants go through them in turn
    # title                     one is picked
    . sentence                  the post, in this order; [a|b] picks one of the wordings
    ? sentence                  the same, left out half of the time
    + summary                   a faithful summary
    ~ summary                   one that is too general
    - summary                   one about a side issue

To regenerate the sample:

    python data_prep/summarization/make_sample.py
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.files import atomic_write

FOLDER = Path(__file__).resolve().parent
SAMPLE = FOLDER / "sample.jsonl"
SEED = 7
VARIANTS = 6
CLOSE_SHARE = 0.1
WEAK_KINDS = ("wrong_detail", "general", "side_issue", "first_sentences", "unrelated")


@dataclass
class Skeleton:
    """One kind of post and its summaries, with slots still open."""

    forum: str
    slots: dict[str, list[str]] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=lambda: {mark: [] for mark in "#+~-"})
    post: list[tuple[str, bool]] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """One row of the sample; `kind` says how it was made and is not written to the file."""

    prompt: str
    chosen: str
    rejected: str
    kind: str

    def row(self) -> dict[str, str]:
        return {
            "prompt": self.prompt,
            "chosen": f"TL;DR: {self.chosen}",
            "rejected": f"TL;DR: {self.rejected}",
        }


def read_bank() -> list[Skeleton]:
    """All skeletons of `bank/*.txt` in the order of the files' names."""
    skeletons: list[Skeleton] = []
    for path in sorted((FOLDER / "bank").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            mark, _, rest = line.partition(" ")
            if mark == "@":
                skeletons.append(Skeleton(rest))
            elif mark == "$":
                name, _, values = rest.partition(": ")
                skeletons[-1].slots[name] = values.split(" | ")
            elif mark in (".", "?"):
                skeletons[-1].post.append((rest, mark == "?"))
            elif mark:
                skeletons[-1].lines[mark].append(rest)
    return skeletons


class Writer:
    """Fills skeletons; every choice comes from one seeded generator."""

    def __init__(self, skeletons: list[Skeleton], rng: random.Random) -> None:
        self.skeletons = skeletons
        self.rng = rng

    def fill(self, text: str, values: dict[str, str]) -> str:
        """`text` with its slots filled and its wordings picked, beginning with a capital."""
        text = re.sub(r"\[([^]]*)\]", lambda match: self.rng.choice(match[1].split("|")), text)
        text = re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text)
        text = re.sub(r"([.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)
        return text[0].upper() + text[1:]

    def all_values(self, skeleton: Skeleton) -> list[dict[str, str]]:
        """`VARIANTS` fillings of the slots, no two alike and each value used about equally often."""
        while True:
            columns = {}
            for name, values in skeleton.slots.items():
                column = [values[i % len(values)] for i in range(VARIANTS)]
                self.rng.shuffle(column)
                columns[name] = column
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            if len({tuple(row.values()) for row in rows}) == VARIANTS:
                return rows

    def wrong_detail(self, skeleton: Skeleton, summary: str, values: dict[str, str]) -> str:
        """The summary with one of its slots filled with another value."""
        name = self.rng.choice(sorted(set(re.findall(r"\{(\w+)\}", summary))))
        other = self.rng.choice([value for value in skeleton.slots[name] if value != values[name]])
        return self.fill(summary, {**values, name: other})

    def one_or_two(self, lines: list[str], values: dict[str, str]) -> str:
        """One of the lines, or two of them in random order."""
        return " ".join(self.fill(line, values) for line in self.rng.sample(lines, self.rng.choice([1, 2, 2])))

    def pair(self, kind: str, skeleton: Skeleton, values: dict[str, str]) -> Pair:
        """One filled-in post with a faithful summary and, unless `kind` is "close", a weak one."""
        title = self.fill(self.rng.choice(skeleton.lines["#"]), values)
        sentences = [
            self.fill(text, values) for text, optional in skeleton.post if not optional or self.rng.random() < 0.5
        ]
        prompt = f"SUBREDDIT: {skeleton.forum}\nTITLE: {title}\nPOST: {' '.join(sentences)}"
        first, second = self.rng.sample(skeleton.lines["+"], 2)
        chosen = self.fill(first, values)
        if kind == "close":
            rejected = self.fill(second, values)
        elif kind == "wrong_detail":
            rejected = self.wrong_detail(skeleton, self.rng.choice([first, second]), values)
        elif kind == "general":
            rejected = self.one_or_two(skeleton.lines["~"], values)
        elif kind == "side_issue":
            rejected = self.one_or_two(skeleton.lines["-"], values)
        elif kind == "first_sentences":
            rejected = " ".join(sentences[: self.rng.choice([1, 2, 3])])
        else:
            other = self.rng.choice([each for each in self.skeletons if each is not skeleton])
            filling = {name: self.rng.choice(options) for name, options in other.slots.items()}
            rejected = self.fill(self.rng.choice(other.lines["+"]), filling)
        return Pair(prompt, chosen, rejected, kind)


def build_pairs(seed: int = SEED) -> list[Pair]:
    """All pairs of the sample in their final order; no post appears twice."""
    rng = random.Random(seed)
    writer = Writer(read_bank(), rng)
    tasks = [(skeleton, values) for skeleton in writer.skeletons for values in writer.all_values(skeleton)]
    kinds = ["close"] * round(CLOSE_SHARE * len(tasks))
    kinds += [WEAK_KINDS[i % len(WEAK_KINDS)] for i in range(len(tasks) - len(kinds))]
    rng.shuffle(kinds)
    pairs = [writer.pair(kind, *task) for kind, task in zip(kinds, tasks, strict=True)]
    rng.shuffle(pairs)
    return pairs


def render(pairs: list[Pair]) -> str:
    """The JSON lines of the sample."""
    return "".join(json.dumps(pair.row(), ensure_ascii=False) + "\n" for pair in pairs)


def main() -> None:
    """Write the sample beside this script."""
    pairs = build_pairs()
    with atomic_write(SAMPLE) as temporary:
        temporary.write_text(render(pairs), encoding="utf-8")
    print(f"{len(pairs)} pairs written to {SAMPLE.name}")


if __name__ == "__main__":
    main()
