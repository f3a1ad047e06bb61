"""Conversations through the tokenizer's chat template, with masks from the structure of the messages.

No marker is searched for in the text: a turn is what the template adds when its message is added. So every prefix
of a conversation must render to a prefix of the whole, which is checked.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Response, UnusableRowError, checked_text
from rlhf.data.text import special_strings
from rlhf.errors import UserError

Message = Mapping[str, Any]

LONGEST_RENDERING = 10.0
"""Seconds that a template may take for one conversation; usual ones take less than a thousandth."""


class ChatTemplate:
    """One tokenizer's template, and the control tokens that it may write and a message may not."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        strings = sorted(special_strings(tokenizer), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, strings)) or r"(?!)")

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The text of `messages`, and with `generation_prompt` of the start of the assistant's next turn.

        Templates run in jinja's sandbox, which lets them see no attribute that leads out of it.

        Raises:
            UnusableRowError: the template refuses the conversation, or fails on it.
            UserError: it takes longer than `LONGEST_RENDERING` (watched in the main thread of a process).
        """
        try:
            with _at_most(LONGEST_RENDERING):
                return self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=generation_prompt
                )
        except _LateError:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path!r} takes longer than {LONGEST_RENDERING:g} seconds "
                f"for one conversation; take another tokenizer, or mend its chat_template"
            ) from None
        except Exception as error:  # a template is a program: it may raise anything
            raise UnusableRowError(
                f"the chat template refuses the conversation ({error})", "follow the roles that the template wants"
            ) from error

    def messages(self, value: Any, name: str) -> list[Message]:
        """`value` checked as a list of messages; a CSV cell may hold it as JSON."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise UnusableRowError(f"{name!r} is no list of messages", "write it as JSON") from None
        if not isinstance(value, list) or not value:
            raise UnusableRowError(f"{name!r} is no list of messages", 'write [{"role": ..., "content": ...}]')
        for message in value:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UnusableRowError(f"a message of {name!r} has no role", 'write {"role": "user", "content": "..."}')
            content = checked_text(message.get("content"), "content", may_be_empty=message["role"] == "system")
            if found := self.special.search(content):
                raise UnusableRowError(
                    f"a message holds the control token {found[0]!r}", "remove it; the template writes it"
                )
        return value

    def exchange(self, messages: Sequence[Message], *, every_turn: bool = False) -> tuple[str, Response]:
        """The prompt of a conversation that ends with an assistant's turn, and its response.

        With `every_turn` the response starts at the first assistant's turn, and all of them are learnt: the piece
        of each is its content with the token that ends the turn. Else only the last one is.
        """
        learnt = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not learnt or learnt[-1] != len(messages) - 1:
            raise UnusableRowError("no assistant turn at the end", "end the conversation with the assistant's turn")
        learnt = learnt if every_turn else learnt[-1:]
        if learnt[0] == 0:
            raise UnusableRowError("nothing stands before the assistant's turn", "start with a user's message")
        whole = self.render(messages)
        pieces: list[tuple[str, bool]] = []
        prompt, position, closed = "", 0, False
        for i in learnt:
            before = self.render(messages[:i], generation_prompt=True)
            after = whole if i == len(messages) - 1 else self.render(messages[: i + 1])
            if not after.startswith(before) or not whole.startswith(after):
                raise UnusableRowError(
                    "the chat template writes a turn differently once others follow",
                    "pass --assistant_turns=last",
                    bad=False,
                )
            if i == learnt[0]:
                prompt = before
            else:
                pieces.append((before[position:], False))
            turn = after[len(before) :]
            end = self.special.search(turn)
            turn = turn[: end.end()] if end else turn.rstrip()
            if not turn:
                raise UnusableRowError("the chat template leaves the turn out", "check the template", bad=False)
            pieces.append((turn, True))
            position, closed = len(before) + len(turn), end is not None
        return prompt, Response(tuple(pieces), closed)

    def end_of_turn(self) -> str | None:
        """The token that ends an assistant's turn, if the template writes one."""
        try:
            _, response = self.exchange(
                [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
            )
        except UnusableRowError:
            return None
        end = self.special.search(response.pieces[-1][0])
        return end[0] if end else None


class _LateError(Exception):
    pass


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _LateError in the block after `seconds`, in the main thread and where the system has such a timer."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _LateError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def shared_turns(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[Sequence[Message], Message, Message]:
    """The messages that two conversations share, and the last of each: all but those must be equal."""
    if list(chosen[:-1]) != list(rejected[:-1]):
        raise UnusableRowError("prompts differ", "let chosen and rejected share every message but the last", bad=False)
    return chosen[:-1], chosen[-1], rejected[-1]
