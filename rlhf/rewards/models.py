"""Reward models as rewards: the scores of a frozen scorer, whatever tokenizer it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.text import encode_pair, tokenizer_fingerprint
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
    ) -> None:
        self.scorer, self.tokenizer, self.policy_tokenizer = scorer, tokenizer, policy_tokenizer
        self.same_tokenizer = tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(policy_tokenizer)
        self.batch_size = batch_size

    def tree(self, prompt: Tensor, response: Tensor, ended: bool) -> Tree:
        """Prompt and response in the reward model's own tokens."""
        if self.same_tokenizer:
            return Tree.of(prompt, response)
        texts = [self.policy_tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, response)]
        ids = encode_pair(self.tokenizer, *texts, ended=ended)
        return Tree.of(*(torch.tensor(part, dtype=torch.long) for part in ids))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Tensor], responses: Sequence[Tensor], ended: Sequence[bool]) -> Tensor:
        """Normalised scores, read at the last token of each response: (N,) float32 on the CPU."""
        trees = [self.tree(*row) for row in zip(prompts, responses, ended, strict=True)]
        device = next(self.scorer.parameters()).device
        scores = []
        for batch in cut(range(len(trees)), micro_batch_size=self.batch_size or max(1, len(trees))):
            forest = Forest([trees[i] for i in batch]).to(device)
            scores.append(self.scorer(forest, forest.branch_last).float())
        return ((torch.cat(scores) - self.scorer.reward_mean) / self.scorer.reward_scale).cpu()

    def judge(self, answers: Answers) -> list[float]:
        """The same of a batch as all kinds of rewards see it."""
        return self(answers.prompt_ids, answers.response_ids, answers.ended).tolist()
