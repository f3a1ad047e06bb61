"""The flags that all data preparations share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.data.packed import IGNORE_INDEX
from rlhf.errors import UserError
from rlhf.flags import CheckedFlags


@dataclass(kw_only=True)
class OutputFlags(CheckedFlags):
    """What to write."""

    destination_dir: str
    """Folder that receives the splits. Preparing another stage into the same folder adds to it."""
    tokenizer_name: str
    """Tokenizer of the model that will be trained: a hub id or a local folder."""
    stage: Literal["finetune", "preference", "feedback", "prompts"] = "finetune"
    """What the rows are for: responses to imitate, chosen and rejected pairs, responses labelled good or bad, or
    prompts to sample from."""
    validation_percentage: float = 0.1
    """Share of the prompts, from 0 to 1, that is held out for validation, where the data has no such split."""
    test_percentage: float = 0.1
    """Share of the prompts, from 0 to 1, that is held out for testing, where the data has no such split."""
    shuffle: bool = True
    """Shuffle the rows of each split. False: in the order of the source."""
    seed: int = 42
    """Decides which prompts are held out (the same ones for every stage), and the shuffled order."""
    ignore_index: int = IGNORE_INDEX
    """Value in the targets of finetune rows where nothing is learnt."""


@dataclass(kw_only=True)
class SourceFlags(CheckedFlags):
    """Where the rows come from."""

    dataset_path: str | None = None
    """Local file, or folder of files named train…, validation…, test…: .json, .jsonl, .csv or .parquet, each also
    .gz. The word sample stands for the sample that comes with the script. Unset: the hub."""
    dataset_name: str | None = None
    """Data set of the hub."""
    dataset_subset: str | None = None
    """Folder inside the data set of the hub, such as harmless-base."""
    train_split: str = "auto"
    """Name of the training split in the data set; auto: train."""
    validation_split: str = "auto"
    """Name of the validation split; auto: the usual names; none: cut from the training split."""
    test_split: str = "auto"
    """Name of the test split; auto: the usual name; none: cut from the training split."""
    limit: int | None = None
    """Read at most this many rows of each split."""


@dataclass(kw_only=True)
class FormatFlags(CheckedFlags):
    """How plain texts are written."""

    prompt_template: str = "{prompt}"
    """Text around a plain prompt, such as "Question: {prompt}\\nAnswer:"; a backslash and n stand for a line feed."""
    apply_chat_template: bool = False
    """Put plain texts through the tokenizer's chat template, as one user's message and one assistant's."""

    @property
    def template(self) -> str:
        """`--prompt_template` with its line feeds.

        Raises:
            UserError: it has no place for the prompt.
        """
        template = self.prompt_template.replace("\\n", "\n")
        if "{prompt}" not in template:
            raise UserError(f"--prompt_template={self.prompt_template!r} has no place for the text; write {{prompt}}")
        return template


@dataclass(kw_only=True)
class LimitFlags(CheckedFlags):
    """How long a row may be."""

    max_length: int = 512
    """Most tokens of prompt and response together, EOS included."""
    max_prompt_length: int = 256
    """Most tokens of a prompt."""
    max_response_length: int | None = None
    """Most tokens of a response, EOS included; no limit of its own unless set."""
    truncate: bool = False
    """Cut what is over a limit (prompts at the start, responses at the end, without EOS) instead of dropping it."""


@dataclass(kw_only=True)
class RowFlags(LimitFlags):
    """Which rows are kept."""

    remove_same_inputs: bool = False
    """Keep only the first row of each prompt."""
    remove_same_responses: bool = True
    """Drop pairs whose responses are equal."""
    on_bad_row: Literal["skip", "error"] = "skip"
    """What a broken row does: it is skipped and reported, or it stops the run."""
    max_bad_fraction: float = 0.1
    """Stop if more than this part of the rows is broken."""


@dataclass(kw_only=True)
class WorkFlags(CheckedFlags):
    """How the work is done."""

    num_workers: int = 0
    """Tokenising processes; 0: one for each core, or none where the data is small."""
    trust_remote_code: bool = False
    """Run tokenizer code that comes with the checkpoint."""


@dataclass(kw_only=True)
class PrepareFlags(OutputFlags, SourceFlags, RowFlags, WorkFlags):
    """Data preparation: the flags that all its scripts share."""


def check_flags(flags: PrepareFlags) -> None:
    """Raise `UserError` for the first flag whose value makes no sense, alone or beside the others."""
    if flags.validation_percentage + flags.test_percentage >= 1:
        raise UserError("--validation_percentage and --test_percentage together leave nothing to train on")
    if flags.max_prompt_length >= flags.max_length and flags.stage != "prompts":
        raise UserError(
            f"--max_prompt_length={flags.max_prompt_length} leaves no room for a response within "
            f"--max_length={flags.max_length}; make it smaller"
        )
    if flags.dataset_path is None and not flags.dataset_name:
        raise UserError("no data given; pass --dataset_path with a file or folder, or --dataset_name")
