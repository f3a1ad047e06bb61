"""What source rows mean: dialogues, summaries, the user's own forms, conversations through a chat template."""

from __future__ import annotations

import pytest

from rlhf.data.chat import ChatTemplate
from rlhf.data.custom import CustomParser
from rlhf.data.dialogue import DialogueParser, SummaryParser, cut_post, drop_first_turns
from rlhf.data.formats import format_of, render_prompt
from rlhf.data.rows import Response, UnusableRowError, first_fit
from rlhf.data.text import encode_prompt
from rlhf.errors import UserError
from tests.tiny_tokenizers import BOS, EOS, make_tokenizer

STAGES = ("finetune", "preference", "feedback", "prompts")
TURNS = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant:"
PAIR = {"chosen": TURNS + " Fine.", "rejected": TURNS + " Go away."}


def texts(row) -> list[str]:
    return ["".join(text for text, _ in response.pieces) for response in row.responses]


@pytest.mark.parametrize("stage", STAGES)
def test_a_dialogue_keeps_its_turns(stage):
    """A6: the prompt is everything up to the last Assistant turn and ends without a space; the response has it."""
    row = DialogueParser(stage)(PAIR)
    assert row.prompt == TURNS
    expected = {"finetune": [" Fine."], "preference": [" Fine.", " Go away."], "feedback": [" Fine.", " Go away."]}
    assert texts(row) == expected.get(stage, [])
    assert row.labels == ((True, False) if stage == "feedback" else ())
    assert row.reference == (" Fine." if stage == "prompts" else "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": "\n\nHuman: Hi"}, "'chosen' has no Assistant turn"),
        ({"chosen": "Hi there"}, "'chosen' does not start with a Human turn"),
        ({"chosen": TURNS + "  \n"}, "the response of 'chosen' is empty"),
        ({"chosen": TURNS + " Fine.\n\nHuman: Good."}, "'chosen' ends with a Human turn"),
        ({"rejected": "\n\nHuman: Ho\n\nAssistant: Go away."}, "prompts differ"),
        ({"rejected": TURNS + " Fine. "}, "chosen equals rejected"),
        ({"rejected": None}, "'rejected' is null"),
        ({"rejected": 3}, "'rejected' is a number, not a text"),
        ({"rejected": ["a"]}, "'rejected' is a list, not a text"),
        ({"rejected": " "}, "'rejected' is empty"),
        ({"rejected": "\ud800"}, "'rejected' is not valid Unicode"),
    ],
)
def test_dialogues_that_cannot_be_used(change, reason):
    """C40: each broken row has its reason and a fix."""
    with pytest.raises(UnusableRowError) as caught:
        DialogueParser("preference")(PAIR | change)
    assert caught.value.reason == reason
    assert caught.value.fix
    assert caught.value.bad == (reason not in ("prompts differ", "chosen equals rejected"))


def test_equal_responses_may_stay():
    """--remove_same_responses=False keeps them."""
    same = PAIR | {"rejected": PAIR["chosen"]}
    assert texts(DialogueParser("preference", False)(same)) == [" Fine.", " Fine."]
    assert texts(DialogueParser("finetune", True)(same)) == [" Fine."]


