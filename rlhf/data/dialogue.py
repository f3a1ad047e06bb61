"""Dialogues in Human/Assistant turns, and posts with summaries: the two kinds of text of the published data sets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf.data.rows import Response, Row, UnusableRowError, first_fit, refuse_equal, staged, text_of

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
SUMMARY = "TL;DR:"


@dataclass(frozen=True)
class DialogueParser:
    """Rows of Anthropic/hh-rlhf: whole dialogues `chosen` and `rejected` that share all turns but the last.

    The prompt is everything up to and including the last "\\n\\nAssistant:", which ends without a space; the
    response starts with one (PPO detail A6).
    """

    stage: str
    remove_same_responses: bool = True

    def __call__(self, record: Any) -> Row:
        prompt, chosen = split_dialogue(text_of(record, "chosen"), "chosen")
        rejected = None
        if self.stage in ("preference", "feedback"):
            other_prompt, rejected = split_dialogue(text_of(record, "rejected"), "rejected")
            if other_prompt != prompt:
                raise UnusableRowError(
                    "prompts differ", "let chosen and rejected share every turn but the last", bad=False
                )
            refuse_equal(chosen, rejected, self.remove_same_responses)
        return staged(
            self.stage,
            "dialogue",
            prompt,
            chosen=Response.of(chosen),
            rejected=None if rejected is None else Response.of(rejected),
            reference=chosen,
            shorten=lambda fits: drop_first_turns(prompt, fits),
        )


@dataclass(frozen=True)
class SummaryParser:
    """Rows of CarperAI/openai_summarize_*: a post as `prompt`, and `chosen`/`rejected` or `label` as its summaries.

    One set ends its prompts with "TL;DR:", the other starts its summaries with it; here the prompt always does. A
    prompt over the limit is cut at the last line break of the post that fits, and keeps its tail (PPO detail A5).
    """

    stage: str
    remove_same_responses: bool = True

    def __call__(self, record: Any) -> Row:
        post = text_of(record, "prompt").rstrip().removesuffix(SUMMARY).rstrip()
        if not post:
            raise UnusableRowError("'prompt' is empty", "give the post to summarise")
        if self.stage in ("preference", "feedback"):
            chosen, rejected = summary_of(record, "chosen"), summary_of(record, "rejected")
            refuse_equal(chosen, rejected, self.remove_same_responses)
        else:
            with_label = isinstance(record, dict) and "label" in record
            chosen, rejected = summary_of(record, "label" if with_label else "chosen"), None
        return staged(
            self.stage,
            "summary",
            f"{post}\n{SUMMARY}",
            chosen=Response.of(chosen),
            rejected=None if rejected is None else Response.of(rejected),
            reference=chosen,
            shorten=lambda fits: cut_post(post, fits),
            always_shorten=True,
        )


def split_dialogue(text: str, key: str) -> tuple[str, str]:
    """A dialogue cut before its last response: `(prompt, response)`.

    >>> split_dialogue("\\n\\nHuman: Hi\\n\\nAssistant: Hello.", "chosen")
    ('\\n\\nHuman: Hi\\n\\nAssistant:', ' Hello.')
    """
    text = "\n\n" + text.lstrip()
    if not text.startswith(HUMAN):
        raise UnusableRowError(f"{key!r} does not start with a Human turn", 'start it with "\\n\\nHuman: "')
    turns, found, response = text.rpartition(ASSISTANT)
    if not found:
        raise UnusableRowError(f"{key!r} has no Assistant turn", 'add the response after "\\n\\nAssistant:"')
    if HUMAN in response:
        raise UnusableRowError(f"{key!r} ends with a Human turn", "end it with an Assistant turn")
    if not response.strip():
        raise UnusableRowError(f"the response of {key!r} is empty", "give a text, or leave the row out")
    return turns + ASSISTANT, " " + response.strip()


def summary_of(record: Any, key: str) -> str:
    """The summary under `key`, with one leading space and without a "TL;DR:" of its own."""
    summary = text_of(record, key).strip().removeprefix(SUMMARY).strip()
    if not summary:
        raise UnusableRowError(f"{key!r} is empty", "give a summary, or leave the row out")
    return " " + summary


def drop_first_turns(prompt: str, fits: Callable[[str], bool]) -> str | None:
    """The longest end of a dialogue that starts at a Human turn and fits, or None."""
    starts = [match.start() for match in re.finditer(re.escape(HUMAN), prompt)][1:]
    return first_fit(starts, lambda start: prompt[start:], fits)


def cut_post(post: str, fits: Callable[[str], bool]) -> str | None:
    """The longest beginning of `post` that fits with the tail "\\nTL;DR:", or None.

    Cut at a line break where one lies after "POST:" and fits, else at a space, else anywhere.
    """
    start = post.find("POST:") + len("POST:") if "POST:" in post else 0
    for border in ("\n", " ", ""):
        ends = [match.start() for match in re.finditer(re.escape(border), post) if match.start() > start]
        kept = first_fit(ends[::-1], lambda end: f"{post[:end].rstrip()}\n{SUMMARY}", fits)
        if kept is not None:
            return kept
    return None
