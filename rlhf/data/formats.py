"""How prompts are written as text: recorded with the data, so that whatever talks to the model writes them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.chat import ChatTemplate
from rlhf.data.dialogue import ASSISTANT, HUMAN, SUMMARY
from rlhf.data.rows import UnusableRowError
from rlhf.data.text import template_fingerprint
from rlhf.errors import UserError


def format_of(kind: str, tokenizer: PreTrainedTokenizerBase, prompt_template: str = "{prompt}") -> dict[str, Any]:
    """The `format` entry of `args.json`: `kind`, what it takes to render a prompt, and the texts to stop at."""
    if kind == "dialogue":
        return {"kind": kind, "user": HUMAN + " ", "assistant": ASSISTANT, "stop": [HUMAN]}
    if kind == "summary":
        template = "SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\n" + SUMMARY
        return {"kind": kind, "template": template, "stop": []}
    if kind == "chat_template":
        end = ChatTemplate(tokenizer).end_of_turn()
        return {
            "kind": kind,
            "template_fingerprint": template_fingerprint(tokenizer),
            "stop": [] if end is None else [end],
        }
    return {"kind": "plain", "template": prompt_template, "stop": []}


def render_prompt(
    format: Mapping[str, Any],
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    **fields: str,
) -> str:
    """The prompt, as the data has it, that asks for the assistant's next turn after `messages`.

    `messages` are `{"role": "user" | "assistant" | "system", "content": text}`. A summary takes the last one as the
    post, with `title` and `subreddit` in `fields`; plain text takes the last one as it is.

    >>> turns = [{"role": "user", "content": "Hi"}]
    >>> render_prompt({"kind": "dialogue", "user": "\\n\\nHuman: ", "assistant": "\\n\\nAssistant:"}, turns)
    '\\n\\nHuman: Hi\\n\\nAssistant:'

    Raises:
        UserError: the chat template refuses the conversation.
    """
    kind, last = format["kind"], messages[-1]["content"]
    if kind == "dialogue":
        text = ""
        for message in messages:
            is_assistant = message["role"] == "assistant"
            opening = format["assistant"] + " " if is_assistant else format["user"]
            text += opening + message["content"].strip()
        return text + format["assistant"]
    if kind == "summary":
        text = format["template"]
        for name, value in {"title": "", "subreddit": "", **fields, "post": last}.items():
            text = text.replace("{" + name + "}", value.strip())
        return text
    if kind == "chat_template":
        if tokenizer is None:
            raise ValueError("a chat template needs its tokenizer")
        try:
            return ChatTemplate(tokenizer).render(messages, generation_prompt=True)
        except UnusableRowError as error:
            raise UserError(str(error)) from error
    return format.get("template", "{prompt}").replace("{prompt}", last)