def test_dropping_first_turns_keeps_the_tail():
    """A5, C12: a dialogue that must be cut starts at a Human turn, with as many turns as fit."""
    prompt = "".join(f"\n\nHuman: {i}\n\nAssistant: {i}." for i in range(6)) + "\n\nHuman: x\n\nAssistant:"
    for room in range(0, len(prompt) + 1):
        kept = drop_first_turns(prompt, lambda text, room=room: len(text) <= room)
        if kept is None:
            assert room < len("\n\nHuman: x\n\nAssistant:")
        else:
            assert prompt.endswith(kept)
            assert kept.startswith("\n\nHuman:")
            assert len(kept) <= room
            longer = prompt[: -len(kept)].rpartition("\n\nHuman:")
            assert not longer[0] or len(longer[1] + longer[2] + kept) > room


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("marked", ["prompt", "response"])
def test_a_summary_prompt_ends_with_tldr_once(stage, marked):
    """A6: wherever the data set has its "TL;DR:", the prompt ends with it and the summary starts with a space."""
    post = "SUBREDDIT: r/a\nTITLE: b\nPOST: c\nd"
    in_prompt = marked == "prompt"
    record = {
        "prompt": post + ("\nTL;DR:" if in_prompt else "\n"),
        "chosen": ("" if in_prompt else "TL;DR:  ") + "short",
        "rejected": (" " if in_prompt else "TL;DR: ") + "long ",
    }
    row = SummaryParser(stage)(record)
    assert row.prompt == post + "\nTL;DR:"
    assert texts(row) == [" short", " long"][: len(row.responses)]
    assert len(row.responses) == {"finetune": 1, "prompts": 0}.get(stage, 2)
    if stage in ("finetune", "prompts"):
        label = SummaryParser(stage)({"prompt": record["prompt"], "label": record["chosen"]})
        assert (label.prompt, texts(label), label.reference) == (row.prompt, texts(row), row.reference)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "TL;DR:", "label": "a"}, "'prompt' is empty"),
        ({"prompt": "a", "label": "TL;DR:"}, "'label' is empty"),
        ({"prompt": "a"}, "missing key 'chosen'"),
        ("text", "the row is a text, not an object"),
    ],
)
def test_summaries_that_cannot_be_used(record, reason):
    """C40."""
    with pytest.raises(UnusableRowError) as caught:
        SummaryParser("finetune")(record)
    assert caught.value.reason == reason


def test_a_long_post_is_cut_at_its_last_line_break_that_fits():
    """A5: the cut is at a line break of the post where one fits, the tail stays, the header is never cut."""
    header = "SUBREDDIT: r/a\nTITLE: b\nPOST: "
    post = header + "one two\nthree four\nfive six\nseven"
    tail = "\nTL;DR:"
    for room in range(len(header), len(post + tail) + 5):
        kept = cut_post(post, lambda text, room=room: len(text) <= room)
        ends = [header + part + tail for part in ("one two", "one two\nthree four", "one two\nthree four\nfive six")]
        fitting = [text for text in ends if len(text) <= room]
        if fitting:
            assert kept == fitting[-1]
        elif len(header + "one" + tail) <= room:
            assert kept == header + "one" + tail
        elif kept is not None:
            assert kept.endswith(tail)
            assert len(kept) <= room
    assert cut_post(header + "x" * 50, lambda text: len(text) <= 60) == header + "x" * (60 - len(header + tail)) + tail
    assert cut_post(post, lambda text: False) is None


def test_first_fit_is_the_longest():
    """A5: binary search over the places to cut."""
    for room in range(12):
        found = first_fit(range(10, 0, -1), lambda n: "x" * n, lambda text, room=room: len(text) <= room)
        assert found == ("x" * min(room, 10) if room else None)


# --- the user's own forms ---------------------------------------------------------------------------------------

USER, HELLO, BYE = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "assistant", "content": "Bye."},
)
CHAT_PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def custom(stage: str, **options) -> CustomParser:
    return CustomParser(stage, make_tokenizer(bos=False, pad_is_eos=True), **options)


