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
from rlhf.data.prepare_flags import PrepareFlags as SharedFlags
from rlhf.errors import UserError
from rlhf.flags import launch


@dataclass(kw_only=True)
class PrepareFlags(SharedFlags):
    """Plain texts and conversations."""

    prompt_template: str = "{prompt}"
    """Text around a plain prompt, such as "Question: {prompt}\\nAnswer:"; a backslash and n stand for a line feed."""
    apply_chat_template: bool = False
    """Put plain texts through the tokenizer's chat template, as one user's message and one assistant's."""
    assistant_turns: Literal["all", "last"] = "all"
    """Which assistant's turns of a conversation are learnt in finetune: each, or only the last."""


def main(flags: PrepareFlags) -> dict[str, Any]:
    """Prepare one stage; returns its entry in `args.json`."""
    template = flags.prompt_template.replace("\\n", "\n")
    if "{prompt}" not in template:
        raise UserError(f"--prompt_template={flags.prompt_template!r} has no place for the text; write {{prompt}}")

    def make_parser(tokenizer: Any) -> CustomParser:
        if flags.apply_chat_template and not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {flags.tokenizer_name!r} has no chat template, which --apply_chat_template needs; "
                "take the tokenizer of an instruct model"
            )
        return CustomParser(
            flags.stage,
            tokenizer,
            remove_same_responses=flags.remove_same_responses,
            prompt_template=template,
            apply_chat_template=flags.apply_chat_template,
            every_turn=flags.assistant_turns == "all",
        )

    return prepare(flags, make_parser, prompt_template=template)


if __name__ == "__main__":
    launch(main, PrepareFlags)
