"""Sampling responses: every prompt prefilled once, ended rows leave, log-probabilities from the sampling pass.

The loop drives the model through the same attention interface as training: the prompts go through packed, as a
forest, and their keys and values are laid out in one buffer a layer; each further token of every row is one more
column. A model that cannot take the interface samples through transformers' own `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig

from rlhf.models.attention import TreeAttention, attend, attending
from rlhf.models.forward import packed_states, trunk_of, unwrapped, using_adapter
from rlhf.models.policy import Policy, logit_scale, logit_softcap
from rlhf.trees.forest import Forest, Tree

COMPACT_AT = 0.25
"""Share of ended rows at which the rest is copied together."""


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
    run = _decode if policy.uses_trees else _generate_in_transformers
    try:
        for first in range(0, len(prompts), step):
            chosen = by_length[first : first + step]
            rows = [i * num_samples + j for i in chosen for j in range(num_samples)]
            with using_adapter(policy.model, policy.adapter):
                out = run(policy, [prompts[i] for i in chosen], sampling, num_samples, [ids[r] for r in rows])
            for r, response, logps, end in zip(rows, out.response_ids, out.token_logps, out.ended, strict=True):
                response_ids[r], token_logps[r], ended[r] = response, logps, end
    finally:
        policy.train(training)
    return Samples(response_ids, token_logps, ended)


class _Prefill(TreeAttention):
    """Tree attention that keeps every layer's keys and values."""

    def __init__(self, forest: Forest) -> None:
        super().__init__(forest)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer, query, key, value, **options) -> Tensor:
        self.layers[id(layer)] = (key[0], value[0])
        return super().__call__(layer, query, key, value, **options)


class _Decode:
    """One new token a row against buffers of keys and values, right-aligned so that all rows write one column.

    Buffers are (rows, kv_heads, columns, D). Row b's tokens stand in columns starts[b] .. length - 1.
    """

    def __init__(self, prefill: _Prefill, lengths: list[int], num_samples: int, room: int) -> None:
        self.length = max(lengths)
        self.room = self.length + room
        device = prefill.forest.input_ids.device
        starts = [self.length - n for n in lengths for _ in range(num_samples)]
        self.starts = torch.tensor(starts, device=device)
        self.buffers = {layer: self._laid_out(k, v, lengths, num_samples) for layer, (k, v) in prefill.layers.items()}
        self._make_mask()

    def _laid_out(self, key: Tensor, value: Tensor, lengths: list[int], num_samples: int) -> list[Tensor]:
        out = []
        for x in (key, value):
            buffer = x.new_zeros(len(lengths), num_samples, x.shape[0], self.room, x.shape[2])
            for b, part in enumerate(x.split(lengths, dim=1)):
                buffer[b, :, :, self.length - lengths[b] : self.length] = part
            out.append(buffer.flatten(0, 1))
        return out

    def _make_mask(self) -> None:
        columns = torch.arange(self.room, device=self.starts.device)
        hidden = columns[None] < self.starts[:, None]
        self.mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))[:, None, None]

    def advance(self) -> None:
        """Make room for one more column."""
        self.length += 1

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.starts = self.starts[rows]
        for pair in self.buffers.values():
            pair[:] = [buffer[rows] for buffer in pair]
        self._make_mask()

    def __call__(self, layer, query, key, value, *, scaling, dropout, window, softcap) -> Tensor:
        keys, values = self.buffers[id(layer)]
        keys[:, :, self.length - 1] = key[:, :, 0]
        values[:, :, self.length - 1] = value[:, :, 0]
        first = 0 if window is None else max(0, self.length - window)
        b, heads, _, d = query.shape
        # The query heads of one key head are the rows of one product: nothing is repeated.
        grouped = query.view(b, keys.shape[1], heads // keys.shape[1], d)
        out = attend(
            grouped,
            keys[:, :, first : self.length],
            values[:, :, first : self.length],
            self.mask[..., first : self.length].to(query.dtype),
            scaling=scaling,
            softcap=softcap,
        )
        return out.view(b, 1, heads, -1)


def _decode(
    policy: Policy, prompts: list[Tensor], sampling: Sampling, num_samples: int, sample_ids: list[int]
) -> Samples:
    hf, device = unwrapped(policy.model), next(policy.parameters()).device
    forest = Forest([Tree.of(prompt) for prompt in prompts]).to(device)
    prefill = _Prefill(forest)
    states, _ = packed_states(policy.model, forest, plan=prefill)
    states = states[forest.branch_last].repeat_interleave(num_samples, 0)
    lengths = [len(prompt) for prompt in prompts]
    cache = _Decode(prefill, lengths, num_samples, sampling.max_new_tokens)
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
    trunk = trunk_of(policy.model)
    for t in range(sampling.max_new_tokens):
        chosen, chosen_logps = choose(_logits(hf, states), sampling, noise[alive, t])
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
        with attending(cache):
            states = trunk(
                input_ids=chosen[:, None], position_ids=depth[:, None], use_cache=False, return_dict=True
            ).last_hidden_state[:, 0]
        depth = depth + 1
    ids, all_logps = tokens.cpu(), logps.cpu()
    return Samples(
        [ids[i, : counts[i]].to(device) for i in range(num)],
        [all_logps[i, : counts[i]].to(device) for i in range(num)],
        ended,
    )


def _logits(hf, states: Tensor) -> Tensor:
    logits = hf.get_output_embeddings()(states).float()
    softcap = logit_softcap(hf.config)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits * logit_scale(hf.config)


def _noise(sampling: Sampling, sample_ids: list[int], device) -> Tensor:
    """(N, max_new_tokens) uniforms in [0, 1), one stream a sample, drawn on the CPU so that devices agree."""
    if not sampling.do_sample:
        return torch.zeros(len(sample_ids), sampling.max_new_tokens, device=device)
    streams = []
    for sample in sample_ids:
        generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + sample) % 2**63)
        streams.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(streams).to(device)


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Choose one token a row by inverting the cumulative distribution at `uniform`.

    Args:
        logits: (B, V); uniform: (B,) in [0, 1), ignored when `sampling.do_sample` is False.

    Returns:
        (B,) token ids, and their (B,) log-probabilities under the tempered distribution before any filter.

    >>> choose(torch.tensor([[0.0, 2.0, 1.0]]), Sampling(do_sample=False), torch.zeros(1))[0]
    tensor([1])
    """
    log_probabilities = (logits / sampling.temperature).log_softmax(-1)
    if not sampling.do_sample:
        chosen = logits.argmax(-1)
        return chosen, log_probabilities.gather(-1, chosen[:, None]).squeeze(-1)
    if sampling.top_k or sampling.top_p < 1.0:
        k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
        probabilities, index = log_probabilities.topk(k, dim=-1)
        probabilities = probabilities.softmax(-1)
        if sampling.top_p < 1.0:
            # A token stays while the likelier ones before it hold less than top_p.
            probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < sampling.top_p)
    else:
        probabilities, index = log_probabilities.exp(), None
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    # Rounding must not lead past the last token that has any probability.
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).to(torch.uint8).argmax(-1, keepdim=True)
    place = torch.minimum(place, last)
    chosen = (place if index is None else index.gather(-1, place)).squeeze(-1)
    return chosen, log_probabilities.gather(-1, chosen[:, None]).squeeze(-1)


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
