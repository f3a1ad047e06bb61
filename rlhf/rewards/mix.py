"""The reward of a run: any number of rewards, weighted and added up, for whatever algorithm samples responses.

    rewards = load_rewards(flags, prompts, tokenizer, device=run.device, gather=run.gather)
    scores = rewards(prompt_ids, response_ids, rows)

A reward gives each response a number, or spreads it: one number for each token, or `(start, end, score)` for ranges of
characters, each of which counts at the token that completes it (process rewards: Uesato et al. 2022, arXiv 2211.14275;
Lightman et al. 2023, arXiv 2305.20050). A reward that fails, or gives what is no finite number, stops the run with the
row that it failed on, on every device.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import urllib.parse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.prompts import Prompts
from rlhf.errors import NonFiniteError, UserError
from rlhf.flags import RewardFlags
from rlhf.models.loading import check_kind, load_scorer, resolve, tokenizer_of
from rlhf.models.policy import Scorer
from rlhf.rewards.answers import Answers, token_at
from rlhf.rewards.endpoint import EndpointReward
from rlhf.rewards.functions import FunctionReward, load_function
from rlhf.rewards.models import RewardModel
from rlhf.rewards.rules import rule_of
from rlhf.rewards.specs import Spec, specs_of

LARGEST = torch.finfo(torch.float32).max


@dataclass
class Scores:
    """Rewards of N responses, on the CPU.

    Attributes:
        total: (N,) float32, the weighted sum of all parts.
        parts: name to (N,) float32, each reward as it is, before its weight.
        token: where some reward spreads over tokens, for each response (T,) float32, weighted; None where none does.
            `total` includes their sum.
    """

    total: Tensor
    parts: dict[str, Tensor]
    token: list[Tensor] | None = None


@dataclass
class Part:
    """One reward of the mix: what it is called, its weight, and what judges a batch, a value for each response.

    Attributes:
        model: what judges where that is a model.
    """

    name: str
    weight: float
    judge: Callable[[Answers], Any]
    model: RewardModel | None = None


def _alone(items: list) -> list:
    return items


@dataclass
class Rewards:
    """The weighted sum of `parts` for responses to the prompts of one split.

    Attributes:
        prompts: the split that `rows` count in; `over` takes another.
        tokenizer: of the token ids that are judged.
        gather: gives the items of all devices on each of them (`Run.gather`), so that they fail together.
    """

    parts: list[Part]
    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    gather: Callable[[list], list] = field(default=_alone)

    def over(self, prompts: Prompts) -> Rewards:
        """The same rewards for responses to the prompts of another split."""
        return dataclasses.replace(self, prompts=prompts)

    def __call__(
        self,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        rows: Sequence[int],
        ended: Sequence[bool] | None = None,
    ) -> Scores:
        """Judge N responses.

        Args:
            prompts, responses: N tensors of token ids each.
            rows: the place of each prompt in the split.
            ended: whether each response holds its stop token; by the tokenizer's EOS unless given.

        Every device must make this call, with the responses that it has (perhaps none): a failure on one is raised
        on all.

        Raises:
            UserError: a reward raised, was late, or gave something else than a number for each response; the sentence
                names the reward and the row.
            NonFiniteError: one of these numbers is not finite.
        """
        failure, scores = None, None
        try:
            scores = self._judged(self._answers(prompts, responses, rows, ended))
        except UserError as error:
            failure = error
        failures = [found for found in self.gather([failure]) if found is not None]
        if failures:
            raise failures[0]
        return scores

    def _answers(self, prompts, responses, rows, ended) -> Answers:
        if ended is None:
            ended = [len(ids) > 0 and int(ids[-1]) == self.tokenizer.eos_token_id for ids in responses]
        texts = [
            [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in part] for part in (prompts, responses)
        ]
        known = [{**self.prompts.row(i), "response_ids": r.tolist()} for i, r in zip(rows, responses, strict=True)]
        return Answers(prompts, responses, ended, *texts, known, self.prompts.split.path)

    def _judged(self, answers: Answers) -> Scores:
        num = len(answers)
        total = torch.zeros(num, dtype=torch.float64)
        parts: dict[str, Tensor] = {}
        token: list[Tensor] | None = None
        for part in self.parts:
            values, spread = self._values(part, answers) if num else ([], {})
            parts[part.name] = torch.tensor(values, dtype=torch.float32)
            total += part.weight * torch.tensor(values, dtype=torch.float64)
            if spread and token is None:
                token = [torch.zeros(len(ids)) for ids in answers.response_ids]
            for i, scores in spread.items():
                token[i] += part.weight * scores
        return Scores(total.float(), parts, token)

    def _values(self, part: Part, answers: Answers) -> tuple[list[float], dict[int, Tensor]]:
        """The value of each response, and for those whose reward is spread, (T,) values of the tokens."""
        returned = _plain(part.judge(answers))
        if not isinstance(returned, (list, tuple)):
            raise UserError(
                f"the reward {part.name} returned {_named(returned)} for {answers.places()}; return a list of numbers"
            )
        if len(returned) != len(answers):
            raise UserError(
                f"the reward {part.name} returned {len(returned)} values for {len(answers)} responses "
                f"({answers.places()}); return one for each"
            )
        values, spread = [], {}
        for i, value in enumerate(map(_plain, returned)):
            if isinstance(value, (list, tuple)):
                spread[i] = self._spread(part, value, answers, i)
                values.append(math.fsum(spread[i].tolist()))
            else:
                values.append(_finite(part, value, answers, i))
        return values, spread

    def _spread(self, part: Part, value: Sequence, answers: Answers, i: int) -> Tensor:
        """(T,) rewards of tokens, from one number for each or from scored ranges of characters."""
        ids, text = answers.response_ids[i].tolist(), answers.responses[i]
        items = [_plain(item) for item in value]
        if not any(isinstance(item, (list, tuple)) for item in items) and items:
            if len(items) != len(ids):
                raise UserError(
                    f"the reward {part.name} returned {len(items)} values for the {len(ids)} tokens of the response to "
                    f"{answers.place(i)}; return one for each token of response_ids, or (start, end, score) of ranges"
                )
            return torch.tensor([_finite(part, item, answers, i) for item in items])
        scores = torch.zeros(len(ids))
        for item in items:
            if not isinstance(item, (list, tuple)) or len(item) != 3 or not _is_range(*item[:2], len(text)):
                raise UserError(
                    f"the reward {part.name} returned {item!r} for a response of {len(text)} characters to "
                    f"{answers.place(i)}; return (start, end, score) with 0 <= start < end <= its length"
                )
            scores[token_at(self.tokenizer, ids, text, int(item[1]))] += _finite(part, item[2], answers, i)
        return scores


def load_rewards(
    flags: RewardFlags,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device | str = "cpu",
    gather: Callable[[list], list] = _alone,
    batch_size: int = 32,
    loaded: Mapping[str, Scorer] | None = None,
    judges: Judges | None = None,
) -> Rewards:
    """The rewards of `--reward` and `--rm_experiment_dir`.

    Args:
        flags: of the script; where a reward model is among the rewards, its model flags too.
        prompts: the split whose rows will be asked for; tokenizer: of the ids that will be judged.
        device: where reward models stand; batch_size: responses that go through one at once.
        gather: `Run.gather`.
        loaded: reward models that are there already, by what `resolve` returned; they stay where they are.
        judges: what `check_rewards` found, so that no function is imported twice.

    Raises:
        UserError: no reward, or one that can't be used.
    """
    parts: list[Part] = []
    names: Counter[str] = Counter()
    for spec in specs_of(flags):
        model = None
        if spec.kind == "model":
            model = _model_of(spec, flags, tokenizer, device, batch_size, loaded or {})
            name, judge = spec.kind, model.judge
        else:
            name, judge = (judges or {}).get(spec) or _judge_of(spec, flags)
        names[name] += 1
        parts.append(Part(name if names[name] == 1 else f"{name}_{names[name]}", spec.weight, judge, model))
    return Rewards(parts, prompts, tokenizer, gather)


def reward_model_of(flags: RewardFlags) -> tuple[str, float] | None:
    """The first reward model of the mix: what `resolve` gives for it, and its weight; None where there is none.

    Raises:
        UserError: no reward at all, one that can't be read, or a model that is not there.
    """
    for spec in specs_of(flags):
        if spec.kind == "model":
            return resolve(spec.argument, spec.flag), spec.weight
    return None


Judges = dict[Spec, tuple[str, Callable[[Answers], Any]]]
"""For each reward that is no model its name, and what judges."""


def check_rewards(flags: Any) -> Judges:
    """Refuse a reward that can't be used, before any model is loaded; what is found is for `load_rewards`.

    Raises:
        UserError: no reward; one that can't be read or imported; a model that is not there, or is no reward model.
    """
    found: Judges = {}
    for spec in specs_of(flags):
        if spec.kind == "model":
            check_kind(resolve(spec.argument, spec.flag), flags, scorer=True)
        else:
            found[spec] = _judge_of(spec, flags)
    return found


def _model_of(
    spec: Spec,
    flags: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
    batch_size: int,
    loaded: Mapping[str, Scorer],
) -> RewardModel:
    source = resolve(spec.argument, spec.flag)
    scorer = loaded.get(source) or load_scorer(source, flags, trainable=False).to(device)
    given = {"batch_size": batch_size, "name": f"the reward model {source}"}
    return RewardModel(scorer, tokenizer_of(source, flags), tokenizer, **given)


def _judge_of(spec: Spec, flags: Any) -> tuple[str, Callable[[Answers], Any]]:
    """The name of a reward that is no model, and what judges."""
    match spec.kind:
        case "function":
            function = load_function(spec.argument)
            name = spec.argument.rpartition(":")[2]
            return name, FunctionReward(function, f"the reward function {name}", flags.reward_timeout)
        case "http" | "https":
            url = spec.argument if "://" in spec.argument else f"{spec.kind}:{spec.argument}"
            if not _is_url(url):
                raise spec.wrong(f"{url!r} is no URL; write http:http://HOST:PORT/PATH")
            return "http", EndpointReward(url, flags.reward_timeout)
    return spec.kind, rule_of(spec)


def _is_url(text: str) -> bool:
    try:
        parsed = urllib.parse.urlsplit(text)
        parsed.port  # noqa: B018  # reading it is what checks it
    except ValueError:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.hostname)


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists or numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _finite(part: Part, value: Any, answers: Answers, i: int) -> float:
    if not isinstance(value, numbers.Real):
        raise UserError(f"the reward {part.name} returned {_named(value)} for {answers.place(i)}; return a number")
    if not abs(value) <= LARGEST:
        what = f"the reward {part.name} is {str(value)[:40]} for {answers.place(i)}"
        raise NonFiniteError(f"{what}; return a finite number")
    return float(value)


def _named(value: Any) -> str:
    return "None" if value is None else f"{str(value)[:40]!r}, a {type(value).__name__},"


def _is_range(start: Any, end: Any, length: int) -> bool:
    return isinstance(start, numbers.Integral) and isinstance(end, numbers.Integral) and 0 <= start < end <= length
