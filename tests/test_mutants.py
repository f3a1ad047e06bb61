"""Mutants: one-line faults of layers 0 and 1, each of which the tests named beside it must notice.

Each row of `MUTANTS` is applied to a copy of the package and of its tests, and pytest runs the named tests there.
A child process does that: it imports torch and pytest once, then forks for every copy, so a mutant costs a fraction
of a second. In the fork the copy is first on the path, and it is checked that `rlhf` came from there. A row counts
as noticed only when tests ran and one of them failed; a mutant that can't be imported doesn't. One copy is left as it
is, and there every named test must pass.

To add a fault, add a row.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Imported before forking, so that no mutant pays for it.
PRELOAD = ("torch", "torch.nn.functional", "pytest", "transformers.models.auto.tokenization_auto")
SECONDS_PER_MUTANT = 60
OPTIONS = ("-x", "--tb=short", "--assert=plain", "-o", "addopts=", "-p", "no:cacheprovider")
UNCHANGED = "unchanged"
NOT_THE_COPY = 70


class Mutant(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; at least one of `tests` (pytest node ids) must fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MASKED = "tests/test_masked.py::"
KL = "tests/test_kl.py::"
ADVANTAGES = "tests/test_advantages.py::"
SCHEDULES = "tests/test_schedules.py::"
REWARD = "tests/test_losses_reward.py::"
PREFERENCE = "tests/test_losses_preference.py::"
FEEDBACK = "tests/test_losses_feedback.py::"
POLICY = "tests/test_losses_policy_gradient.py::"
GROUPS = "tests/test_group_advantages.py::"

MUTANTS = [
    # An inverted mask; a mask that multiplies; a missing guard against nothing; pads in the variance.
    Mutant(
        "rlhf/masked.py",
        "x.masked_fill(~mask, 0)",
        "x.masked_fill(mask, 0)",
        (MASKED + "test_sum_and_mean_by_hand",),
    ),
    Mutant(
        "rlhf/masked.py",
        "x.masked_fill(~mask, 0)",
        "x * mask",
        (MASKED + "test_padding_influences_neither_value_nor_gradient",),
    ),
    Mutant(
        "rlhf/masked.py",
        "masked_sum(x, mask, dim) / count.clamp(min=1)",
        "masked_sum(x, mask, dim) / count",
        (MASKED + "test_nothing_real_is_zero_with_a_finite_gradient",),
    ),
    Mutant(
        "rlhf/masked.py",
        "_real(x - masked_mean(x, mask), mask)",
        "x - masked_mean(x, mask)",
        (MASKED + "test_variance_by_hand",),
    ),
    Mutant(
        "rlhf/masked.py",
        "count - 1 if unbiased else count",
        "count - 1",
        (MASKED + "test_g3_whitening_gives_mean_zero_and_biased_variance_one",),
    ),
    Mutant(
        "rlhf/masked.py",
        "torch.rsqrt(var + eps)",
        "torch.rsqrt(var)",
        (MASKED + "test_whitening_epsilon_by_hand",),
    ),
    Mutant(
        "rlhf/masked.py",
        "if not shift_mean:",
        "if shift_mean:",
        (MASKED + "test_k4_whitening_may_keep_the_mean",),
    ),
    Mutant(
        "rlhf/masked.py",
        "squares / count - mean.square()",
        "squares / count",
        (MASKED + "test_g4_global_whitening_is_the_same_however_the_rows_are_cut",),
    ),
    Mutant(
        "rlhf/masked.py",
        "_real(x.detach(), mask).to(widest(x.device))",
        "_real(x, mask).to(widest(x.device))",
        (MASKED + "test_moments_carry_no_gradient",),
    ),
    Mutant(
        "rlhf/masked.py",
        "_real(x.detach(), mask).to(widest(x.device))",
        "_real(x.detach(), mask).float()",
        (MASKED + "test_moments_keep_a_small_variance_on_a_large_mean",),
    ),
    # The direction of the KL; digits lost to cancellation.
    Mutant(
        "rlhf/kl.py",
        "    return logps - ref_logps",
        "    return ref_logps - logps",
        (KL + "test_k6_c35_means_match_the_exact_kl",),
    ),
    Mutant(
        "rlhf/kl.py",
        "    d = ref_logps - logps",
        "    d = logps - ref_logps",
        (KL + "test_k6_c35_means_match_the_exact_kl",),
    ),
    Mutant(
        "rlhf/kl.py",
        "torch.expm1(d) - d",
        "torch.exp(d) - 1 - d",
        (KL + "test_k3_is_exact_for_small_differences",),
    ),
    # The penalty's sign; a mask shifted the wrong way; a score for an empty row.
    Mutant(
        "rlhf/advantages.py",
        "(-kl_coef * token_kl)",
        "(kl_coef * token_kl)",
        (ADVANTAGES + "test_k1_a_policy_surer_than_the_reference_is_charged",),
    ),
    Mutant(
        "rlhf/advantages.py",
        "after[..., 1:] = response_mask[..., :-1]",
        "after[..., :-1] = response_mask[..., 1:]",
        (ADVANTAGES + "test_p12_two_masks_by_hand",),
    ),
    Mutant(
        "rlhf/advantages.py",
        "positions.masked_fill(~value_mask, -1)",
        "positions.masked_fill(~value_mask, 0)",
        (ADVANTAGES + "test_p13_padding_gets_no_reward",),
    ),
    # GAE: lambda left out, a sign, the value of a pad, returns without values, a missing detach.
    Mutant(
        "rlhf/advantages.py",
        "delta + gamma * lam * next_advantage",
        "delta + gamma * next_advantage",
        (ADVANTAGES + "test_g1_by_hand",),
    ),
    Mutant(
        "rlhf/advantages.py",
        "gamma * next_value - values[:, t]",
        "gamma * next_value + values[:, t]",
        (ADVANTAGES + "test_g1_by_hand",),
    ),
    Mutant(
        "rlhf/advantages.py",
        "torch.where(real, values[:, t], next_value)",
        "values[:, t]",
        (ADVANTAGES + "test_g1_by_hand",),
    ),
    Mutant(
        "rlhf/advantages.py",
        "returns = advantages + values",
        "returns = advantages",
        (ADVANTAGES + "test_g2_returns_are_raw_advantages_plus_values",),
    ),
    Mutant(
        "rlhf/advantages.py",
        "@torch.no_grad()\ndef gae(",
        "def gae(",
        (ADVANTAGES + "test_targets_carry_no_gradient",),
    ),
    Mutant(
        "rlhf/advantages.py",
        "scores.masked_fill(~ended, value)",
        "scores.masked_fill(ended, value)",
        (ADVANTAGES + "test_p10_missing_eos",),
    ),
    Mutant(
        "rlhf/advantages.py",
        "delta * delta * self.count * count / total",
        "delta * delta * self.count / total",
        (ADVANTAGES + "test_k5_running_moments_match_the_plain_ones",),
    ),
    Mutant(
        "rlhf/advantages.py",
        "return x / self.std",
        "return (x - self.mean) / self.std",
        (ADVANTAGES + "test_k5_scaling_keeps_the_mean_and_normalising_removes_it",),
    ),
    # A first update at rate 0; a decay one step early; an error that isn't clipped.
    Mutant(
        "rlhf/schedules.py",
        "(step + 1) / warmup_steps",
        "step / warmup_steps",
        (SCHEDULES + "test_warmup_by_hand",),
    ),
    Mutant(
        "rlhf/schedules.py",
        "(step - warmup_steps) / max(",
        "(step + 1 - warmup_steps) / max(",
        (SCHEDULES + "test_l8_linear_decay_over_all_updates",),
    ),
    Mutant(
        "rlhf/schedules.py",
        "min(max(kl / self.target - 1.0, -0.2), 0.2)",
        "kl / self.target - 1.0",
        (SCHEDULES + "test_k3_three_updates_by_hand",),
    ),
    # The reward model's loss: sign, margin, where two responses part, how far they go, what is carried on.
    Mutant(
        "rlhf/losses/reward.py",
        "chosen_scores - rejected_scores",
        "rejected_scores - chosen_scores",
        (REWARD + "test_r5_by_hand",),
    ),
    Mutant(
        "rlhf/losses/reward.py",
        "difference - margin",
        "difference + margin",
        (REWARD + "test_margin_is_what_the_chosen_must_lead_by",),
    ),
    Mutant(
        "rlhf/losses/reward.py",
        "positions >= first_difference",
        "positions > first_difference",
        (REWARD + "test_per_sample_by_hand",),
    ),
    Mutant(
        "rlhf/losses/reward.py",
        "torch.maximum(chosen_mask",
        "torch.minimum(chosen_mask",
        (REWARD + "test_per_sample_by_hand",),
    ),
    Mutant(
        "rlhf/losses/reward.py",
        "keepdim=True) - 1).clamp",
        "keepdim=True) - 2).clamp",
        (REWARD + "test_per_sample_by_hand",),
    ),
    # DPO and its relatives: the reference's side, the smoothed side, IPO's target, the hinge's sign.
    Mutant(
        "rlhf/losses/preference.py",
        "return beta * (policy_logps - ref_logps)",
        "return beta * (policy_logps + ref_logps)",
        (PREFERENCE + "test_implicit_rewards_by_hand",),
    ),
    Mutant(
        "rlhf/losses/preference.py",
        "label_smoothing * F.logsigmoid(-logits)\n\n\ndef robust",
        "label_smoothing * F.logsigmoid(logits)\n\n\ndef robust",
        (PREFERENCE + "test_label_smoothing_by_hand",),
    ),
    Mutant(
        "rlhf/losses/preference.py",
        "margin - 1.0 / (2.0 * beta)",
        "margin - 1.0 / beta",
        (PREFERENCE + "test_ipo_by_hand",),
    ),
    Mutant(
        "rlhf/losses/preference.py",
        "1.0 - beta * margin",
        "1.0 + beta * margin",
        (PREFERENCE + "test_hinge_by_hand",),
    ),
    # KTO and BCO: labels turned, a KL that may be negative or isn't in nats, weights exchanged, delta's sign, a missing
    # detach.
    Mutant(
        "rlhf/losses/feedback.py",
        "torch.where(labels, -gain, gain)",
        "torch.where(labels, gain, -gain)",
        (FEEDBACK + "test_kto_by_hand",),
    ),
    Mutant(
        "rlhf/losses/feedback.py",
        "beta * (policy_logps - ref_logps - kl.detach())",
        "beta * (policy_logps - ref_logps) - kl.detach()",
        (FEEDBACK + "test_kto_by_hand",),
    ),
    Mutant(
        "rlhf/losses/feedback.py",
        "ref_logps - kl.detach()",
        "ref_logps - kl",
        (FEEDBACK + "test_the_point_of_reference_carries_no_gradient",),
    ),
    Mutant(
        "rlhf/losses/feedback.py",
        "torch.where(labels, desirable_weight, undesirable_weight)",
        "torch.where(labels, undesirable_weight, desirable_weight)",
        (FEEDBACK + "test_apo_zero_by_hand",),
    ),
    Mutant(
        "rlhf/losses/feedback.py",
        ".mean().clamp(min=0)",
        ".mean()",
        (FEEDBACK + "test_kl_by_hand",),
    ),
    Mutant(
        "rlhf/losses/feedback.py",
        "mismatched_log_ratios.detach()",
        "mismatched_log_ratios",
        (FEEDBACK + "test_kl_by_hand",),
    ),
    Mutant(
        "rlhf/losses/feedback.py",
        "(policy_logps - ref_logps) - delta.detach()",
        "(policy_logps - ref_logps) + delta.detach()",
        (FEEDBACK + "test_bco_by_hand",),
    ),
    Mutant(
        "rlhf/losses/feedback.py",
        "torch.where(labels, shifted, -shifted)",
        "torch.where(labels, -shifted, shifted)",
        (FEEDBACK + "test_descent_raises_the_good_and_lowers_the_bad",),
    ),
    Mutant(
        "rlhf/reports.py",
        "(below + not_above) / (2 * len(good) * len(bad))",
        "(below + below) / (2 * len(good) * len(bad))",
        ("tests/test_reports.py::test_auc_by_hand",),
    ),
    # PPO: the ratio upside down, half a clip, a clip around 0, a sign, a gradient through a metric.
    Mutant(
        "rlhf/losses/policy_gradient.py",
        "torch.exp(token_logps - old_token_logps)",
        "torch.exp(old_token_logps - token_logps)",
        (POLICY + "test_l1_by_hand",),
    ),
    Mutant(
        "rlhf/losses/policy_gradient.py",
        "ratio.clamp(1.0 - clip_low, 1.0 + clip_high)",
        "ratio.clamp(max=1.0 + clip_high)",
        (POLICY + "test_l1_by_hand",),
    ),
    # GRPO's relatives: a ratio of the wrong length, a weight that is learnt, a gradient lost or doubled.
    Mutant(
        "rlhf/losses/policy_gradient.py",
        "return masked_mean(token_logps - old_token_logps, response_mask, dim=1).unsqueeze(1)",
        "return (token_logps - old_token_logps).mean(1, keepdim=True)",
        (POLICY + "test_gspo_by_hand",),
    ),
    Mutant(
        "rlhf/losses/policy_gradient.py",
        "torch.exp(log_ratios + token_logps - token_logps.detach())",
        "torch.exp(log_ratios + token_logps - old_token_logps)",
        (POLICY + "test_gspo_by_hand",),
    ),
    Mutant(
        "rlhf/losses/policy_gradient.py",
        "torch.exp(token_logps.detach() - old_token_logps).clamp",
        "torch.exp(token_logps - old_token_logps).clamp",
        (POLICY + "test_cispo_by_hand",),
    ),
    Mutant(
        "rlhf/losses/policy_gradient.py",
        "clamp(1.0 - clip_low, 1.0 + clip_high)\n    return -weights",
        "clamp(max=1.0 + clip_high)\n    return -weights",
        (POLICY + "test_cispo_by_hand",),
    ),
    # Group advantages: the wrong divisor, float32 sums, one's own reward in one's baseline; weights of responses.
    Mutant(
        "rlhf/group_advantages.py",
        "/ (rewards.shape[1] - 1)).sqrt()",
        "/ rewards.shape[1]).sqrt()",
        (GROUPS + "test_grpo_by_hand",),
    ),
    Mutant(
        "rlhf/group_advantages.py",
        "return rewards.double().mean(1, keepdim=True)",
        "return rewards.mean(1, keepdim=True)",
        (GROUPS + "test_equal_rewards_have_advantages_of_exactly_zero",),
    ),
    Mutant(
        "rlhf/group_advantages.py",
        "* (num / (num - 1))",
        "* ((num - 1) / num)",
        (GROUPS + "test_rloo_by_hand",),
    ),
    Mutant(
        "rlhf/group_advantages.py",
        "return masked_whiten(returns, response_mask).float()",
        "return masked_whiten(returns, response_mask, shift_mean=False).float()",
        (GROUPS + "test_reinforce_pp_by_hand",),
    ),
    Mutant(
        "rlhf/group_advantages.py",
        "gamma=1.0, lam=1.0)",
        "gamma=1.0, lam=0.95)",
        (GROUPS + "test_reinforce_pp_by_hand",),
    ),
    Mutant(
        "rlhf/group_advantages.py",
        "(lengths * counted).sum()",
        "lengths.sum()",
        (GROUPS + "test_weights_by_hand",),
    ),
    Mutant(
        "rlhf/group_advantages.py",
        "divisors = num * lengths",
        "divisors = counted.sum() * lengths",
        (GROUPS + "test_weights_by_hand",),
    ),
    Mutant(
        "rlhf/losses/policy_gradient.py",
        "torch.clamp(values, old_values - clip_coef, old_values + clip_coef)",
        "torch.clamp(values, -clip_coef, clip_coef)",
        (POLICY + "test_l2_by_hand",),
    ),
    Mutant(
        "rlhf/losses/policy_gradient.py",
        "1.0 - error_var / return_var",
        "error_var / return_var",
        (POLICY + "test_c33_explained_variance_by_hand",),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}-{mutant.new.strip()}")
def test_rows_are_not_stale(mutant):
    assert_not_stale(mutant)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each mutant")
def test_every_mutant_is_noticed(tmp_path):
    assert_noticed(MUTANTS, tmp_path)


def assert_not_stale(mutant: Mutant) -> None:
    """The old text stands in the file exactly once, and the new one still compiles."""
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")


def assert_noticed(mutants: list[Mutant], parent: Path, preload: tuple[str, ...] = ()) -> None:
    """At least one of a mutant's tests fails; all of them pass on the unchanged copy.

    `parent`: an empty folder; `preload`: what the tests import besides `PRELOAD`, but for `rlhf`.
    """
    everything = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    _copy(parent / UNCHANGED, everything)
    for index, mutant in enumerate(mutants):
        file = _copy(parent / f"{index:03d}", mutant.tests) / mutant.file
        source = file.read_text(encoding="utf-8")
        file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")

    # Nothing of the pytest that runs this may reach the ones it starts, nor any plugin they don't need.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-B", str(Path(__file__).resolve()), str(parent), *preload]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)

    def told(name: str) -> str:
        return (parent / name / "output.txt").read_text(encoding="utf-8")

    assert codes.pop(UNCHANGED) == pytest.ExitCode.OK, told(UNCHANGED)
    assert len(codes) == len(mutants)
    for name, code in codes.items():
        mutant = mutants[int(name)]
        assert code == pytest.ExitCode.TESTS_FAILED, f"not noticed (exit {code}): {mutant}\n{told(name)}"


def _copy(folder: Path, tests: tuple[str, ...]) -> Path:
    # A copy of all that the tests need, and the list of those to run in it.
    folder.mkdir()
    for name in ("rlhf", "tests", "data_prep"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "nodes.json").write_text(json.dumps(tests), encoding="utf-8")
    return folder


def _run_all(parent: Path, preload: list[str]) -> dict[str, int]:
    # The exit code of pytest in each copy under `parent`; negative: the signal that ended it.
    sys.path.pop(0)  # this file's folder
    for name in (*PRELOAD, *preload):
        __import__(name)
    gc.freeze()  # pytest collects garbage at its end: in the forks, it need not walk all of torch
    codes = {}
    for folder in sorted(path for path in parent.iterdir() if path.is_dir()):
        child = os.fork()
        if child == 0:
            _run_one(folder)
        codes[folder.name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return codes


def _run_one(folder: Path) -> None:
    # In the fork: pytest on the copy, then out without any of the parent's clean-up.
    code = NOT_THE_COPY
    try:
        signal.alarm(SECONDS_PER_MUTANT)
        with (folder / "output.txt").open("w", encoding="utf-8") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)  # for what the tests start
        sys.path.insert(0, str(folder))
        nodes = json.loads((folder / "nodes.json").read_text(encoding="utf-8"))
        result = int(pytest.main([*nodes, *OPTIONS]))
        package = [module for name, module in sys.modules.items() if name.partition(".")[0] == "rlhf"]
        if package and all(Path(module.__file__).is_relative_to(folder) for module in package):
            code = result
        sys.stdout.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    print(json.dumps(_run_all(Path(sys.argv[1]), sys.argv[2:])))