DIALOGUE = "\n\nHuman: Hi\n\nAssistant:"
FORMS = [
    # (record, stage, kind, prompt, responses, labels, reference)
    ({"instruction": "Hi", "response": "Hello."}, "finetune", "dialogue", DIALOGUE, [" Hello."], (), ""),
    ({"instruction": "Hi", "input": "x", "response": "y"}, "finetune", "dialogue",
     "\n\nHuman: Hi\n\nx\n\nAssistant:", [" y"], (), ""),
    ({"instruction": "Hi", "response": "Hello."}, "prompts", "dialogue", DIALOGUE, [], (), " Hello."),
    ({"instruction": "Hi"}, "prompts", "dialogue", DIALOGUE, [], (), ""),
    ({"prompt": "Q:", "chosen": " a", "rejected": " b"}, "preference", "plain", "Q:", [" a", " b"], (), ""),
    ({"prompt": "Q:", "chosen": " a", "rejected": " b"}, "finetune", "plain", "Q:", [" a"], (), ""),
    ({"prompt": "Q:", "chosen": " a", "rejected": " b"}, "feedback", "plain", "Q:", [" a", " b"], (True, False), ""),
    ({"prompt": "Q:", "chosen": " a"}, "prompts", "plain", "Q:", [], (), " a"),
    ({"prompt": "Q:", "completion": " so 42", "reference": "42"}, "prompts", "plain", "Q:", [], (), "42"),
    ({"prompt": "Q:", "completion": " a", "label": True}, "feedback", "plain", "Q:", [" a"], (True,), ""),
    ({"prompt": "Q:", "completion": " a", "label": "0"}, "feedback", "plain", "Q:", [" a"], (False,), ""),
    ({"prompt": "Q:", "completion": " a", "label": 1}, "finetune", "plain", "Q:", [" a"], (), ""),
    ({"prompt": "Q:", "completion": " a"}, "finetune", "plain", "Q:", [" a"], (), ""),
    ({"prompt": "Q:", "response": " a"}, "finetune", "plain", "Q:", [" a"], (), ""),
    ({"prompt": "Q:", "completion": " a", "label": False}, "prompts", "plain", "Q:", [], (), ""),
    ("Q:", "prompts", "plain", "Q:", [], (), ""),
    ({"prompt": "Q:", "reference": "42"}, "prompts", "plain", "Q:", [], (), "42"),
    (PAIR, "preference", "dialogue", TURNS, [" Fine.", " Go away."], (), ""),
    ({"messages": [USER, HELLO]}, "finetune", "chat_template", CHAT_PROMPT, ["Hello." + EOS], (), ""),
    ({"messages": [USER, HELLO]}, "prompts", "chat_template", CHAT_PROMPT, [], (), "Hello."),
    ({"messages": [USER]}, "prompts", "chat_template", CHAT_PROMPT, [], (), ""),
    ({"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]'}, "finetune",
     "chat_template", CHAT_PROMPT, ["Hello." + EOS], (), ""),
    ({"prompt": [USER], "chosen": [HELLO], "rejected": [BYE]}, "preference", "chat_template", CHAT_PROMPT,
     ["Hello." + EOS, "Bye." + EOS], (), ""),
    ({"chosen": [USER, HELLO], "rejected": [USER, BYE]}, "preference", "chat_template", CHAT_PROMPT,
     ["Hello." + EOS, "Bye." + EOS], (), ""),
    ({"prompt": [USER], "chosen": "Hello.", "rejected": "Bye."}, "feedback", "chat_template", CHAT_PROMPT,
     ["Hello." + EOS, "Bye." + EOS], (True, False), ""),
    ({"prompt": [USER], "completion": [HELLO], "label": False}, "feedback", "chat_template", CHAT_PROMPT,
     ["Hello." + EOS], (False,), ""),
    ({"prompt": [USER]}, "prompts", "chat_template", CHAT_PROMPT, [], (), ""),
    ({"prompt": [USER, HELLO]}, "prompts", "chat_template", CHAT_PROMPT, [], (), "Hello."),
]  # fmt: skip


@pytest.mark.parametrize(("record", "stage", "kind", "prompt", "responses", "labels", "reference"), FORMS)
def test_every_form_of_the_users_rows(record, stage, kind, prompt, responses, labels, reference):
    """Each form of the README gives the row that its stage needs."""
    row = custom(stage)(record)
    assert (row.kind, row.prompt, texts(row)) == (kind, prompt, responses)
    assert row.labels == labels
    assert row.reference == reference


@pytest.mark.parametrize(
    ("record", "stage", "reason"),
    [
        (7, "finetune", "the row is neither an object nor a prompt string"),
        ({"a": 1}, "finetune", "unknown keys ['a']"),
        ("Q", "finetune", "a bare prompt, and --stage=finetune needs a response"),
        ({"instruction": "Hi"}, "finetune", "missing key 'response'"),
        ({"instruction": "Hi", "response": "a"}, "preference", "no rejected response for --stage=preference"),
        ({"prompt": "Q", "chosen": "a"}, "preference", "missing key 'rejected'"),
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "preference", "chosen equals rejected"),
        ({"prompt": "Q", "completion": "a"}, "feedback", "missing key 'label'"),
        ({"prompt": "Q", "completion": "a", "label": "good"}, "feedback", "'label' is 'good'"),
        ({"prompt": "Q", "completion": "a", "label": 2}, "feedback", "'label' is 2"),
        ({"prompt": "Q", "completion": "a", "label": False}, "finetune", "label is False: nothing to imitate"),
        ({"messages": []}, "finetune", "'messages' is no list of messages"),
        ({"messages": None}, "finetune", "'messages' is null"),
        ({"messages": "Hi"}, "finetune", "'messages' is no list of messages"),
        ({"messages": ["Hi"]}, "finetune", "a message of 'messages' has no role"),
        ({"messages": [USER]}, "finetune", "no assistant turn"),
        ({"messages": [HELLO]}, "finetune", "nothing stands before the assistant's turn"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "finetune", "'content' is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "finetune", "'content' is null"),
        ({"messages": [USER, {"role": "assistant", "content": "a" + EOS}]}, "finetune",
         f"a message holds the control token '{EOS}'"),
        ({"chosen": [USER, HELLO], "rejected": [BYE, HELLO]}, "preference", "prompts differ"),
        ({"prompt": [USER], "chosen": [HELLO], "rejected": [HELLO]}, "preference", "chosen equals rejected"),
        ({"prompt": [USER], "chosen": [HELLO]}, "preference", "missing key 'rejected'"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BYE]}, "preference", "no assistant turn at the end"),
        ({"prompt": [USER]}, "finetune", "no assistant turn"),
        ({"prompt": "Q", "reference": 42}, "prompts", "'reference' is a number, not a text"),
    ],
)  # fmt: skip
def test_rows_of_the_user_that_cannot_be_used(record, stage, reason):
    """C40: the reason names the key."""
    with pytest.raises(UnusableRowError) as caught:
        custom(stage)(record)
    assert caught.value.reason == reason
    assert caught.value.fix


