"""What the demos do below the page: which models there are, how prompts are written, answers that stream and stop."""

from __future__ import annotations

import dataclasses
import json
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rlhf.data.formats import format_of, render_prompt
from rlhf.data.text import encode_prompt
from rlhf.errors import UserError
from rlhf.rollouts import Sampling
from tests.demo_runs import Pace, load, make_runs
from tests.splits import make_model_dir, tokenizer_for

TURNS = [
    {"role": "user", "content": "Are snails slow?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "How slow?"},
]
DIALOGUE = "\n\nHuman: Are snails slow?\n\nAssistant: Yes.\n\nHuman: How slow?\n\nAssistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def loaded(folder):
    serving, checkpoints = load("serving"), load("checkpoints")
    (checkpoint,) = checkpoints.find_checkpoints([str(folder / "base")])
    return serving.Models(serving.ServingFlags(experiment_dir=[])).get(checkpoint)


@pytest.fixture
def pace(monkeypatch) -> Pace:
    return Pace(monkeypatch)


def answers(loaded, sampling, *, stop=None, stop_texts=(), prompt="Snails?", pace=None):
    """All parts of an answer; with `pace`, a token each."""
    parts = []
    for part in load("serving").reply(loaded, prompt, sampling, stop or threading.Event(), stop_texts):
        parts.append(part)
        if pace is not None:
            pace.go()
    return parts


# Which models there are


def test_an_experiment_lists_its_checkpoints_and_what_it_started_from(folder):
    """A step without a model (one that is being written) is left out, and so is the link `last`."""
    found = load("checkpoints").find_checkpoints([str(folder / "dpo")])
    dpo, sft = folder / "dpo", folder / "sft"
    assert [(c.label, Path(c.source)) for c in found] == [
        ("dpo · final", dpo / "final"),
        ("dpo · best (step 10, val/loss 1.25)", dpo / "checkpoints/best/model"),
        ("dpo · step 20", dpo / "checkpoints/step-00000020/model"),
        ("sft · final, the start of dpo", sft / "final"),
        ("base · pretrained, the start of sft", folder / "base"),
    ]
    assert {c.format["kind"] for c in found} == {"dialogue"}


def test_several_experiments_are_listed_once_each(folder):
    """The SFT final is listed under its own name, not again as where DPO started."""
    found = load("checkpoints").find_checkpoints([str(folder / "dpo"), str(folder / "sft")])
    labels = [c.label for c in found]
    assert labels[0] == "dpo · final"
    assert labels[3] == "sft · final"
    assert labels[6:] == ["base · pretrained, the start of sft"]
    assert len({Path(c.source).resolve() for c in found}) == len(found) == 7


def test_experiments_of_one_name_are_told_apart(folder, tmp_path):
    make_model_dir(tmp_path / "dpo")
    found = load("checkpoints").find_checkpoints([str(folder / "dpo"), str(tmp_path / "dpo")])
    assert found[0].label == f"{folder / 'dpo'} · final"
    assert found[3].label == str(tmp_path / "dpo")


def test_a_hub_id_is_a_model_of_its_own():
    (found,) = load("checkpoints").find_checkpoints(["someone/some-model"])
    assert (found.label, found.source, found.format) == ("someone/some-model", "someone/some-model", None)


@pytest.mark.parametrize("part", ["final", "checkpoints/best/model"])
def test_a_model_folder_inside_an_experiment_knows_its_format(folder, part):
    (found,) = load("checkpoints").find_checkpoints([str(folder / "dpo" / part)])
    assert found.format["kind"] == "dialogue"


def test_the_format_comes_from_the_data_folder_where_the_experiment_has_none(tmp_path):
    format = format_of("plain", tokenizer_for(), "Question: {prompt}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "args.json").write_text(json.dumps({"stages": {"preference": {"format": format}}}))
    (tmp_path / "args.json").write_text(json.dumps({"data_dir": str(tmp_path / "data")}))
    assert load("checkpoints").recorded_format(tmp_path) == format
    assert load("checkpoints").recorded_format(tmp_path / "data" / "..") == format
    assert load("checkpoints").recorded_format(tmp_path / "elsewhere") is None


def test_a_start_that_is_gone_is_left_out(folder, tmp_path, capsys):
    make_model_dir(tmp_path / "run" / "final")
    (tmp_path / "run" / "args.json").write_text(json.dumps({"model_name": str(tmp_path / "gone")}))
    found = load("checkpoints").find_checkpoints([str(tmp_path / "run")])
    assert [c.label for c in found] == ["run · final"]
    assert "gone" in capsys.readouterr().out


def test_sources_that_are_no_model_are_refused(folder, tmp_path):
    make_model_dir(tmp_path / "rm" / "final", scorer=True)
    (tmp_path / "rm" / "args.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    adapter = {"task_type": "SEQ_CLS", "base_model_name_or_path": str(folder / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "args.json").write_text("{")
    find = load("checkpoints").find_checkpoints
    for source, sentence in [
        (tmp_path / "rm", "holds a reward model"),
        (tmp_path / "rm" / "final", "holds a reward model"),
        (tmp_path / "adapter", "holds a reward model"),
        (tmp_path, "holds no model"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "broken", "can't be read|holds no model"),
    ]:
        with pytest.raises(UserError, match=sentence):
            find([str(source)])


# How prompts are written


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        ("dialogue", DIALOGUE),
        (
            "chat_template",
            "<|im_start|>user\nAre snails slow?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
            "<|im_start|>user\nHow slow?<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("plain", "How slow?"),
    ],
    ids=["dialogue", "chat_template", "plain"],
)
def test_chat_writes_prompts_as_the_data_does(loaded, kind, prompt):
    chat, checkpoint = load("chat"), load("checkpoints").Checkpoint
    recorded = checkpoint("x", "x", format_of(kind, loaded.tokenizer))
    format = chat.chat_format(chat.ChatFlags(experiment_dir=[]), recorded, loaded)
    assert render_prompt(format, TURNS, loaded.tokenizer) == prompt
    told = chat.chat_format(chat.ChatFlags(experiment_dir=[], format=kind), checkpoint("x", "x"), loaded)
    assert told == format


def test_a_model_of_unknown_data_gets_its_chat_template_or_else_turns(loaded):
    serving = load("serving")
    assert serving.default_format(loaded.tokenizer)["kind"] == "chat_template"
    bare = tokenizer_for(pad_is_eos=True)
    template, bare.chat_template = bare.chat_template, None
    try:
        assert serving.default_format(bare)["kind"] == "dialogue"
    finally:
        bare.chat_template = template


def test_chat_refuses_models_of_summaries_unless_told_how(loaded):
    chat = load("chat")
    summary = load("checkpoints").Checkpoint("tldr · final", "x", format_of("summary", loaded.tokenizer))
    with pytest.raises(UserError, match=r"demos/summarize\.py"):
        chat.refuse_summaries(chat.ChatFlags(experiment_dir=[]), [summary])
    chat.refuse_summaries(chat.ChatFlags(experiment_dir=[], format="dialogue"), [summary])


def test_summaries_get_the_prompt_of_the_data(loaded):
    summarize, checkpoint = load("summarize"), load("checkpoints").Checkpoint
    dialogue = checkpoint("x", "x", format_of("dialogue", loaded.tokenizer))
    format = summarize.summary_format(dialogue, loaded)
    assert summarize.summary_prompt(format, " I lent it {title}.\n", "My car", "r/advice") == (
        "SUBREDDIT: r/advice\nTITLE: My car\nPOST: I lent it {title}.\nTL;DR:"
    )
    assert summarize.summary_prompt(format, "I lent it.", "", "") == "POST: I lent it.\nTL;DR:"
    own = {**format, "template": "{post}\nShort:"}
    assert summarize.summary_format(checkpoint("x", "x", own), loaded) == own


# Answers


def test_an_answer_grows_to_what_generate_gives(loaded, pace):
    """Greedy: the text of the last part is that of transformers' own generate, and each part begins the next."""
    ids = torch.tensor([encode_prompt(loaded.tokenizer, "Snails?")])
    out = loaded.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=list(loaded.end_ids))
    expected = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    parts = answers(loaded, Sampling(max_new_tokens=12, do_sample=False), pace=pace)
    assert [part.num_tokens for part in parts] == [*range(1, 13), 12]
    assert parts[-1].text == expected
    assert [part.ended for part in parts] == [""] * 12 + ["length limit"]
    for before, after in pairwise(parts):
        assert after.text.startswith(before.text.rstrip())


def test_one_seed_gives_one_answer(loaded):
    texts = [answers(loaded, Sampling(max_new_tokens=10, seed=seed))[-1].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stopping_ends_within_a_token(loaded, pace):
    """The event is set after the third token, while the fourth may be under way."""
    stop, computed = threading.Event(), []
    handle = loaded.model.register_forward_hook(lambda *_: computed.append(1))
    try:
        parts = []
        for part in load("serving").reply(loaded, "Snails?", Sampling(max_new_tokens=400), stop):
            parts.append(part)
            pace.go()
            if part.num_tokens == 3:
                stop.set()
                pace.go(400)
    finally:
        handle.remove()
    assert (parts[-1].num_tokens, parts[-1].ended) == (3, "stopped")
    assert len(computed) <= 5


def test_closing_an_answer_ends_the_computation_and_lets_the_next_one_start(loaded, pace):
    computed = []
    handle = loaded.model.register_forward_hook(lambda *_: computed.append(1))
    try:
        stream = load("serving").reply(loaded, "Snails?", Sampling(max_new_tokens=400), threading.Event())
        next(stream)
        threading.Timer(0.2, pace.go, [500]).start()
        stream.close()
    finally:
        handle.remove()
    assert len(computed) < 100
    assert answers(loaded, Sampling(max_new_tokens=2))[-1].num_tokens <= 2


def test_an_answer_waits_for_another_one_and_can_be_stopped_while_it_waits(loaded, pace):
    first = load("serving").reply(loaded, "Snails?", Sampling(max_new_tokens=400), threading.Event())
    next(first)
    stop = threading.Event()
    stop.set()
    (part,) = answers(loaded, Sampling(), stop=stop)
    assert (part.num_tokens, part.ended) == (0, "stopped")
    pace.go(500)
    first.close()


def test_a_stop_text_ends_the_answer_and_is_not_shown(loaded):
    """The stop text is the middle of what a greedy answer says without it."""
    whole = answers(loaded, Sampling(max_new_tokens=12, do_sample=False))[-1].text
    middle = whole[len(whole) // 2 :][:4]
    parts = answers(loaded, Sampling(max_new_tokens=400, do_sample=False), stop_texts=["\n\nHuman:", middle])
    assert parts[-1].text == whole[: whole.index(middle)].strip()
    assert parts[-1].ended == "end of turn"
    assert parts[-1].num_tokens < 300
    assert not any(middle in part.text for part in parts)


def test_end_tokens_and_control_tokens_among_the_stop_texts_end_the_answer(loaded):
    """They never show up in the text, so their ids must end it: here the one that greedy sampling gives first."""
    ids = torch.tensor([encode_prompt(loaded.tokenizer, "Snails?")])
    first = int(loaded.model(ids).logits[0, -1].argmax())
    tokenizer = make_control(loaded.tokenizer, first)
    other = dataclasses.replace(loaded, tokenizer=tokenizer)
    sampling = Sampling(max_new_tokens=5, do_sample=False)
    assert answers(other, sampling)[-1].num_tokens == 5
    (*_, last) = answers(other, sampling, stop_texts=[tokenizer.convert_ids_to_tokens(first)])
    assert (last.text, last.num_tokens, last.ended) == ("", 1, "end of turn")
    (*_, last) = answers(dataclasses.replace(other, end_ids=(first,)), sampling)
    assert (last.text, last.num_tokens, last.ended) == ("", 1, "end of turn")


def test_the_sampling_settings_of_a_folder_are_left_out(loaded, folder, tmp_path):
    """A repetition penalty in generation_config.json changes nothing, and its end tokens do count."""
    serving, checkpoint = load("serving"), load("checkpoints").Checkpoint
    make_model_dir(tmp_path)
    settings = {"repetition_penalty": 100.0, "do_sample": True, "eos_token_id": [3, 4]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    other = serving.Models(serving.ServingFlags(experiment_dir=[])).get(checkpoint("x", str(tmp_path)))
    assert set(other.end_ids) == {other.tokenizer.eos_token_id, 3, 4}
    sampling = Sampling(max_new_tokens=20, do_sample=False)
    texts = [answers(dataclasses.replace(model, end_ids=()), sampling)[-1].text for model in (loaded, other)]
    assert texts[0] == texts[1]


def make_control(tokenizer, index: int):
    """A copy of the tokenizer in which one token is a control token."""
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    copy.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(index)]})
    return copy


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Water it.\n\nHum", "Water it."),
        (" Water it.\n", "Water it."),
        (" Caf\ufffd", "Caf"),
        (" Water it.\n\nHumus", "Water it.\n\nHumus"),
    ],
    ids=["half", "start", "character", "other"],
)
def test_half_a_stop_text_and_half_a_character_are_held_back(text, shown):
    assert load("serving")._settled(text, ["\n\nHuman:"]) == shown


