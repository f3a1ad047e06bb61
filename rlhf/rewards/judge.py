"""A judge of the user's that compares two responses to one prompt, where no reward gives each a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.prompts import Prompts
from rlhf.errors import UserError
from rlhf.rewards.functions import TimeLimitError, first_line, load_function, within

VERDICTS = (0, 1, -1)
"""The first response is better, the second is, or neither."""


@dataclass
class Judge:
    """`function(prompts, first, second, rows) -> verdicts` on texts, under a time limit.

    Attributes:
        function: takes N texts of prompts, of first and of second responses, and N rows (`Prompts.row`); returns N of
            `VERDICTS`.
        name: as errors call it.
        timeout: seconds of one call; 0: no limit.
        gather: gives the items of all devices on each of them (`Run.gather`), so that they fail together.
    """

    function: Callable
    name: str
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    timeout: float
    gather: Callable[[list], list]

    def __call__(self, first: Sequence[Tensor], second: Sequence[Tensor], rows: Sequence[int]) -> list[int]:
        """Compare N pairs of token ids; `rows` are the places of their prompts in the split.

        Every device must make this call, with the pairs that it has (perhaps none).

        Raises:
            UserError: on all devices, where the judge raises, is late or gives something else on one of them.
        """
        verdicts, failure = [], None
        try:
            verdicts = self._verdicts(first, second, rows) if rows else []
        except UserError as error:
            failure = str(error)
        failures = [found for found in self.gather([failure]) if found is not None]
        if failures:
            raise UserError(failures[0])
        return verdicts

    def _verdicts(self, first: Sequence[Tensor], second: Sequence[Tensor], rows: Sequence[int]) -> list[int]:
        known = [self.prompts.row(i) for i in rows]
        prompts = [self.prompts.prompt(i) for i in rows]
        sides = prompts, first, second
        texts = [[self.tokenizer.decode(ids, skip_special_tokens=True) for ids in side] for side in sides]
        where = f"rows {min(rows)} to {max(rows)} of {self.prompts.split.path}"
        try:
            found: Any = within(self.timeout, lambda: self.function(*texts, known))
        except TimeLimitError:
            raise UserError(
                f"{self.name} took longer than {self.timeout:g} s for {where}; make it faster, or raise "
                f"--reward_timeout"
            ) from None
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.name} failed on {where} ({first_line(error)}); mend it, or the rows") from error
        verdicts = list(found) if isinstance(found, (list, tuple)) else []
        if len(verdicts) != len(rows) or any(verdict not in VERDICTS for verdict in verdicts):
            raise UserError(
                f"{self.name} returned {str(found)[:60]} for {len(rows)} pairs ({where}); return 0 (the first is "
                f"better), 1 or -1 (neither) for each"
            )
        return [int(verdict) for verdict in verdicts]


def load_judge(
    argument: str,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    timeout: float,
    gather: Callable[[list], list] = list,
) -> Judge:
    """The judge that `FILE.py:NAME` or `MODULE:NAME` names.

    Raises:
        UserError: it is not of that form, can't be imported, or is no function.
    """
    function = load_function(argument)
    return Judge(function, f"the judge {argument.rpartition(':')[2]}", tokenizer, prompts, timeout, gather)
