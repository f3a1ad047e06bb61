"""Command lines, args files and rewards made up by hypothesis: flags that can be used, or one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from data_prep.arithmetic import prepare_data as arithmetic
from data_prep.custom import prepare_data as custom
from data_prep.helpful_harmless import prepare_data as dialogues
from data_prep.summarization import prepare_data as summaries
from rlhf.data.prepare_flags import check_flags
from rlhf.flags import parse
from rlhf.rewards.rules import last_number, numeric_answer, rule_of
from rlhf.rewards.specs import parse_spec
from rlhf.rlhf_dpo import DPOFlags
from rlhf.rlhf_evaluate import EvaluateFlags, named_models
from rlhf.rlhf_grpo import GRPOFlags
from rlhf.rlhf_kto import KTOFlags
from rlhf.rlhf_online_dpo import OnlineDPOFlags
from rlhf.rlhf_ppo import PPOFlags
from rlhf.rlhf_rm import RMFlags
from rlhf.rlhf_sft import SFTFlags
from tests.demo_runs import load
from tests.fuzz import ANY_TEXT, JSON, attempt, fuzz

TRAINING = [SFTFlags, RMFlags, DPOFlags, KTOFlags, PPOFlags, GRPOFlags, OnlineDPOFlags]
PREPARING = [module.PrepareFlags for module in (dialogues, summaries, custom, arithmetic)]
DEMOS = [load("chat").ChatFlags, load("summarize").SummarizeFlags]
EVERY = [*TRAINING, EvaluateFlags, *PREPARING, *DEMOS]

NUMBERS = st.sampled_from(
    ["0", "1", "-1", "2", "0.5", "1e-6", "1e6", "nan", "-inf", "1e400", "1e308", "5e-324", "4294967296", "9" * 4400]
)
SAID = st.sampled_from(
    ["True", "False", "auto", "none", "lora", "sigmoid", "ipo", "gspo", "js", "length:3", "a=b", "--"]
)
VALUES = NUMBERS | SAID | st.integers().map(str) | st.floats().map(str) | ANY_TEXT


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[type, list[str]]:
    """Flags of some script, and a few of them with any values, spelled in any of the allowed ways or nearly so."""
    script = draw(st.sampled_from(EVERY))
    names = [field.name for field in dataclasses.fields(script)]
    required = [f.name for f in dataclasses.fields(script) if f.default is f.default_factory is dataclasses.MISSING]
    words = [f"--{name}=1" for name in required if draw(st.integers(0, 9))]
    for name in draw(st.lists(st.sampled_from(names) | ANY_TEXT, max_size=4)):
        name = name.replace("_", "-") if draw(st.booleans()) else name
        value = draw(VALUES)
        words += draw(st.sampled_from([[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [value]]))
    return script, [word for word in words if word not in ("-h", "--help")]


def check(script: type, argv: list[str]) -> None:
    """The flags are made, and all their numbers are finite; or the error is one line."""

    def read() -> Any:
        flags = parse(script, argv)
        if isinstance(flags, tuple(PREPARING[:3])):
            check_flags(flags)
        return flags

    flags, error = attempt(read)
    if error is not None:
        assert len(str(error).splitlines()) == 1, str(error)
        assert len(str(error)) < 1000, str(error)
        str(error).encode("utf-8")
        return
    for value in vars(flags).values():
        for item in value if isinstance(value, list) else [value]:
            assert not isinstance(item, float) or math.isfinite(item)


@fuzz(250)
@given(line=command_lines())
def test_any_command_line(line):
    check(*line)


@st.composite
def args_files(draw: st.DrawFn) -> tuple[type, bytes]:
    """What stands in an args file: any bytes, any JSON, or flags with any values."""
    script = draw(st.sampled_from(TRAINING))
    names = st.sampled_from([field.name for field in dataclasses.fields(script)])
    values = JSON | VALUES | st.sampled_from([0, 1, -1, 0.5, 10**400, 2**31])
    flags = st.dictionaries(names | ANY_TEXT, values, max_size=4).map(lambda some: {"data_dir": "d", **some})
    content = flags.map(json.dumps) | JSON.map(json.dumps) | st.just('{"data_dir": "d", "seed": ' + "9" * 5000 + "}")
    return script, draw(content.map(str.encode) | st.binary(max_size=30))


@fuzz(200)
@given(file=args_files())
def test_any_args_file(tmp_path_factory, file):
    script, content = file
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    check(script, [f"--args_file={path}"])


KINDS = ["exact", "numeric", "regex", "length", "overlong", "repetition", "keyword", "http", "https", "none", "model"]
SPECS = st.lists(
    st.sampled_from([*KINDS, ":", "*", "0.5", "-1", "nan", "1e999", ",", "(", "[", "//", " ", "7", "²", "٣"])
    | ANY_TEXT,
    max_size=5,
).map("".join)


@fuzz(300)
@given(text=SPECS)
def test_any_reward(text):
    """A word of --reward is refused, or its rule can be made."""
    spec, error = attempt(lambda: parse_spec(text))
    if spec is not None:
        assert math.isfinite(spec.weight)
        assert spec.weight != 0
        rule = spec.kind not in ("model", "function", "http", "https")
        _, error = attempt(lambda: rule_of(spec) if rule else None)
    assert error is None or str(error).startswith("--reward")


@fuzz(300)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(list("0123456789.,eE+-−² x(")), max_size=12).map("".join), min_size=2, max_size=2
    )
)
def test_any_number_in_an_answer(texts):
    """A sampled answer is right or wrong, whatever it holds; a reference without a number is the one error."""
    score, error = attempt(lambda: numeric_answer(*texts), ValueError)
    assert score in (0.0, 1.0) if error is None else last_number(texts[1]) is None


@fuzz(100)
@given(
    models=st.lists(
        st.sampled_from(["a=b", "a", "=", "a=", "=b", "a=b=c", "."]) | ANY_TEXT.filter(lambda t: "\0" not in t),
        max_size=3,
    )
)
def test_any_models_to_evaluate(models):
    found, error = attempt(lambda: named_models(models))
    assert error is not None or len(found) == len(models)