def test_a_prompt_longer_than_the_context_is_refused_and_a_long_one_gets_what_is_left(loaded):
    """The tiny model reads 512 tokens."""
    with pytest.raises(UserError, match="reads 512 with its answer"):
        answers(loaded, Sampling(), prompt="x" * 600)
    ids = len(encode_prompt(loaded.tokenizer, "Z" * 505))
    last = answers(loaded, Sampling(max_new_tokens=50, do_sample=False), prompt="Z" * 505)[-1]
    assert (last.num_tokens, last.ended) == (512 - ids, "context full")


def test_a_failure_of_the_model_is_one_sentence_and_the_next_answer_starts(loaded):
    def fail(*_):
        raise RuntimeError("out of memory\nat line 3")

    handle = loaded.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(UserError, match=r"^the model failed \(RuntimeError: out of memory\)$"):
            answers(loaded, Sampling(max_new_tokens=4))
    finally:
        handle.remove()
    assert answers(loaded, Sampling(max_new_tokens=1))[-1].ended


def test_models_used_last_stay_in_memory_and_rewritten_ones_are_read_again(folder, tmp_path):
    serving, checkpoint = load("serving"), load("checkpoints").Checkpoint
    models = serving.Models(serving.ServingFlags(experiment_dir=[], keep_loaded=2))
    a, b = (checkpoint(name, str(folder / name / "final")) for name in ("sft", "dpo"))
    c = checkpoint("c", make_model_dir(tmp_path / "c"))
    first = models.get(a)
    models.get(b)
    assert models.get(a) is first
    models.get(c)
    assert (models.has(a), models.has(b), models.has(c)) == (True, False, True)
    old = models.get(c).model.get_input_embeddings().weight.clone()
    make_model_dir(tmp_path / "c", seed=5)
    assert not models.has(c)
    assert not torch.equal(models.get(c).model.get_input_embeddings().weight, old)


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path):
    serving, checkpoint = load("serving"), load("checkpoints").Checkpoint
    models = serving.Models(serving.ServingFlags(experiment_dir=[]))
    make_model_dir(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="write or copy it again"):
        models.get(checkpoint("c", str(tmp_path / "c")))


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("bf16-true", torch.bfloat16)])
def test_precision(folder, precision, dtype):
    serving, checkpoint = load("serving"), load("checkpoints").Checkpoint
    models = serving.Models(serving.ServingFlags(experiment_dir=[], device="cpu", precision=precision))
    assert models.get(checkpoint("x", str(folder / "base"))).model.dtype == dtype
