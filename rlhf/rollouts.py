"""Sampling responses: every prompt prefilled once, ended rows leave, log-probabilities from the sampling pass.

The loop drives the model through the same attention interface as training: the prompts go through packed, as a
forest, and their keys and values are laid out in one buffer a layer; each further token of every row is one more
column. A model that cannot take the interface samples through transformers' own `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from rlhf.masked import widest
from rlhf.models.attention import KeepingAttention, attending
from rlhf.models.decode import Cache, cache_of
from rlhf.models.forward import forest_states, trunk_of, unwrapped, using_adapter
from rlhf.models.lean import LeanTrunk
from rlhf.models.policy import Policy, logit_scale, logit_softcap
from rlhf.trees.forest import Forest, Tree

COMPACT_AT = 0.25
"""Share of ended rows at which the rest is copied together."""
BLOCK = 256
"""Tokens of the vocabulary that sampling sums up before it looks at one."""
LIKELIEST = 1024
"""Tokens among which top-p looks first; it sorts the vocabulary only where these hold less than p."""


@dataclass
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: longest response, in tokens.
        temperature: divisor of the logits.
        top_k, top_p: keep the k likeliest tokens, then the likeliest that hold probability p; 0 and 1 keep all.
        do_sample: False takes the likeliest token.
        stop_ids: token ids that end a response; the token itself is kept.
        seed: of the noise. Each sample has its own stream, so results do not depend on the other rows.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = True
    stop_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass
class Samples:
    """N = prompts x samples responses, the samples of one prompt together.

    Attributes:
        response_ids: N tensors (T_n,) of token ids, the stop token included.
        token_logps: N tensors (T_n,) float32: log-probability of each token under the tempered distribution,
            before top-k and top-p.
        ended: (N,) bool, True where a stop token was drawn before the length limit.
    """

    response_ids: list[Tensor]
    token_logps: list[Tensor]
    ended: Tensor


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    sample_ids: Sequence[int] | None = None,
    max_rows: int | None = None,
) -> Samples:
    """Sample `num_samples` responses to each prompt.

    Args:
        policy: the model; its mode is restored, and dropout is off while it samples.
        prompts: 1-D int64 token ids, at least one token each.
        sampling: how tokens are chosen.
        sample_ids: a number for each of the N samples that names its noise stream; 0 .. N-1 unless set.
        max_rows: most rows decoded at once; all of them unless set. Rows are grouped by prompt length.

    Returns:
        `Samples` in the order of the prompts, on the policy's device.

    Raises:
        ValueError: an empty prompt.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty; it needs at least one token (a BOS, say)")
    num = len(prompts) * num_samples
    ids = list(range(num)) if sample_ids is None else list(sample_ids)
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    step = max(1, (max_rows or num) // num_samples)
    response_ids: list[Tensor | None] = [None] * num
    token_logps: list[Tensor | None] = [None] * num
    ended = torch.zeros(num, dtype=torch.bool)
    training = policy.training
    policy.eval()
    try:
        with using_adapter(policy.model, policy.adapter):
            run = (
                _Decoder(policy, min(step, len(prompts)) * num_samples)
                if policy.uses_trees
                else partial(_generate_in_transformers, policy)
            )
            for first in range(0, len(prompts), step):
                chosen = by_length[first : first + step]
                rows = [i * num_samples + j for i in chosen for j in range(num_samples)]
                out = run([prompts[i] for i in chosen], sampling, num_samples, [ids[r] for r in rows])
                for r, response, logps, end in zip(rows, out.response_ids, out.token_logps, out.ended, strict=True):
                    response_ids[r], token_logps[r], ended[r] = response, logps, end
    finally:
        policy.train(training)
    return Samples(response_ids, token_logps, ended)


class _Decoder:
    """The sampling loop on tree attention, over a lean trunk where the architecture has one."""

    def __init__(self, policy: Policy, rows: int) -> None:
        self.model, self.device = policy.model, next(policy.parameters()).device
        self.hf = unwrapped(policy.model)
        lean = LeanTrunk.of(policy.model, rows)
        self.trunk = lean or _PlainTrunk(trunk_of(policy.model))
        head = self.hf.get_output_embeddings()
        self.head = lean.linear((head,)) if lean and type(head) is nn.Linear else head

    def __call__(self, prompts: list[Tensor], sampling: Sampling, num_samples: int, sample_ids: list[int]) -> Samples:
        device = self.device
        forest = Forest([Tree.of(prompt) for prompt in prompts]).to(device)
        prefill = KeepingAttention(forest)
        states = forest_states(self.model, forest, keeping=prefill, at=forest.branch_last)
        states = states.repeat_interleave(num_samples, 0)
        lengths = [len(prompt) for prompt in prompts]
        cache = cache_of(prefill, lengths, num_samples, lean=isinstance(self.trunk, LeanTrunk))
        del prefill
        depth = torch.tensor(lengths, device=device).repeat_interleave(num_samples)
        noise = _noise(sampling, sample_ids, device)
        stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)

        num = len(depth)
        tokens = torch.zeros(num, sampling.max_new_tokens, dtype=torch.long, device=device)
        logps = torch.zeros(num, sampling.max_new_tokens, device=device)
        counts = torch.full((num,), sampling.max_new_tokens, dtype=torch.long)
        ended = torch.zeros(num, dtype=torch.bool)
        alive = torch.arange(num, device=device)  # the row that each decoded row is
        going = torch.ones(num, dtype=torch.bool, device=device)  # decoded rows that have not ended
        for t in range(sampling.max_new_tokens):
            chosen, chosen_logps = choose(self._logits(states), sampling, noise[alive, t])
            tokens[alive, t], logps[alive, t] = chosen, chosen_logps
            stopped = going & torch.isin(chosen, stop_ids)
            if stopped.any():
                rows = alive[stopped].cpu()
                counts[rows], ended[rows] = t + 1, True
                going &= ~stopped
                if not going.any():
                    break
                if going.float().mean() <= 1 - COMPACT_AT:
                    kept = going.nonzero().squeeze(1)
                    cache.keep(kept)
                    alive, chosen, depth, going = alive[kept], chosen[kept], depth[kept], going[kept]
            if t + 1 == sampling.max_new_tokens:
                break
            cache.advance()
            states = self.trunk(chosen, depth, cache)
            depth = depth + 1
        ids, all_logps = tokens.cpu(), logps.cpu()
        return Samples(
            [ids[i, : counts[i]].to(device) for i in range(num)],
            [all_logps[i, : counts[i]].to(device) for i in range(num)],
            ended,
        )

    def _logits(self, states: Tensor) -> Tensor:
        config = self.hf.config
        logits, softcap = self.head(states).float(), logit_softcap(config)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        scale = logit_scale(config)
        return logits if scale == 1.0 else logits * scale