def test_plain_texts_may_be_wrapped_or_sent_through_the_chat_template():
    """--prompt_template and --apply_chat_template."""
    assert custom("prompts", prompt_template="Q: {prompt}\nA:")({"prompt": "{x}?"}).prompt == "Q: {x}?\nA:"
    for record in ({"prompt": "Hi", "completion": "Hello."}, {"instruction": "Hi", "response": "Hello."}):
        row = custom("finetune", apply_chat_template=True)(record)
        assert (row.prompt, texts(row)) == (CHAT_PROMPT, ["Hello." + EOS])
    pair = custom("preference", apply_chat_template=True)({"prompt": "Hi", "chosen": "Hello.", "rejected": "Bye."})
    assert texts(pair) == ["Hello." + EOS, "Bye." + EOS]


# --- masks of conversations -------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Assistant: fake\n<b>assistant</b>"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "One."},
    {"role": "assistant", "content": "user\nTwo. "},
]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRIPS_HISTORY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FUSSY = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


def test_supervised_tokens_are_the_assistants_turns_and_their_ends():
    """C10: from the structure of the messages; words that look like markers in a message change nothing."""
    chat = ChatTemplate(make_tokenizer(bos=True, pad_is_eos=True))
    prompt, response = chat.exchange(CONVERSATION, every_turn=True)
    assert [text for text, learnt in response.pieces if learnt] == ["One." + EOS, "user\nTwo. " + EOS]
    assert prompt + "".join(text for text, _ in response.pieces) + "\n" == chat.render(CONVERSATION)
    assert prompt == chat.render(CONVERSATION[:2], generation_prompt=True)
    prompt, response = chat.exchange(CONVERSATION)
    assert prompt == chat.render(CONVERSATION[:-1], generation_prompt=True)
    assert response == Response((("user\nTwo. " + EOS, True),), closed=True)


