"""From scores to advantages: shaped token rewards, generalised advantage estimation, reward scaling.

Everything here makes targets of the training, so no gradient flows through any of it. Shapes: `B` responses,
`T` token positions. Position t of a response holds its token t; the value at t is the critic's output *before*
that token was seen, so it is read one position earlier in the model's input.

**The end state.** After its last token a response has reached a state of its own, in which the critic can be
asked too. Two conventions are in use for where the score stands:

1. On the last token (index L): the episode ends there, and the end state has no value. This is what the
   functions do when given the response mask alone.
2. On the end state (index L + 1) where that fits in T, else on the last token: the critic then has a value there
   to learn, and a position more than the policy. Stiennon et al.'s code, "The N+ Implementation Details of RLHF
   with PPO" (arXiv 2403.17031, `padding_mask_p1`) and TRL do so. Pass `end_state_mask(response_mask)` as
   `value_mask` to `token_rewards` and as the mask of `gae`, and mask the advantages by the response again.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def end_state_mask(response_mask: Tensor) -> Tensor:
    """The real positions and the one after each run of them, where that fits: where a critic has values.

    Args:
        response_mask: (B, T) bool, True at response tokens.

    Returns:
        (B, T) bool.

    >>> end_state_mask(torch.tensor([[True, False, False], [True, True, True]])).int()
    tensor([[1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """
    after = torch.zeros_like(response_mask)
    after[..., 1:] = response_mask[..., :-1]
    return response_mask | after


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    token_kl: Tensor,
    response_mask: Tensor,
    kl_coef: float,
    *,
    value_mask: Tensor | None = None,
    process_rewards: Tensor | None = None,
) -> Tensor:
    """Reward of each token: minus the KL penalty, what it has earned itself, and the rest of the score at the end.

        r_t = -kl_coef * kl_t + p_t + [t is the end] * (score - sum of p)

    Ziegler et al. 2019 (arXiv 1909.08593), eq. 2, spread over the tokens; p = 0 there. Process rewards p (Uesato et
    al. 2022, arXiv 2211.14275) say where in a response its score was earned, and never change its size: the sum over
    a response is `score - kl_coef * sum of its kl`.

    Args:
        scores: (B,) one score a response.
        token_kl: (B, T) an estimate of KL(policy || reference) at each token, in nats (`rlhf.kl`).
        response_mask: (B, T) bool, True at response tokens.
        kl_coef: weight of the penalty, reward units a nat.
        value_mask: (B, T) bool, or None for `response_mask`; the score stands at its last True. See "The end
            state" above. A row without any True gets no reward.
        process_rewards: (B, T) p, parts of the scores; None for 0.

    Returns:
        (B, T) rewards, 0 where nothing is real.

    >>> token_rewards(torch.tensor([2.0]), torch.tensor([[0.5, -1.0, 9.0]]),
    ...               torch.tensor([[True, True, False]]), kl_coef=0.1)
    tensor([[-0.0500,  2.1000,  0.0000]])
    """
    if value_mask is None:
        value_mask = response_mask
    rewards = (-kl_coef * token_kl).masked_fill(~response_mask, 0)
    if process_rewards is not None:
        earned = process_rewards.masked_fill(~response_mask, 0)
        rewards, scores = rewards + earned, scores - earned.sum(-1)
    num_positions = value_mask.shape[-1]
    positions = torch.arange(num_positions, device=value_mask.device)
    last = positions.masked_fill(~value_mask, -1).amax(dim=-1, keepdim=True)
    # -1, a row that is all padding, equals no position.
    return rewards + (positions == last) * scores.to(rewards.dtype).unsqueeze(-1)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that the critic learns.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t = delta_t + gamma * lam * A_{t+1},   R_t = A_t + V_t

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16. V and A are 0 past the last real position: an episode that
    was cut off counts as ended. The returns come from the raw advantages: whiten afterwards.

    Args:
        rewards, values: (B, T).
        response_mask: (B, T) bool, True at the positions that make up the episode. Those that don't count are
            stepped over, wherever they stand, and nothing at them has any influence.
        gamma: discount of a step, in [0, 1].
        lam: lambda of the estimator, in [0, 1]: 0 is one-step, 1 is Monte Carlo.

    Returns:
        advantages, returns: (B, T) each, 0 at the positions that don't count.

    >>> mask = torch.tensor([[True, True, False]])
    >>> advantages, returns = gae(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.25, 7.0]]), mask,
    ...                           gamma=1.0, lam=0.5)
    >>> advantages, returns
    (tensor([[0.1250, 0.7500, 0.0000]]), tensor([[0.6250, 1.0000, 0.0000]]))
    """
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(values.shape[0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        real = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(real, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = next_advantage
    returns = advantages + values
    return advantages.masked_fill(~response_mask, 0), returns.masked_fill(~response_mask, 0)


def score_missing_eos(
    scores: Tensor, ended: Tensor, *, mode: Literal["replace", "subtract", "keep"], value: float
) -> Tensor:
    """Scores in which a response that never ended fares worse.

    - `replace`: its score is exactly `value`, whatever the reward model said ("The N Implementation Details of
      RLHF with PPO", policy detail 5, with -1).
    - `subtract`: its score is lowered by the size of `value`, whose sign doesn't matter (TRL's penalty).
    - `keep`: nothing changes.

    Args:
        scores: (B,).
        ended: (B,) bool, True where the response holds its end-of-sequence token.

    Raises:
        ValueError: for another mode.

    >>> scores, ended = torch.tensor([0.5, 2.0]), torch.tensor([True, False])
    >>> score_missing_eos(scores, ended, mode="replace", value=-1.0)
    tensor([ 0.5000, -1.0000])
    >>> score_missing_eos(scores, ended, mode="subtract", value=-1.0)
    tensor([0.5000, 1.0000])
    """
    if mode == "keep":
        return scores
    if mode == "replace":
        return scores.masked_fill(~ended, value)
    if mode == "subtract":
        return torch.where(ended, scores, scores - abs(value))
    raise ValueError(f"mode must be replace, subtract or keep, not {mode!r}")


class RunningMoments:
    """Mean and standard deviation of all values seen so far, in float64, for scaling rewards.

    Zheng et al. 2023 (arXiv 2307.04964, "Secrets of RLHF Part I: PPO"), section 5.4: rewards are divided by the
    running deviation, and the mean stays ("reward scaling", `scale`) or goes ("normalisation", `normalize`);
    clip afterwards with `torch.clamp`. Batches are merged by the pairwise update of Chan, Golub and LeVeque
    1979, so the result doesn't depend on how the values were cut into batches.

    On several devices, sum `rlhf.masked.moments` over them and give the sum to `update_from`, so that all keep
    the same state.

    >>> running = RunningMoments()
    >>> running.update(torch.tensor([1.0, 2.0]))
    >>> running.update(torch.tensor([6.0]))
    >>> running.mean, round(running.std, 4)
    (3.0, 2.6458)
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self._m2 = 0.0  # sum of the squared deviations from the mean

    @property
    def std(self) -> float:
        """Sample standard deviation (divisor count - 1); 1, which scales nothing, while there is no spread."""
        if self.count < 2:
            return 1.0
        std = math.sqrt(self._m2 / (self.count - 1))
        # Less than float32 can tell from a constant is rounding, and dividing by it would blow it up.
        return std if std > 1e-6 * abs(self.mean) else 1.0

    def update(self, x: Tensor) -> None:
        """Take in every element of `x`, of any shape."""
        if x.numel() > 0:
            values = x.detach().double()
            mean = values.mean()
            self._merge(values.numel(), mean.item(), (values - mean).square().sum().item())

    def update_from(self, moments_sum: Tensor) -> None:
        """Take in the values whose summed `rlhf.masked.moments`, (3,), are given."""
        count, total, squares = moments_sum.tolist()
        if count > 0:
            self._merge(count, total / count, max(0.0, squares - total * total / count))

    def scale(self, x: Tensor) -> Tensor:
        """`x` over the running deviation; its mean is scaled but not removed."""
        return x / self.std

    def normalize(self, x: Tensor) -> Tensor:
        """`x` less the running mean, over the running deviation."""
        return (x - self.mean) / self.std

    def state_dict(self) -> dict[str, float]:
        """The state as plain floats, for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "m2": self._m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` returned; KeyError if a part is missing."""
        self.count, self.mean, self._m2 = state["count"], state["mean"], state["m2"]

    def _merge(self, count: float, mean: float, m2: float) -> None:
        total = self.count + count
        delta = mean - self.mean
        self._m2 += m2 + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total
