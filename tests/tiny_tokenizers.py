"""Small real tokenizers, made in the test: byte-level BPE, so that any text survives a round trip."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, TURN = "<|begin|>", "<|im_end|>", "<|pad|>", "<|im_start|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as most small instruct models use it: the end of a turn is the EOS token. A tokenizer with a BOS gets
it in front, so that template and tokenizer both want to add one."""

_CORPUS = (
    "\n\nHuman: Can you tell me what the best way is to keep a small garden alive over a dry summer?",
    "\n\nAssistant: Yes, of course. Water it early in the morning, and put some mulch around the plants.",
    "\n\nHuman: And what should I do about the snails that are eating the lettuce?",
    "\n\nAssistant: I would pick them up by hand in the evening. They are slow, so it is not hard.",
    "SUBREDDIT: r/advice\nTITLE: My brother will not give the car back\nPOST: I lent him the car in May.",
    "TL;DR: lent my brother a car, he keeps it, what should I do?",
    "system\nuser\nassistant\nThe quick brown fox jumps over the lazy dog. How are you? I am fine, thank you.",
    "What is the capital of France? The capital of France is Paris. One, two, three, four, five, six.",
)


def make_tokenizer(
    *, bos: bool, pad_is_eos: bool, chat_template: bool = True, vocab_size: int = 512
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about `vocab_size` tokens, the same on every call and machine.

    `bos`: the tokenizer has a BOS token and puts it in front by itself. `pad_is_eos`: the padding token is the
    EOS token, and no other special token is free to pad with, as in many published tokenizers; else there is a
    padding token of its own.
    """
    specials = [EOS, TURN] + ([BOS] if bos else []) + ([] if pad_is_eos else [PAD])
    backend = Tokenizer.from_str(_trained(tuple(specials), vocab_size))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS if bos else None,
        eos_token=EOS,
        pad_token=EOS if pad_is_eos else PAD,
        additional_special_tokens=[TURN],
    )
    if chat_template:
        tokenizer.chat_template = ("{{ bos_token }}" if bos else "") + CHAT_TEMPLATE
    return tokenizer


@lru_cache
def _trained(specials: tuple[str, ...], vocab_size: int) -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    if BOS in specials:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    return backend.to_str()
