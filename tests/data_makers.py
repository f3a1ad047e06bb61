"""Source rows made up in the test, and preparations of them in process."""

from __future__ import annotations

import json

import numpy as np

from rlhf.data.packed import SCHEMAS, SPLIT_NAMES
from rlhf.data.splits import has_split, load_split
from tests.tiny_tokenizers import make_tokenizer

WORDS = ["one", "two", "three", "four", "garden", "water", "lettuce", "Paris", "France", "car", "summer", "plants"]


def save_tokenizers(tmp_path_factory) -> dict:
    """Folders of tiny tokenizers, all with pad = EOS: without BOS (False) and with one (True)."""
    folders = {}
    for bos in (False, True):
        folders[bos] = tmp_path_factory.mktemp("tokenizer")
        make_tokenizer(bos=bos, pad_is_eos=True).save_pretrained(folders[bos])
    return folders


def write_rows(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def some_words(rng, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def dialogue_rows(num_rows: int, seed: int = 0, num_prompts: int | None = None) -> list[dict]:
    rng = np.random.default_rng(seed)
    prompts = [
        f"\n\nHuman: {i} {some_words(rng, 1, 9)}\n\nAssistant: Yes.\n\nHuman: {some_words(rng, 1, 9)}\n\nAssistant:"
        for i in range(num_prompts or num_rows)
    ]
    return [
        {
            "chosen": f"{prompts[i % len(prompts)]} {some_words(rng, 1, 20)} {i}.",
            "rejected": f"{prompts[i % len(prompts)]} {some_words(rng, 1, 20)} {i}!",
        }
        for i in range(num_rows)
    ]


def run(module, tmp_path, tokenizers, rows=None, *, bos=True, name="data", **flags):
    """Prepare `rows`; returns the destination and the stage's entry in args.json."""
    if rows is not None:
        flags["dataset_path"] = write_rows(tmp_path / "source" / f"{name}.jsonl", rows)
    flags = {"destination_dir": str(tmp_path / name), "tokenizer_name": str(tokenizers[bos]), **flags}
    return tmp_path / name, module.main(module.PrepareFlags(**flags))


def all_rows(folder, stage) -> list[dict]:
    return [row for name in SPLIT_NAMES if has_split(folder, stage, name) for row in load_split(folder, stage, name)]


def files(*stages: str, splits=SPLIT_NAMES) -> list[str]:
    of_stages = [f"{stage}_{name}.{suffix}" for stage in stages for name in splits for suffix in ("pt", "safetensors")]
    return sorted([*of_stages, "args.json", "example_prompt.pt", *(f"lengths_{stage}.png" for stage in stages)])


def prompts_of(folder, stage) -> dict[str, set]:
    column = SCHEMAS[stage].sequences[0]
    return {
        name: {tuple(row[column][: row["prompt_len"]].tolist()) for row in load_split(folder, stage, name)}
        for name in SPLIT_NAMES
    }
