"""The splits that a run reads: loaded once a machine, noted for data.json, and checked against the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.prompts import Prompts, example_prompt, load_prompts
from rlhf.data.splits import Split, check_tokenizer, data_info, has_split, load_split
from rlhf.data.text import tokenizer_fingerprint
from rlhf.errors import UserError
from rlhf.experiment.fits import check_prompt, check_reward_model, check_split, check_vocabulary
from rlhf.models.loading import tokenizer_of
from rlhf.rewards.mix import Rewards


class Inputs:
    """What a run has read of its data folder.

    Attributes:
        info: for data.json: how the data was made, and a hash of the rows of every split that was read.
    """

    def __init__(self, fabric: Fabric, flags: Any) -> None:
        self.fabric, self.flags = fabric, flags
        self.info: dict[str, Any] = {}
        self._read: list[tuple[Split, int | None]] = []
        self._prompts: list[Prompts] = []
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """The hash of every split that was read, by stage and name."""
        return self.info.get("read", {})

    def load_splits(self, stage: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Split, Split | None]:
        """The train and validation splits of a stage (None where there is no validation file).

        Raises:
            UserError: no training split, or one tokenised by another tokenizer than the model's.
        """
        with self.fabric.rank_zero_first(local=True):
            train = load_split(self.flags.data_dir, stage, "train")
            has_validation = has_split(self.flags.data_dir, stage, "validation")
            validation = load_split(self.flags.data_dir, stage, "validation") if has_validation else None
        for split in (train, validation):
            if split is not None:
                check_tokenizer(split, tokenizer)
                self._note(split, tokenizer)
        return train, validation

    def load_prompts(self, name: str, tokenizer: PreTrainedTokenizerBase) -> Prompts | None:
        """The prompts of a split, from whatever stage the data folder has; None where it has none."""
        with self.fabric.rank_zero_first(local=True):
            prompts = load_prompts(self.flags.data_dir, name, tokenizer)
        if prompts is not None:
            self._prompts.append(prompts)
            self._note(prompts.split, tokenizer, new_tokens=getattr(self.flags, "max_new_tokens", 0))
        return prompts

    def _note(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, new_tokens: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._read.append((split, new_tokens))
        read = {**self.fingerprints, f"{split.stage}_{split.name}": split.fingerprint}
        self.info = {**data_info(self.flags.data_dir), "read": read}

    def check_fit(self, model: PreTrainedModel) -> None:
        """See that what was read fits a model that will train on it.

        Raises:
            UserError: a row, the example prompt, or a token of their tokenizer, does not.
        """
        if self._tokenizer is not None:
            check_vocabulary(self._tokenizer, model)
        for split, new_tokens in self._read:
            check_split(split, model, new_tokens=new_tokens)
        prompt = example_prompt(self.flags.data_dir)
        if prompt is not None and hasattr(self.flags, "max_new_tokens"):
            where = f"{self.flags.data_dir}/example_prompt.pt"
            check_prompt(prompt, self.flags.max_new_tokens, model, where)

    def check_reference(self, source: str, model: PreTrainedModel) -> None:
        """See that another model than the policy can be its reference: it reads the same tokens, and all rows.

        Args:
            source: what `resolve` returned for it; a folder without a tokenizer is taken to have the policy's.

        Raises:
            UserError: it has another tokenizer, or a row or a token does not fit it.
        """
        if not Path(source).is_dir() or (Path(source) / "tokenizer_config.json").is_file():
            theirs = tokenizer_of(source, self.flags)
            if tokenizer_fingerprint(theirs) != tokenizer_fingerprint(self._tokenizer):
                raise UserError(
                    f"the reference {source} has another tokenizer than the policy, whose tokens it would read; give a "
                    f"reference with the policy's"
                )
        name = f"the reference {source}"
        check_vocabulary(self._tokenizer, model, name)
        for split, new_tokens in self._read:
            check_split(split, model, new_tokens=new_tokens, name=name)

    def check_rewards(self, rewards: Rewards) -> list[str]:
        """See that the reward models of a mix can read the prompts that were loaded, with responses to them.

        Returns:
            Warnings: what a reward model with a tokenizer of its own may find too long.

        Raises:
            UserError: what one of them can't read (`check_reward_model`).
        """
        models = [part.model for part in rewards.parts if part.model is not None]
        found = [check_reward_model(p, model, self.flags.max_new_tokens) for model in models for p in self._prompts]
        return [warning for warning in found if warning is not None]
