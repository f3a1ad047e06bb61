"""Sampled responses with everything that RL learns from them, as records and as dense arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.advantages import score_missing_eos
from rlhf.data.prompts import Prompts
from rlhf.errors import NonFiniteError
from rlhf.evaluation import sampling_of
from rlhf.experiment.run import Run
from rlhf.models.roles import Roles
from rlhf.rewards.mix import Rewards
from rlhf.rollouts import generate
from rlhf.seeds import seed_of_step
from rlhf.trees.batches import cut
from rlhf.trees.forest import Forest, Tree


@dataclass
class Experience:
    """One response of T tokens, on the CPU.

    Attributes:
        position: its place among the samples of the step, over all devices; those of one prompt follow each other.
        prompt, response: token ids.
        old_logps: (T,) log-probabilities of the response's tokens under the policy that sampled them.
        ref_logps: (T,) the same under the reference; None where there is none.
        values: (T + 1,) the critic before each token, and after the last (the end state); None without a critic.
        score: reward of the whole response.
        ended: whether it holds a stop token.
        parts: the rewards that the score adds up, by name, before their weights.
        process_rewards: (T,) what tokens earn of the score themselves, or None.
        row: of the prompt in its split.
        graph: `values` with what led to them, for the first loss of the critic; None where it runs again for that.
    """

    position: int
    prompt: Tensor
    response: Tensor
    old_logps: Tensor
    ref_logps: Tensor | None
    values: Tensor | None
    score: float
    ended: bool
    parts: dict[str, float] = field(default_factory=dict)
    process_rewards: Tensor | None = None
    row: int = 0
    graph: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class Rollout:
    """N experiences side by side, right-padded to L columns: the longest response a run allows.

    Attributes:
        response_mask: (N, L) True at response tokens.
        old_logps: (N, L); ref_logps: (N, L), or None without a reference.
        values: (N, L): before each token, and at the end state where L leaves room for it; None without a critic.
        scores: (N,); ended: (N,) bool.
        process_rewards: (N, L), 0 where no token earns anything itself.
        parts: name to (N,): the rewards that the scores add up.
    """

    response_mask: Tensor
    old_logps: Tensor
    ref_logps: Tensor | None
    values: Tensor | None
    scores: Tensor
    ended: Tensor
    process_rewards: Tensor
    parts: dict[str, Tensor]


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
    num, names = len(experiences), experiences[0].parts if experiences else ()
    lengths = torch.tensor([len(e.response) for e in experiences])
    if num and int(lengths.max()) > width:
        raise ValueError(f"a response of {int(lengths.max())} tokens does not fit {width} columns")
    old_logps, ref_logps, values, process = (torch.zeros(num, width) for _ in range(4))
    for i, e in enumerate(experiences):
        n = len(e.response)
        old_logps[i, :n] = e.old_logps
        if e.ref_logps is not None:
            ref_logps[i, :n] = e.ref_logps
        if e.values is not None:
            values[i, : n + 1] = e.values[: width if n == width else n + 1]
        if e.process_rewards is not None:
            process[i, :n] = e.process_rewards
    return Rollout(
        response_mask=torch.arange(width) < lengths[:, None],
        old_logps=old_logps,
        ref_logps=ref_logps if all(e.ref_logps is not None for e in experiences) else None,
        values=values if all(e.values is not None for e in experiences) else None,
        scores=torch.tensor([e.score for e in experiences]),
        ended=torch.tensor([e.ended for e in experiences], dtype=torch.bool),
        process_rewards=process,
        parts={name: torch.tensor([e.parts[name] for e in experiences]) for name in names},
    )


def penalised_scores(experiences: Sequence[Experience], penalty: float) -> Tensor:
    """(N,) rewards of whole responses, those without EOS lowered by `penalty`."""
    scores = torch.tensor([e.score for e in experiences])
    ended = torch.tensor([e.ended for e in experiences], dtype=torch.bool)
    return score_missing_eos(scores, ended, mode="subtract", value=penalty)


def value_index(forest: Forest, has_end: Tensor) -> Tensor:
    """(V,) packed positions at which the critic is read: before each response token, then at the end states."""
    return torch.cat([forest.target_predecessor, forest.branch_last[has_end]])


@torch.no_grad()
def collect(
    run: Run,
    flags: Any,
    roles: Roles,
    rewards: Rewards,
    prompts: Prompts,
    rows: list[int],
    temperature: float,
    *,
    num_samples: int = 1,
    first: int = 0,
    stop_at_eos: bool = True,
    keep_graph: bool = False,
) -> list[Experience]:
    """Sample responses to each prompt of `rows` (over all devices); rewards and frozen roles judge them.

    The devices share the prompts; each returns all experiences, in the order of `rows`, so that everything after
    is the same on every device. A sample's noise depends on the seed, the step and its position.

    Args:
        num_samples: responses to each prompt; they share its tokens in every pass.
        first: prompts that were sampled earlier in the step, whose positions are taken.
        stop_at_eos: False samples a fixed length and cuts after the first EOS; the same numbers.
        keep_graph: leave the values in the critic's graph, which is then as large as in training.

    Raises:
        NonFiniteError: a log-probability, value or reward that is not finite, on whatever device; it names the rows.
    """
    places = list(range(run.rank, len(rows), run.world_size))
    mine = [(first + place) * num_samples + j for place in places for j in range(num_samples)]
    sampling = replace(sampling_of(flags, prompts.tokenizer, roles.actor), temperature=temperature)
    sampling.seed = seed_of_step(flags.seed, run.step_index, "sampling")
    stops, sampling.stop_ids = sampling.stop_ids, sampling.stop_ids if stop_at_eos else ()
    texts = [prompts.prompt(rows[place]) for place in places]
    size = flags.rollout_mini_batch_size
    found: list[Experience] = []
    with run.fabric.autocast():
        samples = generate(roles.actor, texts, sampling, num_samples=num_samples, sample_ids=mine, max_rows=size)
        cuts = [cut_after_stop(response, stops) for response in samples.response_ids]
        responses = [ids[:length].cpu() for ids, (length, _) in zip(samples.response_ids, cuts, strict=True)]
        ended = [end for _, end in cuts]
        asked = [i for i in range(len(places)) for _ in range(num_samples)]
        scores = rewards.over(prompts)([texts[i] for i in asked], responses, [rows[places[i]] for i in asked], ended)
        for batch in cut(range(len(places)), micro_batch_size=max(1, size // num_samples)):
            within = [i * num_samples + j for i in batch for j in range(num_samples)]
            trees = [Tree.of(texts[i], *responses[i * num_samples : (i + 1) * num_samples]) for i in batch]
            lengths = [len(responses[k]) for k in within]
            ref_logps, values = judged(run, roles, Forest(trees), lengths, temperature, keep_graph=keep_graph)
            for k, ref, value in zip(within, ref_logps, values, strict=True):
                found.append(
                    Experience(
                        position=mine[k],
                        prompt=texts[asked[k]],
                        response=responses[k],
                        old_logps=samples.token_logps[k][: len(responses[k])].cpu(),
                        ref_logps=ref,
                        values=None if value is None else value.detach(),
                        score=float(scores.total[k]),
                        ended=ended[k],
                        parts={name: float(part[k]) for name, part in scores.parts.items()},
                        process_rewards=None if scores.token is None else scores.token[k],
                        row=rows[places[asked[k]]],
                        graph=value if keep_graph else None,
                    )
                )
    experiences = sorted(run.gather(found), key=lambda e: e.position)
    check_finite(prompts, experiences, _numbers_of(experiences))
    return experiences


def _numbers_of(experiences: list[Experience]) -> dict[str, list[Tensor]]:
    """What was measured of each experience, by its name in messages, in the order in which it came to be."""
    found = {
        "log-probabilities": [e.old_logps for e in experiences],
        "rewards": [torch.tensor(e.score) for e in experiences],
        "rewards of tokens": [e.process_rewards for e in experiences],
        "reference log-probabilities": [e.ref_logps for e in experiences],
        "values": [e.values for e in experiences],
    }
    return {what: tensors for what, tensors in found.items() if all(x is not None for x in tensors)}


def check_finite(
    prompts: Prompts, experiences: Sequence[Experience], numbers: Mapping[str, Sequence[Tensor] | Tensor]
) -> None:
    """See that numbers of a rollout, on the CPU, are finite: one tensor of each experience, or N rows.

    Raises:
        NonFiniteError: names the first quantity that is not, and the rows of the prompts.
    """
    for what, tensors in numbers.items():
        if not torch.cat([x.reshape(-1) for x in tensors] or [torch.zeros(0)]).isfinite().all():
            rows = sorted({e.row for e, x in zip(experiences, tensors, strict=True) if not x.isfinite().all()})
            raise NonFiniteError(f"the {what} of responses to rows {rows} of {prompts.split.path} are not finite")


def judged(
    run: Run, roles: Roles, forest: Forest, lengths: list[int], temperature: float, *, keep_graph: bool = False
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """For each branch its (T,) reference log-probabilities and (T + 1,) values; None where a role is not there.

    Args:
        keep_graph: of the values.
    """
    forest = forest.to(run.device)
    ref_logps: list[Tensor | None] = [None] * len(lengths)
    values: list[Tensor | None] = [None] * len(lengths)
    if roles.reference is not None:
        ref_logps = list(roles.reference(forest, temperature=temperature)[0].cpu().split(lengths))
    if roles.critic is not None:
        everywhere = torch.ones(len(lengths), dtype=torch.bool, device=run.device)
        with torch.set_grad_enabled(keep_graph):
            found = roles.critic(forest, value_index(forest, everywhere)).cpu()
            before, after = found[: sum(lengths)].split(lengths), found[sum(lengths) :]
            values = [torch.cat([b, after[k : k + 1]]) for k, b in enumerate(before)]
    return ref_logps, values


def cut_after_stop(response: Tensor, stop_ids: tuple[int, ...]) -> tuple[int, bool]:
    """Tokens up to and with the first stop token, and whether there is one.

    >>> cut_after_stop(torch.tensor([5, 2, 7]), (2,)), cut_after_stop(torch.tensor([5, 7]), (2,))
    ((2, True), (2, False))
    """
    stops = torch.isin(response, torch.tensor(stop_ids, dtype=torch.long, device=response.device)).nonzero()
    return (int(stops[0]) + 1, True) if len(stops) else (len(response), False)
