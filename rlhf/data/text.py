"""From text to token ids: the one rule that data preparation, rollouts, reward models and demos share.

The rule. The pieces of a text (a prompt, a response, the turns of a conversation) are tokenised apart, with no
special token added in between. One BOS stands in front if, and only if, the tokenizer adds one by itself; one EOS
stands after a response that has ended, unless its text already closes with it. So the ids of a prompt never depend
on what follows it, and `len(prompt_ids)` is where the response starts, exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.untrusted import check_folder, first_line

_PROBE = "Hello  world,\n\nHuman: it's 12:45! Übergröße naïve 東京 مرحبا \t<b>x</b> = {y[0]}; 🙂 ﬁn"


@dataclass(frozen=True)
class TextRule:
    """What one tokenizer adds around a text, found by trying it (`text_rule`)."""

    front: tuple[int, ...]
    """Ids that the tokenizer puts before a text: usually one BOS or nothing."""
    eos: int
    """Id of the EOS token."""
    lead: str
    """Text put before a continuation so that the tokenizer adds no space of its own; usually empty."""
    lead_ids: tuple[int, ...]
    """Ids of `lead`, taken off again."""


def is_hub_id(name: str) -> bool:
    """Whether `name` is written as the ids of the hub are: NAME or OWNER/NAME.

    >>> [is_hub_id(name) for name in ("gpt2", "openai/gpt2", "./gpt2", "runs/dpo/final", "my gpt", "runs/")]
    [True, True, False, False, False, False]
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or of a hub id.

    Raises:
        UserError: no such folder, a folder without a tokenizer, an id that can't be fetched, a tokenizer that needs
            its own code while `trust_remote_code` is off, or one without an EOS token.
    """
    name = str(Path(name_or_path).expanduser()) if str(name_or_path).startswith("~") else str(name_or_path)
    is_folder = Path(name).is_dir()
    if not is_folder and not is_hub_id(name):
        raise UserError(f"tokenizer {name!r}: no such folder; give a folder with a tokenizer, or a hub id")
    if is_folder:
        check_folder(name, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # of files that were tampered with, tokenizers and transformers raise anything
        if "trust_remote_code" in str(error):
            raise UserError(
                f"tokenizer {name!r} comes with its own code; pass --trust_remote_code=True if you trust it"
            ) from error
        if is_folder:
            raise UserError(
                f"the folder {name!r} holds no tokenizer that can be loaded ({first_line(error)}); "
                "save one there with tokenizer.save_pretrained"
            ) from error
        raise UserError(
            f"the tokenizer {name!r} can't be fetched from the hub ({first_line(error)}); "
            "check the id and the network, or give a local folder"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no EOS token; set one (tokenizer.eos_token) and save it")
    return tokenizer


def text_rule(tokenizer: PreTrainedTokenizerBase) -> TextRule:
    """Find by trial what `tokenizer` adds in front of a text, and whether it adds a space to a continuation.

    SentencePiece tokenizers of the Llama-2 kind put a space before every text, so a response tokenised alone would
    start with two. They get a line feed in front, whose ids are taken off again.
    """
    bare, line, both = ids_of(tokenizer, ["a", "\n", "\na"])
    full = tokenizer("a", verbose=False)["input_ids"]
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    needs_lead = both != line + bare and both[: len(line)] == line and len(line) > 0
    return TextRule(
        front=tuple(full[: starts[0]]) if starts else (),
        eos=tokenizer.eos_token_id,
        lead="\n" if needs_lead else "",
        lead_ids=tuple(line) if needs_lead else (),
    )


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text alone, nothing added; special tokens that the text spells out are recognised."""
    if not texts:
        return []
    if _is_plain(tokenizer):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        # The same ids as below, without the place of each in the text: a fifth less time.
        return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    alone = {"add_special_tokens": False, "padding": False, "truncation": False}
    return tokenizer(list(texts), return_attention_mask=False, verbose=False, **alone)["input_ids"]


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether calling the tokenizer comes down to its backend's own encoding: no class of its own steps in."""
    steps = ("__call__", "_encode_plus", "_batch_encode_plus")
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), step, None) is getattr(PreTrainedTokenizerFast, step, None) for step in steps
    )


