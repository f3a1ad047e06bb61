"""Flags: the frozen list of each script, help on every one, and how they are read."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from dataclasses import dataclass
from typing import Literal, get_type_hints

import pytest

from rlhf.errors import UserError
from rlhf.flag_values import RANGES, item_kind
from rlhf.flags import BatchFlags, DataFlags, ModelFlags, RunFlags, check_positive, launch, parse
from rlhf.rlhf_dpo import DPOFlags
from rlhf.rlhf_grpo import GRPOFlags
from rlhf.rlhf_kto import KTOFlags
from rlhf.rlhf_online_dpo import OnlineDPOFlags
from rlhf.rlhf_rm import RMFlags
from rlhf.rlhf_sft import SFTFlags
from rlhf.untrusted import LARGEST_JSON


def _names(text: str) -> set[str]:
    return set(text.split())


SHARED = _names(
    """
    accelerator args_file data_dir devices disable_dropout epochs eval_interval eval_iters experiment_dir
    finetune_mode gradient_checkpointing gradient_clip_val keep_checkpoints keep_weights learning_rate log_interval
    logger lora_alpha lora_dropout lora_rank lora_targets lr_schedule lr_warmup_steps max_steps memory_check
    micro_batch_size
    micro_batch_tokens mini_batch_size model_name num_nodes num_workers optimizer optimizer_beta1 optimizer_beta2
    optimizer_eps precision resume save_interval seed shuffle skip_nonfinite_steps strategy trust_remote_code
    weight_decay
    """
)
GUARDS = _names("on_collapse guard_patience guard_kl guard_eos guard_empty guard_length guard_repetition guard_score")
REWARD = {"reward", "reward_timeout", "rm_experiment_dir"}
ROLLOUT = _names(
    """
    sft_experiment_dir num_samples rollout_size rollout_mini_batch_size rollout_epochs missing_eos_penalty
    eval_temperature
    """
)
PAIRS = _names(
    """
    reference loss_type beta label_smoothing reference_free sft_coef max_chosen_drop loss_weights f_divergence
    f_divergence_alpha length_normalize ld_alpha wpo_weighting discopop_tau cpo_alpha simpo_gamma orpo_lambda
    ref_update_interval ref_mixup
    """
)
GENERATION = {"max_new_tokens", "temperature", "top_k", "top_p", "do_sample"}
FROZEN = {
    SFTFlags: SHARED | GENERATION | {"use_targets"},
    RMFlags: SHARED | {"sft_experiment_dir", "loss_type"},
    DPOFlags: SHARED
    | GENERATION
    | _names("sft_experiment_dir reference loss_type beta label_smoothing reference_free sft_coef max_chosen_drop")
    | _names("loss_weights f_divergence f_divergence_alpha length_normalize ld_alpha wpo_weighting discopop_tau")
    | _names("cpo_alpha simpo_gamma orpo_lambda ref_update_interval ref_mixup"),
    KTOFlags: SHARED
    | GENERATION
    | _names("sft_experiment_dir reference loss_type beta desirable_weight undesirable_weight max_chosen_drop"),
    OnlineDPOFlags: SHARED | GENERATION | REWARD | ROLLOUT | GUARDS | PAIRS | {"judge"},
    GRPOFlags: SHARED
    | GENERATION
    | REWARD
    | ROLLOUT
    | GUARDS
    | _names("advantage loss_type loss_normalization clip_low clip_high kl_coef kl_in kl_estimator kl_unbiased")
    | _names("entropy_coef mask_truncated dynamic_sampling max_resamples"),
}
"""The names that users have in their shell scripts. Adding one is fine; renaming or removing one breaks them."""

SCRIPTS = pytest.mark.parametrize("script", FROZEN, ids=lambda script: script.__name__)


@dataclass(kw_only=True)
class SomeFlags(DataFlags, ModelFlags, BatchFlags, RunFlags):
    """A script's flags."""

    rate: float = 0.5
    """Some rate."""
    kind: Literal["one", "other"] = "one"
    """Some kind."""


def docstrings_of(script: type) -> dict[str, str]:
    """The docstring under each field, whichever class declares it; empty where there is none."""
    found = {}
    for cls in reversed(script.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                found[node.target.id] = after.value.value if is_text else ""
    return found


@SCRIPTS
def test_names_are_frozen(script):
    assert {field.name for field in dataclasses.fields(script)} == FROZEN[script]


@SCRIPTS
def test_help_explains_every_flag(script, capsys):
    """Each flag stands in `--help` with a sentence, in a group, and the page opens with the module's docstring."""
    assert set(docstrings_of(script)) == FROZEN[script]
    assert all(len(explanation.split()) > 0 for explanation in docstrings_of(script).values())
    with pytest.raises(SystemExit, match="0"):
        parse(script, ["--help"])
    page = capsys.readouterr().out
    for group in ("Data:", "Model:", "Batches and length of the run:", "Devices, all through Lightning Fabric:"):
        assert f"\n{group}\n" in page
    for name, explanation in docstrings_of(script).items():
        assert f"\n  --{name} " in page.replace(", --", " --")
        assert " ".join(explanation.split()) in " ".join(page.split())
    assert "CPU: python" in page.split("Data:")[0]


@SCRIPTS
def test_defaults_parse_to_the_dataclass(script):
    assert parse(script, ["--data_dir=data"]) == script(data_dir="data")


def test_values_are_read():
    """Booleans take a value; dashes and underscores both work; `=` and a space both; a list; the alias."""
    argv = "--data-dir d --shuffle=False --mini_batch_size=3 --model_name_or_path m --lora_targets q v --rate 1e-3"
    found = parse(SomeFlags, argv.split())
    assert (found.data_dir, found.shuffle, found.mini_batch_size, found.model_name) == ("d", False, 3, "m")
    assert found.lora_targets == ["q", "v"]
    assert found.rate == 1e-3
    assert parse(SomeFlags, ["--data_dir=d", "--model_name=m"]).model_name == "m"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--mini_batch=3"], "--mini_batch is no flag of this script; did you mean --mini_batch_size?"),
        (["--epochs=many"], "--epochs=many must be a number"),
        (["--kind=third"], "--kind=third must be one of one, other"),
        (["--unknown=1"], "--unknown is no flag of this script; see --help"),
        (["--shuffle=perhaps"], "--shuffle=perhaps must be True or False"),
        (["--max_steps"], "--max_steps needs a value; write --max_steps=VALUE"),
        (["--lora_targets"], "--lora_targets needs a value"),
        (["--lora_targets", "q", ""], "--lora_targets is empty"),
    ],
)
def test_what_cannot_be_read_is_refused(argv, complaint):
    """An abbreviation, a word for a number, a third choice, an unknown name, an unclear boolean, nothing at all."""
    with pytest.raises(UserError, match=re.escape(complaint)):
        parse(SomeFlags, ["--data_dir=d", *argv])


