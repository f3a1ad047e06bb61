"""What a user gets wrong with the data preparations: one sentence, status 2, nothing written."""

from __future__ import annotations

import gzip
import json

import pytest

from data_prep.arithmetic import prepare_data as arithmetic
from data_prep.custom import prepare_data as custom
from data_prep.helpful_harmless import prepare_data as dialogues
from data_prep.summarization import prepare_data as summaries
from tests import bad_inputs
from tests.bad_inputs import WORDS, Case, EntryPoint, World
from tests.tiny_tokenizers import make_tokenizer

WRITTEN = {"destination_dir": "{out}", "tokenizer_name": "{llama}"}
SOURCED = {**WRITTEN, "dataset_path": "{rows}", "num_workers": "1"}
ENTRIES = {
    "helpful_harmless": EntryPoint(dialogues.main, dialogues.PrepareFlags, SOURCED),
    "summarization": EntryPoint(summaries.main, summaries.PrepareFlags, SOURCED),
    "custom": EntryPoint(custom.main, custom.PrepareFlags, {**SOURCED, "stage": "preference"}),
    "arithmetic": EntryPoint(
        arithmetic.main, arithmetic.PrepareFlags, {**WRITTEN, "num_problems": "20", "levels": ["1", "2"]}
    ),
}

OUTPUT: list[Case] = [
    ({"destination_dir": None}, "--destination_dir is missing"),
    ({"destination_dir": ""}, "--destination_dir is empty"),
    ({"destination_dir": "{file}"}, "--destination_dir={file} is a file; give a folder"),
    ({"destination_dir": "{inside_file}"}, "lies inside {file}, which is a file"),
    ({"destination_dir": "/proc/nothing/data"}, "--destination_dir=/proc/nothing/data can't be written"),
    ({"destination_dir": "{too_long}"}, "file name too long"),
    ({"destination_dir": "{broken_data_args}"}, "{broken_data_args}/args.json can"),
    ({"destination_dir": "{taken}"}, "{taken}/args.json was not written by a prepare_data.py"),
    ({"tokenizer_name": None}, "--tokenizer_name is missing"),
    ({"tokenizer_name": " "}, "--tokenizer_name is empty"),
    ({"tokenizer_name": "{nowhere}"}, "tokenizer '{nowhere}': no such folder"),
    ({"tokenizer_name": "{file}"}, "tokenizer '{file}': no such folder"),
    ({"tokenizer_name": "{empty}"}, "the folder '{empty}' holds no tokenizer"),
    ({"tokenizer_name": "{data}"}, "the folder '{data}' holds no tokenizer"),
    ({"tokenizer_name": "{no_tokenizer}"}, "the folder '{no_tokenizer}' holds no tokenizer"),
    ({"tokenizer_name": "{broken_tokenizer}"}, "the folder '{broken_tokenizer}' holds no tokenizer"),
    ({"tokenizer_name": "{no_eos}"}, "has no EOS token"),
    ({"tokenizer_name": "{too_long}"}, "file name too long"),
    ({"tokenizer_name": "nobody/nothing"}, "the tokenizer 'nobody/nothing' can't be fetched"),
    ({"stage": "pretrain"}, "--stage=pretrain must be one of"),
    ({"validation_percentage": "10"}, "--validation_percentage=10.0 must be in [0, 1]"),
    ({"test_percentage": "-0.1"}, "--test_percentage=-0.1 must be in [0, 1]"),
    ({"validation_percentage": "0.6", "test_percentage": "0.4"}, "together leave nothing to train on"),
    ({"max_length": "0"}, "--max_length=0 must be above 0"),
    ({"max_length": "9", "max_prompt_length": "9", "stage": "finetune"}, "leaves no room for a response"),
    ({"max_length": "3", "max_prompt_length": "1"}, " rows is left to train on with --stage="),
    ({"max_response_length": "0"}, "--max_response_length=0 must be above 0"),
    ({"ignore_index": "5"}, "--ignore_index=5 must be in [-2,147,483,648, -1]"),
    ({"ignore_index": "-99999999999"}, "--ignore_index=-99999999999 must be in"),
    ({"seed": "-1"}, "--seed=-1 must be in [0, "),
    ({"num_workers": "100000"}, "--num_workers=100000 must be in [0, 1,024]"),
    ({"shuffle": "sometimes"}, "--shuffle=sometimes must be True or False"),
    ({"truncate": ""}, "--truncate is empty"),
    ({"args_file": "{empty_json}"}, "--args_file is no flag of this script"),
]
TEMPLATES: list[Case] = [
    ({"prompt_template": "Q:"}, "has no place for the text"),
    ({"prompt_template": ""}, "--prompt_template is empty"),
    ({"prompt_template": "{question}"}, "write {prompt}"),
    ({"apply_chat_template": "True", "tokenizer_name": "{no_template}"}, "has no chat template"),
    ({"apply_chat_template": "True", "tokenizer_name": "{bad_template}"}, "chat template"),
]
SOURCES: list[Case] = [
    ({"dataset_path": "{nowhere}"}, "--dataset_path {nowhere}: no such file or folder"),
    ({"dataset_path": ""}, "--dataset_path is empty"),
    ({"dataset_path": "{too_long}"}, "file name too long"),
    ({"dataset_path": "{empty}"}, "--dataset_path {empty}: no .json"),
    ({"dataset_path": "{file}"}, "--dataset_path {file} is none of .json"),
    ({"dataset_path": "{only_test}"}, "no training file"),
    ({"dataset_path": "{mixed}"}, "stands beside files named for their split"),
    ({"dataset_path": "{rows}", "test_split": "held_out"}, "--test_split=held_out: the data set has no such split"),
    ({"dataset_path": "{rows}", "train_split": "all"}, "--train_split=all: the data set has no such split"),
    ({"dataset_path": None, "dataset_name": "nobody/nothing"}, "the data set 'nobody/nothing' can't be fetched"),
    ({"limit": "0"}, "--limit=0 must be above 0"),
    ({"max_bad_fraction": "2"}, "--max_bad_fraction=2.0 must be in [0, 1]"),
    ({"on_bad_row": "warn"}, "--on_bad_row=warn must be one of skip, error"),
    ({"dataset_path": "{one_bad}", "on_bad_row": "error"}, "{one_bad}:3: "),
    ({"dataset_path": "{one_bad}", "max_bad_fraction": "0.01"}, "{one_bad}:3: "),
]
BROKEN: dict[str, bytes] = {
    "no_bytes.jsonl": b"",
    "blank.jsonl": b"\n\n  \n",
    "no_bytes.json": b"",
    "no_items.json": b"[]",
    "binary.jsonl": bytes(range(256)) * 4,
    "binary.json": b"[" + bytes(range(256)) * 4,
    "no_json.jsonl": b"chosen: a\nrejected: b\n",
    "numbers.jsonl": b"1\n2\n",
    "nulls.jsonl": b"null\nnull\n",
    "numbers.json": b"[1, 2, 3]",
    "lists.jsonl": b'[["a", "b"]]\n',
    "objects.json": b'{"chosen": {"a": 1}, "rejected": [], "prompt": 3}',
    "other_keys.jsonl": b'{"question": "a", "answer": "b"}\n',
    "empty_texts.jsonl": b'{"prompt": "", "chosen": "", "rejected": ""}\n',
    "null_texts.jsonl": b'{"prompt": null, "chosen": null, "rejected": null}\n',
    "surrogates.jsonl": b'{"prompt": "\\ud800", "chosen": "\\ud800", "rejected": "\\udfff"}\n',
    "not_utf8.jsonl": b'{"prompt": "\xff", "chosen": "\xfe", "rejected": "\xfd"}\n',
    "cut.json": b'[{"prompt": "a", "chosen": "b"',
    "too_deep.json": b"[" * 100_000,
    "too_deep.jsonl": b"[" * 100_000,
    "digits.jsonl": b"9" * 5000,
    "header.csv": b"prompt,chosen,rejected\n",
    "columns.csv": b"a,b\n1,2\n",
    "no_table.parquet": b"PAR1 but not really PAR1",
    "no_bytes.parquet": b"",
    "no_gzip.jsonl.gz": b"plain text\n",
    "cut.jsonl.gz": gzip.compress(b'{"prompt": "a"}\n' * 99)[:30],
    "no_bytes.jsonl.gz": b"",
}
"""Files none of whose rows can be used, whatever the form."""