def prompt_ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], rule: TextRule) -> list[list[int]]:
    """Ids of the beginnings of texts: the tokenizer's own BOS in front, once."""
    front = list(rule.front)
    return [ids if ids[: len(front)] == front else front + ids for ids in ids_of(tokenizer, texts)]


def continuation_ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], rule: TextRule) -> list[list[int]]:
    """Ids of texts that continue another one: nothing in front."""
    if not rule.lead:
        return ids_of(tokenizer, texts)
    lead = list(rule.lead_ids)
    led = ids_of(tokenizer, [rule.lead + text for text in texts])
    merged = [i for i, ids in enumerate(led) if ids[: len(lead)] != lead]
    alone = dict(zip(merged, ids_of(tokenizer, [texts[i] for i in merged]), strict=True))
    return [alone[i] if i in alone else ids[len(lead) :] for i, ids in enumerate(led)]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str], *, ended: bool = True
) -> list[tuple[list[int], list[int]]]:
    """`encode_pair` of many pairs at once: the same ids, by the tokenizer's own threads."""
    rule = text_rule(tokenizer)
    prompt_ids = prompt_ids_of(tokenizer, prompts, rule)
    response_ids = continuation_ids_of(tokenizer, responses, rule)
    if ended:
        response_ids = [with_eos(ids, rule) for ids in response_ids]
    return list(zip(prompt_ids, response_ids, strict=True))


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, *, ended: bool = True
) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of its response, tokenised apart by the rule of this module.

    `ended`: the response is whole, so exactly one EOS closes it; a response that was cut gets none
    (summarize_from_feedback; PPO detail A6).

    Returns:
        `(prompt_ids, response_ids)`; the sequence of a model is their concatenation, and `len(prompt_ids)` its
        `prompt_len`.
    """
    return encode_pairs(tokenizer, [prompt], [response], ended=ended)[0]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a prompt: those that `encode_pair` gives it, whatever the response."""
    return prompt_ids_of(tokenizer, [text], text_rule(tokenizer))[0]


def with_eos(ids: list[int], rule: TextRule) -> list[int]:
    """`ids`, closed by exactly one EOS."""
    return ids if ids and ids[-1] == rule.eos else [*ids, rule.eos]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """An existing token to pad with that is neither EOS nor BOS, or None; the vocabulary is never enlarged.

    The padding token if it is one, else the unknown token, else a special token of the vocabulary that neither the
    chat template nor the tokenizer itself ever writes, those that are named for it (pad, reserved, unused) first.
    """
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, None}
    for own in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        if own not in taken:
            return own
    taken |= set(text_rule(tokenizer).front)
    template = str(tokenizer.chat_template or "")
    free = [
        (not any(word in token.content.lower() for word in ("pad", "reserved", "unused")), index)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and index not in taken and token.content not in template
    ]
    return min(free)[1] if free else None


def special_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as control tokens."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text gets: equal for equal tokenizers, wherever they were loaded from.

    Covers the vocabulary, merges, normaliser, pre-tokenizer, added tokens, BOS/EOS/unknown ids and what is put in
    front of a text. The padding token and the chat template do not change the ids of a text and stay out;
    `template_fingerprint` covers the latter where the data went through it.
    """
    rule = text_rule(tokenizer)
    state = {
        "vocab": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "added": [
            (index, t.content, t.special, t.lstrip, t.rstrip, t.normalized, t.single_word)
            for index, t in sorted(tokenizer.added_tokens_decoder.items())
        ],
        "named": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
        "front": rule.front,
        "probe": ids_of(tokenizer, [_PROBE]),
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend["model"].pop("vocab", None)
        state["backend"] = {part: backend[part] for part in ("normalizer", "pre_tokenizer", "model")}
    text = json.dumps(state, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the chat template."""
    text = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