def test_args_file_repeats_a_run_and_the_command_line_wins(tmp_path):
    first = parse(SomeFlags, ["--data_dir=d", "--rate=2", "--lora_targets", "q", "--shuffle=False"])
    path = tmp_path / "args.json"
    path.write_text(json.dumps(dataclasses.asdict(first)))
    assert parse(SomeFlags, [f"--args_file={path}"]) == dataclasses.replace(first, args_file=str(path))
    assert parse(SomeFlags, ["--args-file", str(path), "--rate=3"]).rate == 3


def test_args_file_of_a_run_says_what_was_run_and_not_where(tmp_path):
    """Repeating gets a folder of its own, unless the command line names one; resuming goes on beside the file, also
    where the folder was moved; a file that is no run's is taken word for word."""
    path, given = tmp_path / "args.json", {"data_dir": "d", "rate": 2.0, "experiment_dir": "old", "resume": True}
    path.write_text(json.dumps(given))
    own = parse(SomeFlags, [f"--args_file={path}"])
    assert (own.experiment_dir, own.resume) == ("old", True)
    (tmp_path / "environment.json").write_text("{}")
    for argv, folder, resume in (
        ([], None, False),
        (["--experiment_dir=new"], "new", False),
        (["--resume=True"], str(tmp_path), True),
        (["--resume=True", "--experiment_dir=new"], "new", True),
    ):
        flags = parse(SomeFlags, [f"--args_file={path}", *argv])
        assert (flags.experiment_dir, flags.resume, flags.rate) == (folder, resume, 2.0)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        (" " * LARGEST_JSON + "{}", "has more than 4 MB"),
        ("{", "not valid JSON"),
        ("[1]", "no JSON object"),
        ('{"data_dir": "d", "rates": 1}', "'rates' is not a flag"),
        ('{"rate": 1}', "lacks 'data_dir'"),
    ],
)
def test_args_file_mistakes_are_named(tmp_path, content, complaint):
    path = tmp_path / "args.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        parse(SomeFlags, [f"--args_file={path}"])


def test_launch_ends_a_mistake_with_one_sentence_and_status_2(monkeypatch, capsys):
    def main(flags):
        raise UserError(f"--rate={flags.rate} is wrong; take another")

    monkeypatch.setattr(sys, "argv", ["script", "--data_dir=d", "--rate=7"])
    with pytest.raises(SystemExit) as ended:
        launch(main, SomeFlags)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --rate=7.0 is wrong; take another\n"


def test_launch_lets_other_errors_through(monkeypatch):
    """A fault of ours keeps its traceback."""

    def main(flags):
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["script", "--data_dir=d"])
    with pytest.raises(ZeroDivisionError):
        launch(main, SomeFlags)


def test_numbers_are_checked_as_flags_are_made():
    """Also where no command line is parsed: `main` may be called with flags that were made in Python."""
    for wrong, complaint in (
        ({"max_steps": 0}, "--max_steps=0 must be above 0"),
        ({"epochs": float("nan")}, "--epochs=nan must be a finite number"),
        ({"lora_dropout": 1.0}, "--lora_dropout=1.0 must be in [0, 1)"),
        ({"mini_batch_size": 2**31}, "--mini_batch_size=2147483648 must not be above 2,147,483,647"),
        ({"lora_alpha": -1}, "--lora_alpha=-1 must be above 0"),
    ):
        with pytest.raises(UserError, match=re.escape(complaint)):
            SomeFlags(data_dir="d", **wrong)


def test_check_positive_names_the_flag():
    flags = SomeFlags(data_dir="d", rate=0.0)
    check_positive(flags, "mini_batch_size", "micro_batch_tokens", "absent")
    with pytest.raises(UserError, match=r"--rate=0\.0 must be above 0"):
        check_positive(flags, "mini_batch_size", "rate")


@SCRIPTS
def test_every_number_has_a_range(script):
    """So that no new flag takes a NaN, or less than none, unasked."""
    hints = get_type_hints(script)
    numbers = {field.name for field in dataclasses.fields(script) if item_kind(hints[field.name]) in (int, float)}
    assert numbers <= set(RANGES)
