"""The two shipped samples: made by their scripts bit for bit, in the hub's schemas, varied and balanced."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

DATA_PREP = Path(__file__).resolve().parent.parent / "data_prep"
TURN = "\n\nAssistant:"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The `make_sample.py` of one dataset as a module, found as if it had been run as a script."""
    monkeypatch.syspath_prepend(str(DATA_PREP / name))
    spec = importlib.util.spec_from_file_location(f"make_{name}_sample", DATA_PREP / name / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dialogue(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("helpful_harmless", monkeypatch)


@pytest.fixture
def summaries(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("summarization", monkeypatch)


def rows_of(name: str) -> list[dict[str, str]]:
    text = (DATA_PREP / name / "sample.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def split_dialogue(row: dict[str, str]) -> tuple[str, str, str]:
    """Prompt up to and with the last "Assistant:", chosen and rejected response with their leading space."""
    prompts = {text[: text.rindex(TURN) + len(TURN)] for text in row.values()}
    assert len(prompts) == 1, row
    prompt = prompts.pop()
    return prompt, row["chosen"][len(prompt) :], row["rejected"][len(prompt) :]


def share_longer(pairs: list[tuple[str, str]]) -> float:
    """How often the chosen text is the longer one; a tie counts half."""
    return sum((len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("name", ["helpful_harmless", "summarization"])
def test_regeneration_is_identical(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script gives the shipped file byte for byte, twice in a row, and another file for another seed."""
    script = load(name, monkeypatch)
    shipped = (DATA_PREP / name / "sample.jsonl").read_bytes()
    assert script.render(script.build_pairs()).encode() == shipped
    assert script.render(script.build_pairs()).encode() == shipped
    assert script.render(script.build_pairs(seed=script.SEED + 1)).encode() != shipped


@pytest.mark.parametrize("name", ["helpful_harmless", "summarization"])
def test_main_writes_the_sample(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    script = load(name, monkeypatch)
    monkeypatch.setattr(script, "SAMPLE", tmp_path / "sample.jsonl")
    script.main()
    assert (tmp_path / "sample.jsonl").read_bytes() == (DATA_PREP / name / "sample.jsonl").read_bytes()
    assert "pairs written to sample.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "keys"),
    [("helpful_harmless", ["chosen", "rejected"]), ("summarization", ["prompt", "chosen", "rejected"])],
)
def test_every_text_is_clean(name: str, keys: list[str]) -> None:
    """The hub's keys in its order; no empty text, open slot, double space, stray blank or odd character."""
    for row in rows_of(name):
        assert list(row) == keys
        for text in row.values():
            assert text == text.rstrip()
            assert not re.search(r"  |[{}|\t\r]| [.,!?](\s|$)|\.\.|\n \n|\n\n\n", text), text
            assert text.isascii(), text
            bodies = re.split(r"\n\n(?:Human|Assistant):|TL;DR:|(?:^|\n)(?:SUBREDDIT|TITLE|POST):", text)
            assert all(body.strip() for body in bodies[1:]), text


def test_dialogue_schema_and_counts() -> None:
    """800 distinct prompts; turns alternate from the human to the assistant; responses begin with one space."""
    rows = rows_of("helpful_harmless")
    assert len(rows) == 800
    prompts = Counter()
    for row in rows:
        prompt, chosen, rejected = split_dialogue(row)
        prompts[prompt] += 1
        speakers = re.findall(r"\n\n(Human|Assistant):", prompt)
        assert speakers == ["Human", "Assistant"] * (len(speakers) // 2)
        assert "\n" not in chosen + rejected
        assert all(re.match(r" \S", text) for text in (chosen, rejected))
        assert chosen != rejected
    assert max(prompts.values()) == 1


def test_dialogue_lengths() -> None:
    """Short enough for a laptop, and length alone does not give the preference away."""
    pairs = [split_dialogue(row) for row in rows_of("helpful_harmless")]
    assert max(len(prompt.split()) for prompt, _, _ in pairs) <= 75
    for _, chosen, rejected in pairs:
        assert 4 <= len(chosen.split()) <= 44
        assert 4 <= len(rejected.split()) <= 44
    assert 0.5 <= share_longer([(chosen, rejected) for _, chosen, rejected in pairs]) <= 0.65


def test_dialogue_turns() -> None:
    """About a quarter of the dialogues have two or three human turns, and both occur."""
    turns = Counter(split_dialogue(row)[0].count("\n\nHuman:") for row in rows_of("helpful_harmless"))
    assert set(turns) == {1, 2, 3}
    assert 0.2 <= (turns[2] + turns[3]) / 800 <= 0.3
    assert turns[3] >= 20


def test_dialogue_kinds(dialogue: ModuleType) -> None:
    """A ninth to a seventh are close calls or flipped labels; the kinds of weak answers are mixed evenly."""
    pairs = dialogue.build_pairs()
    kinds = Counter(pair.kind for pair in pairs)
    noise = kinds["close"] + sum(count for kind, count in kinds.items() if kind.startswith("flipped"))
    assert 1 / 9 <= noise / len(pairs) <= 1 / 7
    weak = [kinds[kind] for kind in dialogue.WEAK_KINDS]
    assert max(weak) - min(weak) <= 1
    unsafe = sum(kinds[kind] for kind in set(dialogue.UNSAFE_KINDS))
    assert 0.12 <= unsafe / len(pairs) <= 0.17


def test_dialogue_flipped_labels_are_swapped(dialogue: ModuleType) -> None:
    """In a flipped pair of the kind "curt" the chosen answer is the curt one."""
    curt = [line for number in "123" for line in dialogue.read_phrases()[f"curt_{number}"]]
    fixed = tuple(line.split("{")[0] for line in curt)
    by_kind = {kind: [p for p in dialogue.build_pairs() if p.kind == kind] for kind in ("curt", "flipped_curt")}
    assert all(pair.rejected.startswith(fixed) for pair in by_kind["curt"])
    assert all(pair.chosen.startswith(fixed) for pair in by_kind["flipped_curt"])
    assert all(by_kind.values())


def test_dialogue_bank(dialogue: ModuleType) -> None:
    """At least 150 topics in at least 18 areas, each complete, no question twice."""
    topics = dialogue.read_bank()
    helpful = [topic for topic in topics if topic.area != "unsafe"]
    assert len(helpful) >= 150
    assert len({topic.area for topic in helpful}) >= 18
    assert len({topic.name for topic in topics}) == len(topics)
    for topic in helpful:
        assert len(topic.questions) >= 3
        assert len(topic.points) >= 3
        assert len(topic.follow_ups) == 2
        assert len({point.is_statement for point in topic.points}) == 1
    for topic in topics:
        if topic.area == "unsafe":
            assert topic.refusal
            assert topic.careless
            assert len(topic.points) >= 2
        assert all(question.lead is None or question.lead < len(topic.points) for question in topic.questions)
    asked = [question.text for topic in topics for question in topic.questions]
    assert len(set(asked)) == len(asked)


def test_summaries_schema_and_counts() -> None:
    """At least 150 distinct posts of 60 to 160 words; both summaries begin with the marker and one space."""
    rows = rows_of("summarization")
    assert len(rows) >= 150
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        parts = re.fullmatch(r"SUBREDDIT: r/\w+\nTITLE: (\S.*)\nPOST: (\S.*)", row["prompt"])
        assert parts, row["prompt"]
        assert 60 <= len(parts[2].split()) <= 160
        for key in ("chosen", "rejected"):
            assert re.fullmatch(r"TL;DR: \S.*[.?!]", row[key]), row[key]
            assert 5 <= len(row[key].split()) - 1 <= 70
        assert row["chosen"] != row["rejected"]
    assert len({row["prompt"].split("\n")[0] for row in rows}) >= 15


def test_summaries_kinds(summaries: ModuleType) -> None:
    """A tenth are close calls; the rest is dealt evenly; a copy is one, and a wrong detail is not the truth."""
    pairs = summaries.build_pairs()
    kinds = Counter(pair.kind for pair in pairs)
    assert 0.08 <= kinds["close"] / len(pairs) <= 0.12
    weak = [kinds[kind] for kind in summaries.WEAK_KINDS]
    assert max(weak) - min(weak) <= 1
    for pair in pairs:
        assert (pair.rejected in pair.prompt) == (pair.kind == "first_sentences"), pair
    assert share_longer([(pair.chosen, pair.rejected) for pair in pairs]) <= 0.8
