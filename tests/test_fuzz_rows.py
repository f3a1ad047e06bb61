"""Rows, files, transcripts and templates made up by hypothesis: each is used, or counted with its place and remedy."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.custom import CustomParser
from rlhf.data.dialogue import ASSISTANT, HUMAN, DialogueParser, SummaryParser, split_dialogue
from rlhf.data.encode import Encoded, Limits, RowEncoder
from rlhf.data.packed import STAGES
from rlhf.data.prepare_flags import FormatFlags
from rlhf.data.rows import UnusableRowError
from rlhf.data.sources import Chunk, Entry, open_sources
from rlhf.errors import UserError
from tests.fuzz import ANY_TEXT, JSON, WORDS, attempt, damaged, fuzz
from tests.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer(bos=True, pad_is_eos=True)
TURNS = [{"role": "user", "content": "Snails?"}, {"role": "assistant", "content": "By hand."}]
GOOD = {
    "dialogue": [{"chosen": f"{HUMAN} a{ASSISTANT} b", "rejected": f"{HUMAN} a{ASSISTANT} c"}],
    "summary": [
        {"prompt": "POST: one\ntwo\nTL;DR:", "label": "three"},
        {"prompt": "POST: one", "chosen": "TL;DR: two", "rejected": "three"},
    ],
    "custom": [
        {"instruction": "Say it", "input": "twice", "response": "it it"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "reference": "7"},
        "a bare prompt",
        {"messages": TURNS},
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "Salt."}]},
        {"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:]), "label": "false"},
        {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "Salt."}]},
    ],
}


def encoder_of(kind: str, stage: str, *, truncate: bool, chat: bool = False, template: str = "{prompt}") -> RowEncoder:
    """What turns rows of a data set into ids."""
    if kind == "custom":
        parse = CustomParser(stage, TOKENIZER, apply_chat_template=chat, prompt_template=template)
    else:
        parse = (DialogueParser if kind == "dialogue" else SummaryParser)(stage)
    return RowEncoder(stage, TOKENIZER, parse, Limits(40, 24, None, truncate), seed=0)


def check_accounted(encoded: Encoded, entries: list[Entry], stage: str) -> None:
    """C40: every row is kept, or dropped for a reason, or reported as file:line, reason and fix."""
    assert len(encoded.skipped) <= len(entries)
    for row in encoded.skipped:
        assert row["file"] == "rows.jsonl"
        assert row["line"] in {entry.line for entry in entries}
        assert row["reason"].strip()
        assert row["fix"].strip()
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    if stage != "feedback":
        assert len(encoded.rows) + sum(map(len, encoded.dropped.values())) == len(entries)
    assert len(encoded.rows) == len(encoded.key) == len(encoded.source_row)


@pytest.mark.parametrize("kind", GOOD)
@fuzz(120)
@given(data=st.data())
def test_any_value_in_any_place_of_a_row(kind, data):
    """Each parser, each stage, all the way to the ids."""
    stage = data.draw(st.sampled_from(STAGES))
    options = {"truncate": data.draw(st.booleans()), "chat": kind == "custom" and data.draw(st.booleans())}
    rows = data.draw(st.lists(damaged(GOOD[kind]), min_size=1, max_size=3))
    entries = []
    for line, row in enumerate(rows, start=1):
        as_line = data.draw(st.booleans())
        entries.append(Entry(line, json.dumps(row).encode() if as_line else row))
    encoded = encoder_of(kind, stage, **options)(Chunk("rows.jsonl", tuple(entries), 1), 0)
    check_accounted(encoded, entries, stage)


@fuzz(80)
@given(lines=st.lists(st.binary(max_size=30) | JSON.map(lambda v: json.dumps(v).encode()), min_size=1, max_size=4))
def test_any_bytes_as_a_line(lines):
    entries = [Entry(i, line) for i, line in enumerate(lines, start=1)]
    for stage in ("finetune", "prompts"):
        encoded = encoder_of("custom", stage, truncate=True)(Chunk("rows.jsonl", tuple(entries), 1), 0)
        check_accounted(encoded, entries, stage)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Bytes of a file: anything, or a good one that was cut, spliced or overwritten."""
    rows = draw(st.lists(damaged(GOOD["custom"]), max_size=3))
    good = draw(
        st.sampled_from(
            [
                json.dumps(rows).encode(),
                "\n".join(map(json.dumps, rows)).encode(),
                b'prompt,chosen,rejected\n"a","b ""c""",d\n,,\n',
            ]
        )
    )
    at, end = (draw(st.integers(0, len(good))) for _ in range(2))
    return draw(st.sampled_from([good, good[:at], good[:at] + draw(st.binary(max_size=9)) + good[end:]]))


@fuzz(60)
@given(
    content=files() | st.binary(max_size=60), suffix=st.sampled_from(["json", "jsonl", "csv", "jsonl.gz", "parquet"])
)
def test_any_file(tmp_path_factory, content, suffix):
    """The reader ends; what it can't read is an entry with its line, or one sentence."""
    path = tmp_path_factory.getbasetemp() / f"rows.{suffix}"
    path.write_bytes(content)
    encoder = encoder_of("custom", "prompts", truncate=True)
    try:
        chunks = list(open_sources(str(path), "")["train"].chunks())
    except UserError:
        assert suffix == "parquet"
        return
    for chunk in chunks:
        entries = [Entry(entry.line, entry.content) for entry in chunk.entries]
        check_accounted(encoder(Chunk("rows.jsonl", chunk.entries, 0), 0), entries, "prompts")


TRANSCRIPTS = st.lists(
    st.sampled_from([HUMAN, ASSISTANT, "\n\nHuman", "\nAssistant:", "\n", " ", "yes", "\0", "\ud800"]) | ANY_TEXT,
    max_size=9,
).map("".join)


@fuzz(200)
@given(text=TRANSCRIPTS)
def test_any_transcript(text):
    """The prompt ends where an assistant's turn begins, the response says something, and no word is lost."""
    found, why = attempt(lambda: split_dialogue(text, "chosen"), UnusableRowError)
    if why is not None:
        assert why.bad
        return
    prompt, response = found
    assert prompt.startswith(HUMAN)
    assert prompt.endswith(ASSISTANT)
    assert response.strip()
    assert (prompt + response).split() == text.split() or HUMAN.strip() in text


@fuzz(120)
@given(
    template=st.lists(WORDS | st.sampled_from(["{prompt}", "{", "}", "\\n", "%s", "{0}"]) | ANY_TEXT, max_size=5).map(
        "".join
    ),
    prompt=st.sampled_from(["{prompt}", "a {b} %s", "\\n"]) | ANY_TEXT,
)
def test_any_template(template, prompt):
    """Refused, or with the prompt in it as it stands."""
    try:
        written = FormatFlags(prompt_template=template).template
    except UserError:
        return
    entries = [Entry(1, {"prompt": prompt})]
    encoder = encoder_of("custom", "prompts", truncate=True, template=written)
    check_accounted(encoder(Chunk("rows.jsonl", tuple(entries), 0), 0), entries, "prompts")
    if prompt.strip() and "\0" not in template:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            return
        assert prompt in CustomParser("prompts", TOKENIZER, prompt_template=written)({"prompt": prompt}).prompt