class _PlainTrunk:
    """The model's own trunk, called as a lean one is."""

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk = trunk

    def __call__(self, input_ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        given = {"input_ids": input_ids[:, None], "position_ids": positions[:, None]}
        with attending(cache):
            return self.trunk(**given, use_cache=False, return_dict=True).last_hidden_state[:, 0]


def _noise(sampling: Sampling, sample_ids: list[int], device) -> Tensor:
    """(N, max_new_tokens) uniforms in [0, 1), one stream a sample, drawn on the CPU so that devices agree."""
    if not sampling.do_sample:
        return torch.zeros(len(sample_ids), sampling.max_new_tokens, device=device)
    streams = []
    for sample in sample_ids:
        generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + sample) % 2**63)
        streams.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(streams).to(device, widest(torch.device(device)))


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Choose one token a row by inverting the cumulative distribution at `uniform`.

    Args:
        logits: (B, V); uniform: (B,) in [0, 1), ignored when `sampling.do_sample` is False.

    Returns:
        (B,) token ids, and their (B,) log-probabilities under the tempered distribution before any filter.

    >>> choose(torch.tensor([[0.0, 2.0, 1.0]]), Sampling(do_sample=False), torch.zeros(1))[0]
    tensor([1])
    """
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    if not sampling.do_sample:
        chosen, total = logits.argmax(-1, keepdim=True), weights.sum(-1, keepdim=True)
    elif sampling.top_k or sampling.top_p < 1.0:
        total = weights.sum(-1, keepdim=True)
        kept, index = _filtered(weights, total, sampling)
        chosen = index.gather(-1, _inverted(kept, uniform))
    else:
        # Two levels: first the block of the vocabulary, then the token in it. One pass over the row, no running sum.
        blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        sums = blocks.sum(-1)
        total = sums.sum(-1, keepdim=True)
        wide = widest(logits.device)
        cumulative = sums.cumsum(-1, dtype=wide)
        target = uniform[:, None] * cumulative[:, -1:]
        block = _place(cumulative, sums, target)
        before = (cumulative - sums).gather(-1, block)
        inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1)
        chosen = block * BLOCK + _place(inside.cumsum(-1, dtype=wide), inside, target - before)
        # Where logits are NaN so is the log-probability; the id must be one of the vocabulary all the same.
        chosen = chosen.clamp(max=logits.shape[-1] - 1)
    logps = logits.gather(-1, chosen) - top - total.log()
    return chosen.squeeze(-1), logps.squeeze(-1)


def _filtered(weights: Tensor, total: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(B, K) weights in falling order of the tokens that top-k and top-p leave, 0 for others, and their ids."""
    vocabulary = weights.shape[-1]
    k = min(sampling.top_k or LIKELIEST, vocabulary)
    kept, index = weights.topk(k, dim=-1)
    if not sampling.top_k and (kept.sum(-1, keepdim=True) < sampling.top_p * total).any():
        kept, index = weights.sort(-1, descending=True)
    if sampling.top_p < 1.0:
        # A token stays while the likelier ones before it hold less than top_p (of what top-k left).
        mass = (kept.sum(-1, keepdim=True) if sampling.top_k else total) * sampling.top_p
        kept = kept * (kept.cumsum(-1) - kept < mass)
    return kept, index


