"""Tiny prepared data, and tiny model folders that fit it: what a training script needs to run in a test."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.data.formats import format_of
from rlhf.data.splits import IGNORE_INDEX, write_split
from rlhf.data.text import encode_pair, encode_prompt, tokenizer_fingerprint
from rlhf.files import write_json
from tests.tiny import make_model
from tests.tiny_tokenizers import make_tokenizer

_SENTENCE = "the garden needs water and a little care when summer is dry so keep it in the shade"


@lru_cache
def tokenizer_for(*, pad_is_eos: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that `make_data` and `make_model_dir` use unless told otherwise."""
    return make_tokenizer(bos=False, pad_is_eos=pad_is_eos)


def make_texts(num: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Prompts with a chosen and a rejected response, of very unequal lengths; the chosen ones say "Yes"."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choice(_SENTENCE.split()) for _ in range(draw.randint(low, high)))

    return [
        {
            "prompt": f"\n\nHuman: {words(1, 12)} {i}?\n\nAssistant:",
            "chosen": f" Yes, {words(1, 15 if i % 3 else 2)}.",
            "rejected": f" No, {words(1, 2 if i % 4 else 15)}.",
        }
        for i in range(num)
    ]


def make_data(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    num_train: int = 14,
    num_validation: int = 6,
    seed: int = 0,
) -> str:
    """Write the splits of all four stages, as a prepare_data.py does, and return the folder's path."""
    tokenizer = tokenizer or tokenizer_for()
    texts = make_texts(num_train + num_validation, seed=seed)
    for name, part in (("train", texts[:num_train]), ("validation", texts[num_train:])):
        for stage, rows in _rows_of(tokenizer, part).items():
            if rows:
                write_split(folder, stage, name, rows)
    entry = {
        "tokenizer": {"name": "tiny", "fingerprint": tokenizer_fingerprint(tokenizer)},
        "format": format_of("dialogue", tokenizer),
    }
    stages = ("finetune", "preference", "feedback", "prompts")
    write_json(folder / "args.json", {"stages": dict.fromkeys(stages, entry)})
    ids = torch.tensor([encode_prompt(tokenizer, texts[-1]["prompt"])])
    torch.save(
        {"prompt": texts[-1]["prompt"], "input_ids": ids, "attention_mask": torch.ones_like(ids)},
        folder / "example_prompt.pt",
    )
    return str(folder)


def _rows_of(tokenizer: PreTrainedTokenizerBase, texts: list[dict[str, str]]) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {"finetune": [], "preference": [], "feedback": [], "prompts": []}
    for i, text in enumerate(texts):
        prompt, chosen = encode_pair(tokenizer, text["prompt"], text["chosen"])
        _, rejected = encode_pair(tokenizer, text["prompt"], text["rejected"])
        n = len(prompt)
        ids, other = torch.tensor(prompt + chosen), torch.tensor(prompt + rejected)
        targets = ids.clone()
        targets[:n] = IGNORE_INDEX
        rows["finetune"].append({"prompt_len": n, "input_ids": ids, "targets": targets})
        rows["preference"].append({"prompt_len": n, "chosen_input_ids": ids, "rejected_input_ids": other})
        rows["feedback"].append({"prompt_len": n, "input_ids": other if i % 2 else ids, "label": i % 2 == 0})
        rows["prompts"].append({"prompt_len": n, "input_ids": ids[:n], "reference": text["chosen"]})
    return rows


def make_model_dir(
    folder: Path,
    architecture: str = "llama",
    *,
    scorer: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    **overrides,
) -> str:
    """Save a seeded tiny model with its tokenizer as a Hugging Face folder, and return the folder's path."""
    tokenizer = tokenizer or tokenizer_for()
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    make_model(architecture, scorer=scorer, seed=seed, **{**ids, **overrides}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


_QUICK = {
    "accelerator": "cpu",
    "precision": "32-true",
    "logger": "none",
    "memory_check": "none",
    "mini_batch_size": 4,
    "epochs": 99.0,
    "max_steps": 2,
    "eval_interval": 0,
    "save_interval": 0,
    "max_new_tokens": 4,
    "learning_rate": 1e-2,
}


def quick_flags(flags_class: type, data_dir: str, experiment_dir: Path, **given: Any) -> Any:
    """Flags of a run of two steps on the CPU that logs and saves no more than it must, changed by `given`."""
    names = {field.name for field in dataclasses.fields(flags_class)}
    quick = {name: value for name, value in _QUICK.items() if name in names}
    return flags_class(**{**quick, "data_dir": data_dir, "experiment_dir": str(experiment_dir), **given})


def metrics_of(experiment_dir: str | Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(experiment_dir) / "metrics.jsonl").read_text().splitlines()]
