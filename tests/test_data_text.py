"""The rule from text to ids (rlhf/data/text.py)."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.data import text
from rlhf.data.text import (
    encode_pair,
    encode_pairs,
    encode_prompt,
    load_tokenizer,
    pad_token_id,
    template_fingerprint,
    tokenizer_fingerprint,
)
from rlhf.errors import UserError
from tests.tiny_tokenizers import BOS, EOS, TURN, make_tokenizer

KINDS = list(itertools.product([False, True], [False, True]))
PROMPT, RESPONSE = "\n\nHuman: How are you?\n\nAssistant:", " I am fine, thank you."


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Puts a space before every text, as Llama-2's tokenizer does."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "a", "▁a", "h", "i", "▁h", "▁hi"):
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁", "h"), ("▁h", "i")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(("bos", "pad_is_eos"), KINDS)
def test_one_bos_in_front_and_one_eos_at_the_end(bos, pad_is_eos):
    """C8, C1: one BOS iff the tokenizer adds one, one EOS after the response, nothing in between."""
    tokenizer = make_tokenizer(bos=bos, pad_is_eos=pad_is_eos)
    prompt_ids, response_ids = encode_pair(tokenizer, PROMPT, RESPONSE)
    assert prompt_ids[:1] == ([tokenizer.bos_token_id] if bos else tokenizer(PROMPT).input_ids[:1])
    assert (prompt_ids + response_ids).count(tokenizer.bos_token_id) == (1 if bos else 0)
    assert response_ids[-1] == tokenizer.eos_token_id
    assert (prompt_ids + response_ids).count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(prompt_ids, skip_special_tokens=True) == PROMPT
    assert tokenizer.decode(response_ids[:-1]) == RESPONSE


def reference_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """What transformers says that the ids of each text alone are."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("make", [lambda: make_tokenizer(bos=True, pad_is_eos=False), sentencepiece_like])
def test_the_backend_gives_the_ids_of_transformers(make, split):
    """Whatever padding and truncation the tokenizer was left with, and whether special tokens are read as such."""
    texts = [PROMPT, "", RESPONSE * 9, f"a{EOS}b{BOS}</s> <s>", "Übergröße 東京 🙂", " hi a "]
    tokenizer = make()
    tokenizer.split_special_tokens = split
    expected = reference_ids(tokenizer, texts)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.encode_special_tokens = not split
    assert text.ids_of(tokenizer, texts) == expected
    assert text.ids_of(tokenizer, []) == []


def test_a_tokenizer_with_a_step_of_its_own_is_called():
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, texts, **options):
            return super().__call__([text.upper() for text in texts], **options)

    plain = make_tokenizer(bos=False, pad_is_eos=False)
    own = Shouting(tokenizer_object=plain.backend_tokenizer, eos_token=EOS)
    assert text.ids_of(own, ["ab", "How"]) == reference_ids(plain, ["AB", "HOW"]) != reference_ids(plain, ["ab", "How"])


@pytest.mark.parametrize(("bos", "pad_is_eos"), KINDS)
def test_text_that_spells_bos_or_eos_gets_no_second_one(bos, pad_is_eos):
    """C8, C1: a prompt that was rendered with its BOS, and a response that closes with its EOS."""
    tokenizer = make_tokenizer(bos=bos, pad_is_eos=pad_is_eos)
    plain = encode_pair(tokenizer, PROMPT, RESPONSE)
    spelled = encode_pair(tokenizer, (BOS if bos else "") + PROMPT, RESPONSE + EOS)
    assert spelled == plain


def test_a_cut_response_gets_no_eos():
    """A6: only a response that has ended is closed."""
    tokenizer = make_tokenizer(bos=True, pad_is_eos=True)
    whole = encode_pair(tokenizer, PROMPT, RESPONSE)
    cut = encode_pair(tokenizer, PROMPT, RESPONSE, ended=False)
    assert cut == (whole[0], whole[1][:-1])
    assert tokenizer.eos_token_id not in cut[1]


def test_an_eos_that_the_tokenizer_adds_itself_is_not_doubled():
    """C1, C8: a tokenizer with an EOS in its own template."""
    tokenizer = make_tokenizer(bos=True, pad_is_eos=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, bos), (EOS, eos)]
    )
    prompt_ids, response_ids = encode_pair(tokenizer, PROMPT, RESPONSE)
    assert (prompt_ids + response_ids).count(eos) == 1
    assert response_ids[-1] == eos
    assert (prompt_ids + response_ids).count(bos) == 1


@pytest.mark.parametrize("make", [lambda: make_tokenizer(bos=True, pad_is_eos=True), sentencepiece_like])
def test_prompt_ids_do_not_depend_on_the_response(make):
    """C38: the prompt of chosen and rejected is one and the same, and is what a rollout starts from."""
    tokenizer = make()
    prompts = {tuple(encode_pair(tokenizer, "a hi", r)[0]) for r in (" hi", "hi", "\n", ".", " a", "")}
    assert prompts == {tuple(encode_prompt(tokenizer, "a hi"))}


