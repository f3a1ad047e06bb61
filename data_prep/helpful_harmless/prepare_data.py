"""Dialogues with a better and a worse last response (Anthropic/hh-rlhf, or files of its kind), for any stage.

Each source row holds two whole dialogues, `chosen` and `rejected`, in "\\n\\nHuman: … \\n\\nAssistant: …" turns. The
prompt is everything up to and including the last "\\n\\nAssistant:", the response what follows it; rows whose two
prompts differ are dropped and counted.

    python data_prep/helpful_harmless/prepare_data.py --destination_dir=data/hh --tokenizer_name=facebook/opt-350m
    python data_prep/helpful_harmless/prepare_data.py --destination_dir=data/hh --tokenizer_name=facebook/opt-350m \\
        --stage=preference --dataset_path=sample
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.dialogue import DialogueParser
from rlhf.data.prepare import prepare
from rlhf.data.prepare_flags import PrepareFlags as SharedFlags
from rlhf.flags import launch


@dataclass(kw_only=True)
class PrepareFlags(SharedFlags):
    """Dialogue data."""

    dataset_name: str = "Anthropic/hh-rlhf"
    """Data set of the hub."""


def main(flags: PrepareFlags) -> dict[str, Any]:
    """Prepare one stage; returns its entry in `args.json`."""
    parser = DialogueParser(flags.stage, flags.remove_same_responses)
    return prepare(flags, lambda tokenizer: parser, sample=Path(__file__).with_name("sample.jsonl"))


if __name__ == "__main__":
    launch(main, PrepareFlags)
