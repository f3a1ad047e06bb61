"""Reward models as rewards: the scores of a frozen scorer, whatever tokenizer it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.text import encode_pair, encode_prompt, tokenizer_fingerprint
from rlhf.errors import UserError
from rlhf.models.fits import positions_of
from rlhf.models.forward import unwrapped
from rlhf.models.policy import Scorer
from rlhf.rewards.answers import Answers
from rlhf.trees.batches import cut
from rlhf.trees.forest import Forest, Tree


class RewardModel:
    """A frozen scorer as a reward of (prompt, response).

    Args:
        scorer: the reward model.
        tokenizer: its tokenizer; policy_tokenizer: the one of the token ids that will be scored.
        batch_size: responses that go through the scorer at once; all of a call unless set.
        name: what errors call it.

    Attributes:
        positions: the most tokens that it reads; None where its configuration says nothing.

    Where the two differ, prompt and response are decoded and tokenised anew by the one rule of this project
    (`encode_pair`), so that the score is that of the text; else the ids go straight through.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None = None,
        name: str = "the reward model",
    ) -> None:
        self.scorer, self.tokenizer, self.policy_tokenizer = scorer, tokenizer, policy_tokenizer
        self.same_tokenizer = tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(policy_tokenizer)
        self.batch_size, self.name = batch_size, name
        self.positions = positions_of(unwrapped(scorer.model).config)

    def prompt_length(self, prompt: Tensor) -> int:
        """Tokens of a prompt, given in the policy's, in the reward model's own."""
        if self.same_tokenizer:
            return len(prompt)
        return len(encode_prompt(self.tokenizer, self._text_of(prompt)))

    def _text_of(self, ids: Tensor) -> str:
        return self.policy_tokenizer.decode(ids, skip_special_tokens=True)

    def tree(self, prompt: Tensor, response: Tensor, ended: bool) -> Tree:
        """Prompt and response in the reward model's own tokens."""
        if self.same_tokenizer:
            return Tree.of(prompt, response)
        ids = encode_pair(self.tokenizer, self._text_of(prompt), self._text_of(response), ended=ended)
        return Tree.of(*(torch.tensor(part, dtype=torch.long) for part in ids))

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        ended: Sequence[bool],
        place: Callable[[int], str] = "response {}".format,
    ) -> Tensor:
        """Normalised scores, read at the last token of each response: (N,) float32 on the CPU.

        Args:
            place: what errors call the response of this number.

        Raises:
            UserError: prompt and response are more tokens than the reward model has positions.
        """
        trees = [self.tree(*row) for row in zip(prompts, responses, ended, strict=True)]
        for i, tree in enumerate(trees):
            if self.positions is not None and tree.num_tokens > self.positions:
                raise UserError(
                    f"{place(i)}: prompt and response are {tree.num_tokens} tokens of {self.name}, which has "
                    f"{self.positions} positions; make --max_new_tokens smaller, or prepare the data again with a "
                    f"smaller --max_prompt_length"
                )
        device = next(self.scorer.parameters()).device
        scores = []
        for batch in cut(range(len(trees)), micro_batch_size=self.batch_size or max(1, len(trees))):
            forest = Forest([trees[i] for i in batch]).to(device)
            scores.append(self.scorer(forest, forest.branch_last).float())
        return ((torch.cat(scores) - self.scorer.reward_mean) / self.scorer.reward_scale).cpu()

    def judge(self, answers: Answers) -> list[float]:
        """The same of a batch as all kinds of rewards see it."""
        return self(answers.prompt_ids, answers.response_ids, answers.ended, answers.place).tolist()
