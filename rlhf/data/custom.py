"""The user's own rows: instructions, pairs, labelled completions, bare prompts and conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.chat import ChatTemplate, Message, shared_turns
from rlhf.data.dialogue import ASSISTANT, HUMAN, DialogueParser
from rlhf.data.rows import Response, Row, UnusableRowError, checked_text, refuse_equal, staged, text_of
from rlhf.errors import UserError

FORMS = (
    "{instruction, response}, {prompt, chosen, rejected}, {prompt, completion, label}, {prompt}, a bare prompt "
    "string, {messages}, or prompt/chosen/rejected/completion as lists of messages"
)


class CustomParser:
    """Tells the forms apart row by row, by their keys, and makes the row of `stage` of each.

    `prompt_template` wraps plain prompts ("{prompt}" is the text); instructions become one Human/Assistant
    exchange; message lists, and with `apply_chat_template` plain texts too, go through the chat template.

    Raises:
        UserError: `apply_chat_template` with a tokenizer that has none.
    """

    def __init__(
        self,
        stage: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        remove_same_responses: bool = True,
        prompt_template: str = "{prompt}",
        apply_chat_template: bool = False,
        every_turn: bool = True,
    ) -> None:
        self.stage = stage
        self.remove_same_responses = remove_same_responses
        self.prompt_template = prompt_template
        self.apply_chat_template = apply_chat_template
        self.every_turn = every_turn
        if apply_chat_template and not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which --apply_chat_template needs; "
                "take the tokenizer of an instruct model"
            )
        self.chat = ChatTemplate(tokenizer)

    def __call__(self, record: Any) -> Row:
        if isinstance(record, str):
            record = {"prompt": record}
        if not isinstance(record, Mapping):
            raise UnusableRowError("the row is neither an object nor a prompt string", f"write {FORMS}")
        row = self._row(record)
        if self.stage == "prompts" and record.get("reference") is not None:
            reference = checked_text(record["reference"], "reference", may_be_empty=True)
            row = dataclasses.replace(row, reference=reference)
        return row

    def _row(self, record: Mapping) -> Row:
        if "messages" in record:
            return self._conversation(self._messages(record["messages"], "messages"))
        if "instruction" in record:
            return self._instruction(record)
        if "prompt" in record:
            if "response" in record and "completion" not in record:
                record = {**record, "completion": record["response"]}
            lists = any(_is_messages(record.get(key)) for key in ("prompt", "chosen", "rejected", "completion"))
            return self._chat(record) if lists or self.apply_chat_template else self._plain(record)
        if "chosen" in record:
            if isinstance(record["chosen"], str) and not _is_messages(record["chosen"]):
                return DialogueParser(self.stage, self.remove_same_responses)(record)
            return self._chat(record)
        raise UnusableRowError(f"unknown keys {sorted(map(str, record))}", f"write {FORMS}")

    def _instruction(self, record: Mapping) -> Row:
        instruction = text_of(record, "instruction").strip()
        if record.get("input"):
            instruction += "\n\n" + text_of(record, "input").strip()
        if self.stage == "prompts" and "response" not in record:
            if self.apply_chat_template:
                return self._chat({"prompt": instruction})
            return Row("dialogue", f"{HUMAN} {instruction}{ASSISTANT}")
        response = text_of(record, "response").strip()
        if self.apply_chat_template:
            return self._chat({"prompt": instruction, "completion": response})
        prompt = f"{HUMAN} {instruction}{ASSISTANT}"
        return staged(self.stage, "dialogue", prompt, chosen=Response.of(" " + response), reference=" " + response)

    def _plain(self, record: Mapping) -> Row:
        prompt = self.prompt_template.replace("{prompt}", text_of(record, "prompt"))
        if "chosen" in record:
            chosen, rejected = text_of(record, "chosen"), None
            if self.stage in ("preference", "feedback"):
                rejected = text_of(record, "rejected")
                refuse_equal(chosen, rejected, self.remove_same_responses)
            other = None if rejected is None else Response.of(rejected)
            return staged(self.stage, "plain", prompt, chosen=Response.of(chosen), rejected=other, reference=chosen)
        if "completion" in record or self.stage == "feedback":
            completion = text_of(record, "completion")
            return self._labelled(record, "plain", prompt, Response.of(completion), completion)
        return self._bare("plain", prompt)

    def _chat(self, record: Mapping) -> Row:
        prompt = self._messages(record["prompt"], "prompt", role="user") if "prompt" in record else []
        if "chosen" in record:
            chosen = [*prompt, *self._messages(record["chosen"], "chosen", role="assistant")]
            if self.stage not in ("preference", "feedback"):
                return self._conversation(chosen, every_turn=False)
            if "rejected" not in record:
                text_of(record, "rejected")
            rejected = [*prompt, *self._messages(record["rejected"], "rejected", role="assistant")]
            shared, good, worse = shared_turns(chosen, rejected)
            if self.remove_same_responses:
                refuse_equal(good["content"], worse["content"], True)
            text, response = self.chat.exchange([*shared, good])
            other_text, other = self.chat.exchange([*shared, worse])
            if text != other_text:
                raise UnusableRowError("prompts differ", "check the chat template", bad=False)
            return staged(self.stage, "chat_template", text, chosen=response, rejected=other, reference=good["content"])
        if "completion" in record or self.stage == "feedback":
            if "completion" not in record:
                text_of(record, "completion")
            turns = [*prompt, *self._messages(record["completion"], "completion", role="assistant")]
            text, response = self.chat.exchange(turns)
            return self._labelled(record, "chat_template", text, response, turns[-1]["content"])
        if self.stage == "finetune":
            return self._conversation(prompt)
        if prompt[-1]["role"] == "assistant":
            return self._conversation(prompt)
        return self._bare("chat_template", self.chat.render(prompt, generation_prompt=True))

    def _conversation(self, messages: list[Message], *, every_turn: bool = True) -> Row:
        """A conversation: for finetune every assistant's turn, or the last; for prompts all before the last."""
        if self.stage == "prompts" and messages[-1]["role"] != "assistant":
            return Row("chat_template", self.chat.render(messages, generation_prompt=True))
        while messages and messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        if not messages:
            raise UnusableRowError("no assistant turn", "add one, or prepare --stage=prompts")
        every_turn = every_turn and self.every_turn and self.stage == "finetune"
        prompt, response = self.chat.exchange(messages, every_turn=every_turn)
        reference = messages[-1]["content"]
        return staged(self.stage, "chat_template", prompt, chosen=response, reference=reference)

    def _labelled(self, record: Mapping, kind: str, prompt: str, response: Response, reference: str) -> Row:
        good = True if "label" not in record and self.stage != "feedback" else _label(record)
        if self.stage == "feedback":
            return Row(kind, prompt, (response,), (good,))
        if self.stage == "finetune" and not good:
            raise UnusableRowError("label is False: nothing to imitate", "prepare --stage=feedback", bad=False)
        return staged(self.stage, kind, prompt, chosen=response, reference=reference if good else "")

    def _bare(self, kind: str, prompt: str) -> Row:
        if self.stage != "prompts":
            raise UnusableRowError(
                f"a bare prompt, and --stage={self.stage} needs a response", f"write {FORMS}, or --stage=prompts"
            )
        return Row(kind, prompt)

    def _messages(self, value: Any, name: str, *, role: str | None = None) -> list[Message]:
        """A list of messages; with `role`, a plain text stands for one message of that role."""
        if role is not None and isinstance(value, str) and not _is_messages(value):
            value = [{"role": role, "content": checked_text(value, name)}]
        if value is None:
            checked_text(value, name)
        return self.chat.messages(value, name)


def _is_messages(value: Any) -> bool:
    """Whether `value` is a list of messages, or the JSON of one in a CSV cell."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith('[{"'))


def _label(record: Mapping) -> bool:
    if "label" not in record:
        raise UnusableRowError("missing key 'label'", "add true (good) or false")
    values = {"true": True, "1": True, "false": False, "0": False}
    value = values.get(str(record["label"]).strip().lower()) if not isinstance(record["label"], float) else None
    if value is None:
        raise UnusableRowError(f"'label' is {record['label']!r}", "write true (good) or false")
    return value