@pytest.mark.parametrize(
    "make",
    [
        *(lambda b=bos, p=pad: make_tokenizer(bos=b, pad_is_eos=p) for bos, pad in KINDS),
        sentencepiece_like,
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_batches_give_the_same_ids_as_one_by_one(make, ended):
    """C38: the fast path of data preparation follows the same rule."""
    tokenizer = make()
    prompts = ["", "a", PROMPT, "é ☃\n", BOS + "hi", "x" * 500]
    responses = [" a", "", RESPONSE, "\n\nhi" + EOS, " hi", "日本"]
    one_by_one = [encode_pair(tokenizer, p, r, ended=ended) for p, r in zip(prompts, responses, strict=True)]
    assert encode_pairs(tokenizer, prompts, responses, ended=ended) == one_by_one


def test_a_continuation_gets_no_space_of_the_tokenizers_own():
    """A6, C38: SentencePiece puts a space before a text; the response must follow as in one text."""
    tokenizer = sentencepiece_like()
    assert tokenizer(" a", add_special_tokens=False).input_ids != [tokenizer.convert_tokens_to_ids("▁a")]
    prompt_ids, response_ids = encode_pair(tokenizer, "hi", " a hi")
    assert prompt_ids + response_ids == [*tokenizer("hi a hi").input_ids, tokenizer.eos_token_id]


def test_leftover_truncation_and_padding_of_the_tokenizer_are_ignored():
    """C12: a tokenizer that was last called with a limit must not cut what we encode."""
    tokenizer = make_tokenizer(bos=False, pad_is_eos=False)
    clean = encode_pairs(tokenizer, [PROMPT, "a"], [RESPONSE, "b"])
    tokenizer([PROMPT, "a"], truncation=True, max_length=4, padding="max_length")
    assert encode_pairs(tokenizer, [PROMPT, "a"], [RESPONSE, "b"]) == clean


def test_pad_token_is_neither_eos_nor_bos():
    """A2: an existing token of its own, or None; the vocabulary keeps its size."""
    own = make_tokenizer(bos=True, pad_is_eos=False)
    assert pad_token_id(own) == own.pad_token_id not in (own.eos_token_id, own.bos_token_id)
    none = make_tokenizer(bos=True, pad_is_eos=True)
    size = len(none)
    assert pad_token_id(none) is None
    assert len(none) == size
    unknown = sentencepiece_like()
    unknown.pad_token = unknown.eos_token
    assert pad_token_id(unknown) == unknown.unk_token_id


def test_pad_falls_back_to_a_special_token_that_nothing_writes():
    """A2: of the spare special tokens, one that the chat template does not use, reserved ones first."""
    tokenizer = make_tokenizer(bos=False, pad_is_eos=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|code|>", "<|reserved_1|>"]})
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|reserved_1|>")
    tokenizer.chat_template += "<|reserved_1|>"
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|code|>")


def test_fingerprint_survives_saving_and_loading(tmp_path):
    """C7, C16: equal tokenizers have equal fingerprints; the pad token and leftovers of calls don't count."""
    for number, make in enumerate([lambda: make_tokenizer(bos=True, pad_is_eos=False), sentencepiece_like]):
        tokenizer = make()
        fingerprint = tokenizer_fingerprint(tokenizer)
        folder = tmp_path / str(number)
        tokenizer.save_pretrained(folder)
        assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder)) == fingerprint
        tokenizer(["a", "hi"], truncation=True, max_length=1, padding=False)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = "{{ messages }}"
        assert tokenizer_fingerprint(tokenizer) == fingerprint


def test_fingerprint_tells_tokenizers_apart():
    """C7, C16: vocabulary, merges, BOS habit, EOS, added tokens and normaliser each make another fingerprint."""
    tokenizers = [make_tokenizer(bos=bos, pad_is_eos=pad) for bos, pad in KINDS]
    tokenizers.append(make_tokenizer(bos=False, pad_is_eos=False, vocab_size=400))
    added = make_tokenizer(bos=False, pad_is_eos=False)
    added.add_tokens(["hello"])
    lower = make_tokenizer(bos=False, pad_is_eos=False)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    silent = make_tokenizer(bos=True, pad_is_eos=False)
    silent.backend_tokenizer.post_processor = processors.ByteLevel()
    turned = make_tokenizer(bos=False, pad_is_eos=False)
    turned.eos_token = TURN
    prints = {tokenizer_fingerprint(t) for t in (*tokenizers, added, lower, silent, turned)}
    assert len(prints) == len(tokenizers) + 4
    with_template = make_tokenizer(bos=False, pad_is_eos=False)
    without = make_tokenizer(bos=False, pad_is_eos=False, chat_template=False)
    assert template_fingerprint(with_template) != template_fingerprint(without)


def test_loading_a_tokenizer(tmp_path, monkeypatch):
    """Errors name the folder or id, and the remedy (DESIGN.md §11)."""
    make_tokenizer(bos=True, pad_is_eos=True).save_pretrained(tmp_path / "good")
    assert load_tokenizer(tmp_path / "good").bos_token == BOS
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty' holds no tokenizer"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(UserError, match=r"nowhere': no such folder"):
        load_tokenizer(tmp_path / "nowhere")

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nSecond line")

    monkeypatch.setattr(text.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(UserError, match=r"'some/model' can't be fetched .*; check the id") as caught:
        load_tokenizer("some/model")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    """C1: without an EOS token no response can end."""
    tokenizer = make_tokenizer(bos=True, pad_is_eos=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(tmp_path)
