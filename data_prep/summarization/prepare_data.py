"""Posts with summaries (CarperAI/openai_summarize_tldr and _comparisons, or files of their kind), for any stage.

Source rows are `{"prompt", "label"}` for the finetune and prompts stages, and `{"prompt", "chosen", "rejected"}` for
the others (and for those two as well, where files are given). Every prompt ends with "TL;DR:", every summary starts
with a space. An over-long post is cut at its last line break that fits, and the prompt keeps its tail.

    python data_prep/summarization/prepare_data.py --destination_dir=data/tldr --tokenizer_name=facebook/opt-350m
    python data_prep/summarization/prepare_data.py --destination_dir=data/tldr --tokenizer_name=facebook/opt-350m \\
        --stage=preference --dataset_path=sample
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.dialogue import SummaryParser
from rlhf.data.prepare import prepare
from rlhf.data.prepare_flags import PrepareFlags as SharedFlags
from rlhf.flags import launch

HUB_NAMES = {
    "finetune": "CarperAI/openai_summarize_tldr",
    "prompts": "CarperAI/openai_summarize_tldr",
    "preference": "CarperAI/openai_summarize_comparisons",
    "feedback": "CarperAI/openai_summarize_comparisons",
}


@dataclass(kw_only=True)
class PrepareFlags(SharedFlags):
    """Summaries."""

    dataset_name: str | None = None
    """Data set of the hub; unset: the one of CarperAI/openai_summarize_* that the stage needs."""


def main(flags: PrepareFlags) -> dict[str, Any]:
    """Prepare one stage; returns its entry in `args.json`."""
    flags = dataclasses.replace(flags, dataset_name=flags.dataset_name or HUB_NAMES[flags.stage])
    parser = SummaryParser(flags.stage, flags.remove_same_responses)
    return prepare(flags, lambda tokenizer: parser, sample=Path(__file__).with_name("sample.jsonl"))


if __name__ == "__main__":
    launch(main, PrepareFlags)
