"""Your own data, for any stage: JSON lists, JSON lines, CSV or Parquet, each also gzipped. Forms of a row:

    {"instruction": "...", "response": "..."}                               one Human/Assistant exchange
    {"prompt": "...", "chosen": "...", "rejected": "..."}                   a pair
    {"prompt": "...", "completion": "...", "label": true}                   a response, good or bad
    {"prompt": "..."} or just "..."                                         a prompt to sample from
    {"messages": [{"role": "user", "content": "..."}, ...]}                 a conversation
    {"prompt": [...], "chosen": [...], "rejected": [...]}                   the same with lists of messages

Conversations go through the tokenizer's chat template; for finetune every assistant's turn is learnt, with the
token that ends it. Plain texts are taken as they are: nothing is put between prompt and response.

    python data_prep/custom/prepare_data.py --destination_dir=data/mine --tokenizer_name=facebook/opt-350m \\
        --dataset_path=mine.jsonl --stage=preference
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.data.custom import CustomParser
from rlhf.data.prepare import prepare
from rlhf.data.prepare_flags import FormatFlags
from rlhf.data.prepare_flags import PrepareFlags as SharedFlags
from rlhf.flags import launch


@dataclass(kw_only=True)
class PrepareFlags(SharedFlags, FormatFlags):
    """Plain texts and conversations."""

    assistant_turns: Literal["all", "last"] = "all"
    """Which assistant's turns of a conversation are learnt in finetune: each, or only the last."""


def main(flags: PrepareFlags) -> dict[str, Any]:
    """Prepare one stage; returns its entry in `args.json`."""

    def make_parser(tokenizer: Any) -> CustomParser:
        return CustomParser(
            flags.stage,
            tokenizer,
            remove_same_responses=flags.remove_same_responses,
            prompt_template=flags.template,
            apply_chat_template=flags.apply_chat_template,
            every_turn=flags.assistant_turns == "all",
        )

    return prepare(flags, make_parser, prompt_template=flags.template)


if __name__ == "__main__":
    launch(main, PrepareFlags)
