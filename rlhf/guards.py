"""Guards of a run that samples: they notice a collapsed policy or a hacked reward, say so, and end the run.

A reward that can be had cheaply is had: its curve rises while the text rots. Each guard looks at one measure of every
rollout (or of every evaluation) and fires while it is beyond its limit. A run warns when a guard begins to fire, and
ends once one has fired `--guard_patience` times in a row. PPO ends by default: what is learnt from a hacked reward
model is lost time, and a run that was ended too early goes on with `--resume=True --on_collapse=warn`. GRPO and online
DPO go on by default: their reward is mostly a rule or a checked answer, and what a rule pays for is what was asked,
however uniform the text. Where a run would end, it writes no checkpoint from the first warning on, for the weights may
have collapsed, but for those that a signal asks for and the one after its last step. The last checkpoint from before a
guard began to fire stays as long as one fires, beside those that `--keep_checkpoints` counts. The limits are far from
healthy runs: what moves within them is for the reader of the curves.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf.errors import UserError
from rlhf.experience import Experience
from rlhf.flags import CheckedFlags

if TYPE_CHECKING:
    from rlhf.experiment.run import Run
    from rlhf.experiment.steps import Step

START = 3
"""First rollouts of a run, whose mean is the start that later ones are compared with."""
ENOUGH = 16
"""Responses that a guard looks at: a smaller rollout is judged together with those before it."""
LEAST_KL = 10.0
"""Nats a response below which no KL is a collapse: to choose one of 20,000 short answers costs as much."""
NGRAM = 4
"""Tokens of the pieces whose repetition is counted."""


@dataclass(kw_only=True)
class GuardFlags(CheckedFlags):
    """Guards against a collapse or a hacked reward."""

    on_collapse: Literal["stop", "warn"] = "stop"
    """Once a guard has fired --guard_patience times in a row: end the run with status 3, the last checkpoint being from
    before; or warn, and go on, that checkpoint being kept besides. A run that was ended goes on with --resume=True
    --on_collapse=warn."""
    guard_patience: int = 3
    """Rollouts (of --guard_score: evaluations) in a row beyond a limit that end the run; the first of them warns."""
    guard_kl: float = 1.0
    """Largest KL to the reference, in nats a token (and above 10 nats a response); 0: any."""
    guard_eos: float = 0.5
    """Largest fall of the share of responses that end by themselves, since the start; 0: any."""
    guard_empty: float = 0.5
    """Largest rise of the share of empty responses since the start; 0: any."""
    guard_length: float = 8.0
    """Largest growth of the mean response, a factor of its length at the start; 0: any."""
    guard_repetition: float = 0.5
    """Largest rise of the share of 4-grams of tokens that repeat an earlier one of their response; 0: any."""
    guard_score: float = 1.0
    """Largest fall of the held-out score below its best, in standard deviations of the start's scores; 0: any."""


class Collapse(UserError):
    """A run that its guards have ended; the scripts exit with status 3."""

    status = 3