def _inverted(weights: Tensor, uniform: Tensor) -> Tensor:
    """(B, 1) the place where the cumulative distribution of (B, K) weights passes `uniform`."""
    cumulative = weights.cumsum(-1, dtype=widest(weights.device))
    return _place(cumulative, weights, uniform[:, None] * cumulative[:, -1:])


def _place(cumulative: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """The first place whose cumulative weight is above the target; rounding never leads past the last weight."""
    place = torch.searchsorted(cumulative, target, right=True)
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.minimum(place, last)


def _generate_in_transformers(
    policy: Policy, prompts: list[Tensor], sampling: Sampling, num_samples: int, sample_ids: list[int]
) -> Samples:
    """The fallback: one row at a time through `generate`, its noise from the same seeds.

    The model's own generation settings (a repetition penalty, a least length) are left out, as they are in the loop
    above: log-probabilities know nothing of them.
    """
    hf, device = unwrapped(policy.model), next(policy.parameters()).device
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    samples = Samples([], [], torch.zeros(len(sample_ids), dtype=torch.bool))
    own_settings, hf.generation_config = hf.generation_config, GenerationConfig()
    try:
        for row, sample in enumerate(sample_ids):
            prompt = prompts[row // num_samples].to(device)[None]
            with torch.random.fork_rng():
                torch.manual_seed((sampling.seed * 1_000_003 + sample) % 2**63)
                out = hf.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=sampling.max_new_tokens,
                    do_sample=sampling.do_sample,
                    eos_token_id=list(sampling.stop_ids) or None,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                    use_cache=True,
                    remove_invalid_values=True,  # of the draw, which would fail; the logits that come back have them
                    **(options if sampling.do_sample else {}),
                )
            response = out.sequences[0, prompt.shape[1] :]
            log_probabilities = (torch.stack(out.logits, 1)[0].float() / sampling.temperature).log_softmax(-1)
            samples.response_ids.append(response)
            samples.token_logps.append(log_probabilities.gather(-1, response[:, None]).squeeze(-1))
            samples.ended[row] = bool(len(response)) and int(response[-1]) in sampling.stop_ids
    finally:
        hf.generation_config = own_settings
    return samples