OWN: dict[str, list[Case]] = {
    "helpful_harmless": [({"dataset_path": "{no_turns}"}, "does not start with a Human turn")],
    "summarization": [({"dataset_path": "{no_turns}"}, "missing key 'prompt'")],
    "custom": [
        ({"dataset_path": None}, "no data given"),
        ({"dataset_path": "sample"}, "comes with no sample"),
        ({"dataset_path": "{no_turns}"}, "does not start with a Human turn"),
        ({"assistant_turns": "first"}, "--assistant_turns=first must be one of all, last"),
        *TEMPLATES,
    ],
    "arithmetic": [
        ({"levels": []}, "--levels needs a value"),
        ({"levels": ["0"]}, "--levels=0 must be in [1, 5]"),
        ({"levels": ["1", "1"]}, "--levels 1 1 must be numbers from 1 to 5, each once"),
        ({"levels": ["one"]}, "--levels=one must be a whole number"),
        ({"num_problems": "0"}, "--num_problems=0 must be above 0"),
        ({"stage": "preference"}, "--stage=preference must be one of prompts, finetune"),
        *TEMPLATES,
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = bad_inputs.make_world(tmp_path_factory.mktemp("bad"))
    prompt = "\n\nHuman: {}?\n\nAssistant:"
    rows = [
        {"prompt": prompt.format(i), "chosen": f"{prompt.format(i)} yes", "rejected": f"{prompt.format(i)} no"}
        for i in range(20)
    ]
    lines = [json.dumps(row) for row in rows]
    texts = {
        "rows.jsonl": lines,
        "one_bad.jsonl": [*lines[:2], '{"prompt": 3, "chosen": 4}', *lines[2:]],
        "no_turns.jsonl": ['{"chosen": "yes", "rejected": "no"}'],
        "only_test/test.jsonl": lines,
        "mixed/train.jsonl": lines,
        "mixed/more.jsonl": lines,
    }
    for name, content in texts.items():
        path = made.root / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(content))
        made.paths[name.partition(".")[0]] = str(path)
    for name in ("only_test", "mixed"):
        made.paths[name] = str(made.root / "sources" / name)
    (made.root / "broken").mkdir()
    for name, content in BROKEN.items():
        (made.root / "broken" / name).write_bytes(content)
    tokenizers = {
        "no_template": make_tokenizer(bos=False, pad_is_eos=True, chat_template=False),
        "bad_template": make_tokenizer(bos=False, pad_is_eos=True),
        "no_eos": make_tokenizer(bos=False, pad_is_eos=False),
        "broken_tokenizer": make_tokenizer(bos=False, pad_is_eos=True),
    }
    tokenizers["bad_template"].chat_template = "{{ messages[0].nothing.here }}"
    tokenizers["no_eos"].eos_token = None
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(made.root / name)
        made.paths[name] = str(made.root / name)
    (made.root / "broken_tokenizer" / "tokenizer.json").write_text("{")
    return made


def cases_of(script: str) -> list[Case]:
    """All hand-written cases of a preparation."""
    return [*WORDS, *OUTPUT, *OWN[script], *(SOURCES if script != "arithmetic" else [])]


@pytest.mark.parametrize("script", ENTRIES)
def test_a_mistake_is_one_sentence_status_2_and_nothing_written(world, monkeypatch, capsys, script):
    """DESIGN.md section 11, C40: forty and more for each preparation."""
    cases = cases_of(script)
    assert len(cases) >= 40
    bad_inputs.check_all(ENTRIES[script], world, cases, monkeypatch, capsys)


@pytest.mark.parametrize("script", [name for name in ENTRIES if name != "arithmetic"])
def test_a_file_without_a_usable_row_is_named(world, monkeypatch, capsys, script):
    """C40: empty, binary, cut, of another form; in each of the kinds of file."""
    cases = []
    for name, content in BROKEN.items():
        path = str(world.root / "broken" / name)
        says_nothing = not content.strip() or name in ("no_items.json", "header.csv")
        no_rows = says_nothing and not name.endswith(".parquet")
        cases.append(({"dataset_path": path}, f"{path} holds no rows" if no_rows else path))
    bad_inputs.check_all(ENTRIES[script], world, cases, monkeypatch, capsys)


def test_no_flag_takes_a_value_that_it_cannot_have(tmp_path, monkeypatch, capsys):
    """C21: a word for a number, NaN, infinities, numbers out of range, wrong choices, nothing: for every flag."""
    known: set[str] = set()
    for entry in ENTRIES.values():
        cases = [({name: value}, f"error: --{name}") for name, value in bad_inputs.wrong_values(entry, known)]
        bad_inputs.check_all(entry, World(tmp_path, {}), cases, monkeypatch, capsys)
    assert len(known) >= 30
