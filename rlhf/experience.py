"""Sampled responses with everything that PPO learns from them, as records and as dense arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.data.prompts import Prompts
from rlhf.evaluation import sampling_of
from rlhf.experiment.run import Run
from rlhf.models.roles import Roles
from rlhf.rewards import RewardModel
from rlhf.rollouts import generate
from rlhf.trees.batches import cut
from rlhf.trees.forest import Forest, Tree


@dataclass
class Experience:
    """One response of T tokens, on the CPU.

    Attributes:
        position: its place among the rows of the step, over all devices.
        prompt, response: token ids.
        old_logps: (T,) log-probabilities of the response's tokens under the policy that sampled them.
        ref_logps: (T,) the same under the reference.
        values: (T + 1,) the critic before each token, and after the last (the end state).
        score: normalised score of the whole response.
        ended: whether it holds a stop token.
    """

    position: int
    prompt: Tensor
    response: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    values: Tensor
    score: float
    ended: bool

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class Rollout:
    """N experiences side by side, right-padded to L columns: the longest response a run allows.

    Attributes:
        response_mask: (N, L) True at response tokens.
        old_logps, ref_logps: (N, L).
        values: (N, L): before each token, and at the end state where L leaves room for it.
        scores: (N,); ended: (N,) bool.
    """

    response_mask: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    values: Tensor
    scores: Tensor
    ended: Tensor


@dataclass
class Targets:
    """What one rollout trains on, (N, L) each.

    Attributes:
        token_kl: the KL estimate that each token's reward is charged with.
        advantages: of the response tokens, whitened where the run asks for it.
        returns: what the critic learns; value_mask: where it does.
    """

    token_kl: Tensor
    advantages: Tensor
    returns: Tensor
    value_mask: Tensor


def stack(experiences: Sequence[Experience], width: int) -> Rollout:
    """Lay experiences out as one `Rollout` of `width` columns.

    Raises:
        ValueError: a response is longer than `width`.
    """
    num = len(experiences)
    lengths = torch.tensor([len(e.response) for e in experiences])
    if num and int(lengths.max()) > width:
        raise ValueError(f"a response of {int(lengths.max())} tokens does not fit {width} columns")
    old_logps, ref_logps, values = (torch.zeros(num, width) for _ in range(3))
    for i, e in enumerate(experiences):
        n = len(e.response)
        old_logps[i, :n], ref_logps[i, :n] = e.old_logps, e.ref_logps
        values[i, : n + 1] = e.values[: width if n == width else n + 1]
    return Rollout(
        response_mask=torch.arange(width) < lengths[:, None],
        old_logps=old_logps,
        ref_logps=ref_logps,
        values=values,
        scores=torch.tensor([e.score for e in experiences]),
        ended=torch.tensor([e.ended for e in experiences], dtype=torch.bool),
    )


def value_index(forest: Forest, has_end: Tensor) -> Tensor:
    """(V,) packed positions at which the critic is read: before each response token, then at the end states."""
    return torch.cat([forest.target_predecessor, forest.branch_last[has_end]])


@torch.no_grad()
def collect(
    run: Run, flags: Any, roles: Roles, reward: RewardModel, prompts: Prompts, rows: list[int], temperature: float
) -> list[Experience]:
    """Sample one response to each prompt of `rows` (over all devices), and judge it by the frozen roles.

    The devices share the work; each returns all experiences, in the order of `rows`, so that everything after
    is the same on every device. A sample's noise depends on the seed, the step and its place among the rows.
    """
    mine = list(range(run.rank, len(rows), run.world_size))
    sampling = replace(sampling_of(flags, prompts.tokenizer, roles.actor), temperature=temperature)
    sampling.seed = flags.seed + run.step_index
    stops, sampling.stop_ids = sampling.stop_ids, sampling.stop_ids if flags.stop_at_eos else ()
    texts = [prompts.prompt(rows[position]) for position in mine]
    found: list[Experience] = []
    with run.fabric.autocast():
        samples = generate(roles.actor, texts, sampling, sample_ids=mine, max_rows=flags.rollout_mini_batch_size)
        for batch in cut(range(len(mine)), micro_batch_size=flags.rollout_mini_batch_size):
            responses, old_logps, ended = [], [], []
            for i in batch:
                length, end = cut_after_stop(samples.response_ids[i], stops)
                responses.append(samples.response_ids[i][:length].cpu())
                old_logps.append(samples.token_logps[i][:length].cpu())
                ended.append(end)
            batch_prompts = [texts[i] for i in batch]
            forest = Forest([Tree.of(p, r) for p, r in zip(batch_prompts, responses, strict=True)]).to(run.device)
            ref_logps, _ = roles.reference(forest, temperature=temperature)
            everywhere = torch.ones(len(batch), dtype=torch.bool, device=run.device)
            values = roles.critic(forest, value_index(forest, everywhere)).cpu()
            scores = reward(batch_prompts, responses, ended)
            lengths = [len(r) for r in responses]
            before, after = values[: sum(lengths)].split(lengths), values[sum(lengths) :]
            for k, i in enumerate(batch):
                found.append(
                    Experience(
                        position=mine[i],
                        prompt=batch_prompts[k],
                        response=responses[k],
                        old_logps=old_logps[k],
                        ref_logps=ref_logps.cpu().split(lengths)[k],
                        values=torch.cat([before[k], after[k : k + 1]]),
                        score=float(scores[k]),
                        ended=ended[k],
                    )
                )
    return sorted(run.gather(found), key=lambda e: e.position)


def cut_after_stop(response: Tensor, stop_ids: tuple[int, ...]) -> tuple[int, bool]:
    """Tokens up to and with the first stop token, and whether there is one.

    >>> cut_after_stop(torch.tensor([5, 2, 7]), (2,)), cut_after_stop(torch.tensor([5, 7]), (2,))
    ((2, True), (2, False))
    """
    stops = torch.isin(response, torch.tensor(stop_ids, dtype=torch.long, device=response.device)).nonzero()
    return (int(stops[0]) + 1, True) if len(stops) else (len(response), False)