def repetition(response: Sequence[int]) -> float:
    """Share of the 4-grams of a response that occurred in it before; 0 where there are none.

    >>> repetition([7, 7, 7, 7, 7, 7, 7, 7]), repetition([1, 2, 3, 4, 5]), repetition([7, 7, 7])
    (0.8, 0.0, 0.0)
    """
    grams = list(zip(*(response[i:] for i in range(NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def health(experiences: Sequence[Experience]) -> dict[str, float]:
    """What the guards look at in a rollout.

    Returns:
        `eos`, `empty` and `repetition`, shares in [0, 1]; `length` in tokens; `score_std`; and, where there is a
        reference, the KL in nats `kl` a token and `kl_of_response` (k1: the mean of log pi - log ref).
    """
    num = len(experiences)
    tokens = sum(len(e.response) for e in experiences)
    scores = [e.score for e in experiences]
    mean = sum(scores) / num
    found = {
        "eos": sum(e.ended for e in experiences) / num,
        "empty": sum(len(e.response) <= e.ended for e in experiences) / num,
        "length": tokens / num,
        "repetition": sum(repetition(e.response.tolist()) for e in experiences) / num,
        "score_std": (sum((score - mean) ** 2 for score in scores) / num) ** 0.5,
    }
    if all(e.ref_logps is not None for e in experiences):
        nats = sum((e.old_logps - e.ref_logps).sum().item() for e in experiences)
        found |= {"kl": nats / max(1, tokens), "kl_of_response": nats / num}
    return found


class Guards:
    """The guards of one run. What they remember is in its checkpoints (`state_dict`).

    Args:
        run: the run that they may end.
        flags: of the script, which are `GuardFlags` too.
    """

    def __init__(self, run: Run, flags: Any) -> None:
        self.run, self.flags = run, flags
        self._seen: dict[str, Any] = {"rollouts": 0, "start": {}, "recent": [], "fired": {}}
        self._before = -1, copy.deepcopy(self._seen)
        self._evaluated: dict[str, Any] = {"best": None, "fired": {}}
        self._good = -1

    @property
    def firing(self) -> bool:
        """Whether a guard fired when it last looked."""
        return any(self._seen["fired"].values()) or any(self._evaluated["fired"].values())

    @property
    def may_save(self) -> bool:
        """Whether a checkpoint would be one to go back to (or is wanted anyway: `--on_collapse=warn`, SIGUSR1)."""
        return self.flags.on_collapse == "warn" or self.run.save_asked or not self.firing

    def state_dict(self) -> dict[str, Any]:
        """What they remember; nothing of a rollout not learnt from yet, since a resumed run samples it again.

        `good` is the step of the last checkpoint, that of this state included, that was written while none fired; -1:
        there is none.
        """
        step, before = self._before
        seen = before if step == self.run.step_index else self._seen
        good = self._good if self.firing else self.run.step_index
        return {"seen": seen, "evaluated": self._evaluated, "good": good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen, self._evaluated = copy.deepcopy(state["seen"]), copy.deepcopy(state["evaluated"])
        self._good = state["good"]
        # Its own step: none fired, and it is one of those that are counted.
        self.run.checkpoints.spared = self._good if self._good < self.run.step_index else None

    def watch(self, step: Step, experiences: Sequence[Experience]) -> None:
        """Look at a rollout, before anything is learnt from it, and log what is seen.

        Args:
            experiences: of all devices, so that all of them see the same and stop at once.

        Raises:
            Collapse: a guard has fired `--guard_patience` times in a row.
        """
        run = self.run
        if not self.firing and self._before[0] <= run.saved_at < run.step_index:  # written since the last look
            self._good = run.saved_at
        self._before = run.step_index, copy.deepcopy(self._seen)
        now = health(experiences)
        step.metrics.put("train/repetition", now["repetition"])
        step.metrics.put("train/empty_rate", now["empty"])
        now, seen = self._pooled(len(experiences), now), self._seen
        if seen["rollouts"] < START:
            known = {name: seen["start"].get(name, 0.0) * seen["rollouts"] for name in now}
            seen["rollouts"] += 1
            seen["start"] = {name: (known[name] + value) / seen["rollouts"] for name, value in now.items()}
        self._judge(self._faults(now), ("kl", "eos", "empty", "length", "repetition"), seen["fired"])
        # Not --guard_score: a resumed run comes here with the evaluation that the unbroken one was yet to make.
        step.metrics.put("train/guards_firing", sum(count > 0 for count in seen["fired"].values()))

    def evaluated(self, score: float) -> bool:
        """Take note of a held-out score; returns whether the policy may be called the best so far.

        Raises:
            Collapse: the scores of `--guard_patience` evaluations in a row were too low.
        """
        best = self._evaluated["best"]
        fall = 0.0 if best is None else best - score
        self._evaluated["best"] = score if best is None else max(score, best)
        limit, unit = self.flags.guard_score, self._seen["start"].get("score_std", 0.0)
        faults = {}
        if limit and unit and fall > limit * unit:
            faults["score"] = (
                f"the held-out score {score:.3g} is {fall / unit:.2g} deviations below its best "
                f"(--guard_score={limit:g})"
            )
        self._judge(faults, ("score",), self._evaluated["fired"])
        return not self.firing

    def _pooled(self, num: int, now: dict[str, float]) -> dict[str, float]:
        """The mean health of this rollout and as many before it as make `ENOUGH` responses."""
        recent = self._seen["recent"]
        recent.append([num, now])
        while sum(n for n, _ in recent[1:]) >= ENOUGH:
            del recent[0]
        total = sum(n for n, _ in recent)
        return {name: sum(n * found[name] for n, found in recent) / total for name in now}

    def _faults(self, now: dict[str, float]) -> dict[str, str]:
        """A clause for every limit that a rollout is beyond, by its guard."""
        flags, start, faults = self.flags, self._seen["start"], {}
        if flags.guard_kl and now.get("kl", 0.0) > flags.guard_kl and now["kl_of_response"] > LEAST_KL:
            faults["kl"] = (
                f"the KL to the reference is {now['kl']:.2f} nats a token, {now['kl_of_response']:.0f} a response "
                f"(--guard_kl={flags.guard_kl:g})"
            )
        if flags.guard_eos and start["eos"] - now["eos"] > flags.guard_eos:
            faults["eos"] = (
                f"{now['eos']:.0%} of the responses end by themselves, {start['eos']:.0%} at the start "
                f"(--guard_eos={flags.guard_eos:g})"
            )
        if flags.guard_empty and now["empty"] - start["empty"] > flags.guard_empty:
            faults["empty"] = (
                f"{now['empty']:.0%} of the responses are empty, {start['empty']:.0%} at the start "
                f"(--guard_empty={flags.guard_empty:g})"
            )
        if flags.guard_length and now["length"] > flags.guard_length * start["length"]:
            faults["length"] = (
                f"responses have {now['length']:.0f} tokens, {start['length']:.0f} at the start "
                f"(--guard_length={flags.guard_length:g})"
            )
        if flags.guard_repetition and now["repetition"] - start["repetition"] > flags.guard_repetition:
            faults["repetition"] = (
                f"{now['repetition']:.0%} of a response repeats what stands in it, {start['repetition']:.0%} at the "
                f"start (--guard_repetition={flags.guard_repetition:g})"
            )
        return faults

    def _judge(self, faults: dict[str, str], looked_at: Sequence[str], fired: dict[str, int]) -> None:
        """Count in `fired` how often each guard has fired in a row; warn of those that begin to, and end the run."""
        for name in looked_at:
            fired[name] = fired.get(name, 0) + 1 if name in faults else 0
        self.run.checkpoints.spared = self._good if self.firing else None
        beginning = [text for name, text in faults.items() if fired[name] == 1]
        if beginning:
            good = self.run.checkpoints.of(self._good)
            kept = f"; {good} is from before, and stays while this lasts" if good.is_dir() else ""
            self.run.say(f"warning: after step {self.run.step_index} {' and '.join(beginning)}{kept}")
        lasting = [text for name, text in faults.items() if fired[name] >= self.flags.guard_patience]
        if lasting and self.flags.on_collapse == "stop":
            if self.run.logs is not None:
                self.run.logs.close()
            raise Collapse(
                f"stopped after step {self.run.step_index}: {' and '.join(lasting)}, {self.flags.guard_patience} times "
                f"in a row; the policy collapses or exploits its reward: {self._way_back()}, lower the learning rate, "
                f"raise the KL's weight or mend the reward, or go on with --resume=True --on_collapse=warn"
            )

    def _way_back(self) -> str:
        """Where the weights from before are."""
        checkpoints = self.run.checkpoints
        for folder in (checkpoints.of(self._good), checkpoints.folder / "best"):
            if folder.is_dir():
                return f"{folder} is from before"
        return "there is no checkpoint from before (--save_interval), so start again"
