"""Arithmetic with answers that can be checked, made up here: prompts for RL, or worked answers to learn the form from.

    level 1   3 + 4                          one-digit sums
    level 2   83 - 27                        two-digit sums and differences
    level 3   7 * 46, 12 + 85 - 40           a product, or three two-digit numbers
    level 4   35 - 6 * 11                    a product within a sum or a difference
    level 5   (412 - 95) * 7 + 168           brackets, three or four operations, numbers up to 999

`--stage=prompts` writes each problem with its answer as `reference`, which `--reward numeric` checks;
`--stage=finetune` writes it with the answer worked out, an operation a line. Problems are distinct, and those that
are held out are the same in both stages.

    python data_prep/arithmetic/prepare_data.py --destination_dir=data/sums --tokenizer_name=facebook/opt-350m \\
        --levels 1 2 --num_problems=2000
    python data_prep/arithmetic/prepare_data.py --destination_dir=data/sums --tokenizer_name=facebook/opt-350m \\
        --levels 1 2 --num_problems=2000 --stage=finetune
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.data.custom import CustomParser
from rlhf.data.prepare import prepare
from rlhf.data.prepare_flags import FormatFlags, LimitFlags, OutputFlags, WorkFlags
from rlhf.data.prepare_flags import PrepareFlags as SharedFlags
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.flags import launch

NUM_LEVELS = 5
MOST_REPEATS = 1000
"""Problems in a row that were there already, after which a level counts as used up."""

Expression = int | tuple["Expression", str, "Expression"]
_RANK = {"+": 1, "-": 1, "*": 2}


@dataclass(kw_only=True)
class PrepareFlags(OutputFlags, FormatFlags, LimitFlags, WorkFlags):
    """Arithmetic."""

    stage: Literal["prompts", "finetune"] = "prompts"
    """Problems with the answer that a reward checks, or with the answer worked out, to imitate."""
    levels: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Levels of difficulty, from 1 (one-digit sums) to 5 (brackets, up to three digits), mixed in equal parts."""
    num_problems: int = 10_000
    """Problems over all levels and splits; level 1 has only 100."""
    prompt_template: str = "Question: {prompt}\\nAnswer:"
    """Text around a problem; a backslash and n stand for a line feed."""


def value_of(expression: Expression) -> int:
    """
    >>> value_of(((4, "-", 9), "*", 3))
    -15
    """
    if isinstance(expression, int):
        return expression
    left, operation, right = expression
    a, b = value_of(left), value_of(right)
    return a + b if operation == "+" else a - b if operation == "-" else a * b


def text_of(expression: Expression) -> str:
    """An expression as it is written, with the brackets that keep its order.

    >>> text_of(((4, "-", 9), "*", 3)), text_of((7, "-", (2, "+", (3, "*", 5))))
    ('(4 - 9) * 3', '7 - (2 + 3 * 5)')
    """
    if isinstance(expression, int):
        return str(expression)
    left, operation, right = expression

    def side(part: Expression, least: int) -> str:
        return f"({text_of(part)})" if not isinstance(part, int) and _RANK[part[1]] < least else text_of(part)

    return f"{side(left, _RANK[operation])} {operation} {side(right, _RANK[operation] + 1)}"


def steps_of(expression: Expression) -> list[str]:
    """The operations one after the other, each with its result.

    >>> steps_of((7, "-", ((4, "-", 9), "*", 3)))
    ['4 - 9 = -5', '-5 * 3 = -15', '7 - (-15) = 22']
    """
    if isinstance(expression, int):
        return []
    left, operation, right = expression
    a, b = value_of(left), value_of(right)
    second = f"({b})" if b < 0 else str(b)
    return [*steps_of(left), *steps_of(right), f"{a} {operation} {second} = {value_of(expression)}"]


def problem_of(level: int, draw: random.Random) -> Expression:
    """A random problem of a level."""

    def number(low: int, high: int) -> int:
        return draw.randint(low, high)

    def sign() -> str:
        return draw.choice("+-")

    if level == 1:
        return number(0, 9), "+", number(0, 9)
    if level == 2:
        a, b, operation = number(10, 99), number(10, 99), sign()
        return (max(a, b), "-", min(a, b)) if operation == "-" else (a, "+", b)
    if level == 3:
        if draw.random() < 0.5:
            return number(2, 9), "*", number(10, 99)
        return (number(10, 99), sign(), number(10, 99)), sign(), number(10, 99)
    product = number(2, 12), "*", number(2, 12)
    if level == 4:
        a = number(10, 99)
        return (a, sign(), product) if draw.random() < 0.5 else (product, sign(), a)
    large = [number(10, 999) for _ in range(4)]
    forms = (
        (((large[0], sign(), large[1]), "*", number(2, 9)), sign(), large[2]),
        ((number(2, 9), "*", (large[0], sign(), large[1])), sign(), product),
        ((large[0], sign(), large[1]), "*", (number(2, 20), sign(), number(2, 20))),
        (large[0], "-", (large[1], sign(), (number(2, 9), "*", large[2]))),
    )
    return draw.choice(forms)


def problems_of(level: int, num: int, seed: int) -> list[Expression]:
    """`num` distinct problems of a level, or all that there are; another seed gives others."""
    draw, found, repeats = random.Random(f"{seed} {level}"), {}, 0
    while len(found) < num and repeats < MOST_REPEATS:
        problem = problem_of(level, draw)
        repeats = repeats + 1 if problem in found else 0
        found[problem] = None
    return list(found)


def rows_of(flags: PrepareFlags) -> list[dict[str, str]]:
    """All problems, the levels in turn, as rows of the user's own data (`rlhf/data/custom.py`)."""
    each, left = divmod(flags.num_problems, len(flags.levels))
    shares = [each + (i < left) for i in range(len(flags.levels))]
    by_level = [problems_of(level, num, flags.seed) for level, num in zip(flags.levels, shares, strict=True)]
    for level, found, num in zip(flags.levels, by_level, shares, strict=True):
        if len(found) < num:
            print(f"level {level} has {len(found):,} problems, fewer than its share of {num:,}; all are taken")
    space = "" if flags.apply_chat_template else " "
    rows = []
    for problem in itertools.chain(*itertools.zip_longest(*by_level)):
        if problem is not None:
            answer = value_of(problem)
            worked = "\n".join([*steps_of(problem), f"The answer is {answer}."])
            asked = f"What is {text_of(problem)}?"
            rows.append({"prompt": asked, "completion": space + worked, "reference": str(answer)})
    return rows


def main(flags: PrepareFlags) -> dict[str, Any]:
    """Prepare one stage; returns its entry in `args.json`."""
    import datasets

    if not flags.levels or len(set(flags.levels)) < len(flags.levels):
        raise UserError(
            f"--levels {' '.join(map(str, flags.levels))} must be numbers from 1 to {NUM_LEVELS}, each once"
        )
    names = {field.name for field in dataclasses.fields(SharedFlags)} & {f.name for f in dataclasses.fields(flags)}
    shared = SharedFlags(**{name: getattr(flags, name) for name in names}, dataset_name="arithmetic")

    def make_parser(tokenizer: Any) -> CustomParser:
        return CustomParser(
            flags.stage,
            tokenizer,
            prompt_template=flags.template,
            apply_chat_template=flags.apply_chat_template,
        )

    made = Source(dataset=datasets.Dataset.from_list(rows_of(flags)), name="arithmetic")
    return prepare(shared, make_parser, prompt_template=flags.template, made=made, arguments=dataclasses.asdict(flags))


if __name__ == "__main__":
    launch(main, PrepareFlags)