def test_the_end_of_a_turn_may_be_another_token_than_eos():
    """C10, C1: Llama-3's kind: the template's own end of turn closes the response, and no EOS is added."""
    tokenizer = make_tokenizer(bos=True, pad_is_eos=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|start|>", "<|stop|>", "<|eot|>"]})
    tokenizer.chat_template = LLAMA3
    chat = ChatTemplate(tokenizer)
    prompt, response = chat.exchange(CONVERSATION, every_turn=True)
    assert [text for text, learnt in response.pieces if learnt] == ["One.<|eot|>", "user\nTwo.<|eot|>"]
    assert response.closed
    assert prompt.startswith(BOS)
    assert format_of("chat_template", tokenizer)["stop"] == ["<|eot|>"]


def test_a_template_without_an_end_of_turn_leaves_the_eos_to_us():
    """C1: then the response is not closed, and gets its EOS."""
    tokenizer = make_tokenizer(bos=False, pad_is_eos=True)
    tokenizer.chat_template = NO_END
    _, response = ChatTemplate(tokenizer).exchange(CONVERSATION, every_turn=True)
    assert [text for text, learnt in response.pieces if learnt] == ["One.", "user\nTwo."]
    assert not response.closed
    assert format_of("chat_template", tokenizer)["stop"] == []


def test_a_template_that_rewrites_history_is_counted():
    """C10: a rendered prefix that is no prefix of the whole; the last turn alone can still be learnt."""
    tokenizer = make_tokenizer(bos=False, pad_is_eos=True)
    tokenizer.chat_template = STRIPS_HISTORY
    chat = ChatTemplate(tokenizer)
    with pytest.raises(UnusableRowError, match="writes a turn differently once others follow") as caught:
        chat.exchange(CONVERSATION, every_turn=True)
    assert "--assistant_turns=last" in caught.value.fix
    _, response = chat.exchange(CONVERSATION)
    assert response.pieces == (("<think></think>user\nTwo. " + EOS, True),)


def test_a_template_that_refuses_is_a_reason():
    """C40: not a traceback from inside the template."""
    tokenizer = make_tokenizer(bos=False, pad_is_eos=True)
    tokenizer.chat_template = FUSSY
    with pytest.raises(UnusableRowError, match=r"refuses the conversation \(no system role"):
        ChatTemplate(tokenizer).exchange(CONVERSATION)
    with pytest.raises(UserError, match="no system role"):
        render_prompt({"kind": "chat_template"}, CONVERSATION, tokenizer)


@pytest.mark.parametrize("in_template", [True, False])
@pytest.mark.parametrize("in_tokenizer", [True, False])
def test_template_and_tokenizer_together_give_one_bos(in_template, in_tokenizer):
    """C8: for every pair of them, and the prompt of training is the prompt that a demo renders."""
    tokenizer = make_tokenizer(bos=in_tokenizer, pad_is_eos=True)
    if not in_tokenizer:
        tokenizer.add_special_tokens({"bos_token": BOS})
    body = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    tokenizer.chat_template = ("{{ bos_token }}" if in_template else "") + body
    row = CustomParser("finetune", tokenizer)({"messages": [USER, HELLO]})
    ids = encode_prompt(tokenizer, row.prompt)
    assert ids.count(tokenizer.bos_token_id) == (1 if in_template or in_tokenizer else 0)
    assert ids == encode_prompt(tokenizer, render_prompt(format_of("chat_template", tokenizer), [USER], tokenizer))


def test_prompts_are_rendered_as_the_data_has_them():
    """C8: dialogues, summaries and plain prompts of a demo read like those of the data."""
    tokenizer = make_tokenizer(bos=False, pad_is_eos=True)
    turns = [USER, HELLO, {"role": "user", "content": "How are you?"}]
    assert render_prompt(format_of("dialogue", tokenizer), turns) == TURNS == DialogueParser("prompts")(PAIR).prompt
    summary = render_prompt(
        format_of("summary", tokenizer), [{"role": "user", "content": "c\nd"}], title="b", subreddit="a"
    )
    assert summary == SummaryParser("prompts")({"prompt": "SUBREDDIT: r/a\nTITLE: b\nPOST: c\nd", "label": "x"}).prompt
    assert render_prompt(format_of("plain", tokenizer, "Q: {prompt}\nA:"), [USER]) == "Q: Hi\nA:"
