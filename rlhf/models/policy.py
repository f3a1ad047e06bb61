"""The two roles a language model plays here: a policy gives log-probabilities, a scorer gives scores or values."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.attention import KeepingAttention
from rlhf.models.forward import (
    KEEP,
    accepted,
    forest_states,
    padded_rows,
    place_in_rows,
    states_beside,
    trunk_of,
    unwrapped,
    using_adapter,
)
from rlhf.models.logps import chunked_logps
from rlhf.trees.forest import Forest


class _Role(nn.Module):
    """What policy and scorer share: a model, the way it runs over forests, and the parameters that are its own."""

    def __init__(self, model: PreTrainedModel | PeftModel, uses_trees: bool, adapter: str | None) -> None:
        super().__init__()
        self.model, self.uses_trees, self.adapter = model, uses_trees, adapter
        self.train(model.training)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of this role: where roles share a base, those of its own adapter and head.

        Call it once the role is complete; data-parallel strategies then leave the other roles' parameters alone.
        """
        trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if self.adapter != KEEP:
            trainable = {n: p for n, p in trainable.items() if f".{self.adapter}." in n or n.startswith("head.")}
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_parameters() if name not in trainable]
        return trainable


class Policy(_Role):
    """A causal language model over forests.

    Args:
        model: the transformers model, or its peft wrapper.
        uses_trees: tree attention (True) or ordinary padded rows (False); decided by the probe on loading.
        adapter: the LoRA adapter that this role runs with; None for the base without adapters.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, uses_trees: bool, adapter: str | None = KEEP) -> None:
        super().__init__(model, uses_trees, adapter)

    def forward(
        self,
        forest: Forest,
        *,
        beside: Forest | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        collision: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of every target of the forest, in packed order.

        Args:
            forest: T packed tokens with R targets.
            beside: other branches on the same prompts (roots), tree by tree, with R' targets, outside the graph: they
                go through the model after `forest`, on the keys and values that its prompts left.
            temperature: logits are divided by it, as in sampling.
            entropy: also return the entropy of each target's distribution, in nats.
            collision: instead, also return log sum_v p(v)^2 of that distribution, without a gradient.

        Returns:
            (R,) float32 token log-probabilities, and (R,) entropies or log collisions, or None; with `beside` each is
            (R + R',), its own last.

        Raises:
            ValueError: the prompts of `beside` are not as long as those of `forest`.
        """
        options = {"temperature": temperature, "entropy": entropy, "collision": collision}
        with using_adapter(self.model, self.adapter):
            if not self.uses_trees:
                found = self._padded_logps(forest, **options)
                if beside is None:
                    return found
                with torch.no_grad():
                    other = self._padded_logps(beside, **options)
                return _joined(found, other)
            if beside is None:
                states = forest_states(self.model, forest, at=forest.target_predecessor)
                return self._head_logps(states, forest, **options)
            kept = KeepingAttention(forest)
            states = forest_states(self.model, forest, keeping=kept)
            found = self._head_logps(states[forest.target_predecessor], forest, **options)
            with torch.no_grad():
                states = states_beside(self.model, beside, forest, states, kept)
                kept.release()
                other = self._head_logps(states[beside.target_predecessor], beside, **options)
            return _joined(found, other)

    def _head_logps(self, states: Tensor, forest: Forest, **options) -> tuple[Tensor, Tensor | None]:
        """Of the targets, from the (R, H) states that predict them."""
        targets = forest.input_ids[forest.target_index]
        return head_logps(self.model, states, targets, **options)

    def _padded_logps(self, forest: Forest, *, temperature: float, **wanted) -> tuple[Tensor, Tensor | None]:
        hf, at = unwrapped(self.model), forest.target_predecessor
        logits = hf(**accepted(hf, padded_rows(forest)), use_cache=False).logits
        row, column = place_in_rows(forest)
        targets = forest.input_ids[forest.target_index]
        return logps_of_logits(logits[row[at], column[at]] / temperature, targets, **wanted)


def _joined(one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    logps, entropies = zip(one, other, strict=True)
    return torch.cat(logps), None if entropies[0] is None else torch.cat(entropies)


def head_logps(
    model: PreTrainedModel | PeftModel,
    states: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    collision: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`chunked_logps` with the model's own head, logit scale and cap.

    A head that is not a plain linear layer (it carries a LoRA adapter) keeps its own forward and gives its full
    logits.
    """
    hf = unwrapped(model)
    head, softcap = hf.get_output_embeddings(), logit_softcap(hf.config)
    scale = logit_scale(hf.config) / temperature
    if type(head) is nn.Linear:
        wanted = {"entropy": entropy, "collision": collision}
        return chunked_logps(states, head.weight, head.bias, targets, scale=scale, softcap=softcap, **wanted)
    logits = head(states).float()
    logits = softcap * torch.tanh(logits / softcap) if softcap is not None else logits
    return logps_of_logits(logits * scale, targets, entropy=entropy, collision=collision)


def logps_of_logits(
    logits: Tensor, targets: Tensor, *, entropy: bool = False, collision: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `targets` (R,) under full `logits` (R, V); on request (R,) entropies or log collisions."""
    log_probabilities = logits.float().log_softmax(-1)
    token_logps = log_probabilities.gather(-1, targets[:, None]).squeeze(-1)
    if collision:
        return token_logps, (2 * log_probabilities.detach()).logsumexp(-1)
    return token_logps, -(log_probabilities.exp() * log_probabilities).sum(-1) if entropy else None


def logit_scale(config) -> float:
    """The factor that some architectures put on their logits (Cohere multiplies, Granite divides)."""
    if getattr(config, "logit_scale", None) is not None:
        return float(config.logit_scale)
    return 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)


def logit_softcap(config) -> float | None:
    """The bound that some architectures put on their logits (Gemma-2)."""
    return getattr(config, "final_logit_softcapping", None)


class Scorer(_Role):
    """A language model with a scalar head over forests: a reward model, or the critic of PPO.

    Args:
        model: a sequence classifier with one label (or its peft wrapper), or any model whose trunk is shared.
        head: the linear layer from hidden states to one number.
        uses_trees, adapter: as for `Policy`.

    Attributes:
        reward_mean, reward_scale: a trained reward model's normalisation: reward = (score - mean) / scale.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, head: nn.Module, *, uses_trees: bool, adapter: str | None = KEEP
    ) -> None:
        super().__init__(model, uses_trees, adapter)
        self.head = head
        self.reward_mean, self.reward_scale = 0.0, 1.0

    def forward(self, forest: Forest, at: Tensor) -> Tensor:
        """Scores at packed positions `at` (N,) of the forest: (N,) float32."""
        with using_adapter(self.model, self.adapter):
            if self.uses_trees:
                states = forest_states(self.model, forest, at=at)
            else:
                trunk = trunk_of(self.model)
                row, column = place_in_rows(forest)
                states = trunk(**accepted(trunk, padded_rows(forest)), use_cache=False).last_hidden_state
                states = states[row[at], column[at]]
            return self.head(states).squeeze(-1).float()
