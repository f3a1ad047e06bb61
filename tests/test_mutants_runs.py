"""Mutants of runs: checkpoints, logs, signals, guards, estimates, and files from elsewhere; see test_mutants.py."""

from __future__ import annotations

import os

import pytest

from tests.test_mutants import Mutant, assert_not_stale, assert_noticed

CHECKPOINTS = "tests/test_checkpoints.py::"
GUARDS = "tests/test_guards.py::"
LOGS = "tests/test_disk.py::test_c23_"
MOMENTS = "tests/test_preflight.py::test_the_moments_are_there_from_the_start"
NONFINITE = "tests/test_nonfinite.py::test_c25_rows_of_dense_quantities_and_of_whole_micro_batches"
PREFLIGHT = "tests/test_preflight.py::test_a_micro_batch_is_as_large_as_its_parts_say"
SIGNALS = "tests/test_signals.py::test_each_signal_asks_for_its_own_and_gets_its_handler_back"
UNTRUSTED = "tests/test_untrusted.py::"

PRELOAD = (
    *("datasets", "lightning.fabric", "lightning.pytorch.loggers", "peft", "simple_parsing", "torchmetrics"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "transformers.generation"),
)

MUTANTS = [
    # A rate that may change, rows of a step counted on one device, another run that is gone on with.
    Mutant(
        "rlhf/experiment/identity.py",
        '    "keep_weights",\n',
        '    "keep_weights",\n    "learning_rate",\n',
        (CHECKPOINTS + "test_flags_free_to_change_are_flags",),
    ),
    Mutant(
        "rlhf/experiment/identity.py",
        "each * world_size == before * saved_world_size",
        "each == before",
        (CHECKPOINTS + "test_c27_a_step_keeps_its_size_on_other_devices",),
    ),
    Mutant(
        "rlhf/experiment/checkpoints.py",
        "            identity.check(state, folder)\n",
        "",
        (CHECKPOINTS + "test_flags_that_would_make_it_another_run_are_refused",),
    ),
    # The oldest checkpoint first; one too few kept; the best one lost to a worse.
    Mutant(
        "rlhf/experiment/checkpoints.py",
        "in reversed(self.steps())",
        "in self.steps()",
        (CHECKPOINTS + "test_c23_a_broken_checkpoint_is_named_and_the_one_before_it_taken",),
    ),
    Mutant(
        "rlhf/experiment/checkpoints.py",
        "so_far[: -self.keep] if",
        "so_far[: 1 - self.keep] if",
        (CHECKPOINTS + "test_the_last_ones_are_kept",),
    ),
    Mutant(
        "rlhf/experiment/checkpoints.py",
        "value <= best if higher else value >= best",
        "value >= best if higher else value <= best",
        (CHECKPOINTS + "test_c34_the_best_survives_worse_ones",),
    ),
    # The row before the guilty one; effects before causes.
    Mutant("rlhf/experiment/finite.py", "right=True", "right=False", (NONFINITE,)),
    Mutant(
        "rlhf/experiment/finite.py",
        "bad.view(len(self.rows), -1)",
        "bad.view(-1, len(self.rows)).T",
        (NONFINITE,),
    ),
    # Half of the batch for the whole; gradients that other micro-batches left; a heap without holes; a lost moment.
    Mutant("rlhf/experiment/preflight.py", "(sizes[2] - sizes[0]) /", "sizes[2] /", (PREFLIGHT,)),
    Mutant("rlhf/experiment/preflight.py", "gradients + activations if", "activations if", (PREFLIGHT,)),
    Mutant("rlhf/experiment/preflight.py", "holes = max(1.0,", "holes = min(1.0,", (PREFLIGHT,)),
    Mutant("rlhf/experiment/optimizers.py", "optimizer.state[p] = _moments(p, p.device)", "pass", (MOMENTS,)),
    # A save that stops the run; a handler that stays.
    Mutant("rlhf/experiment/signals.py", "self.save = True", "self.save = self.stop = True", (SIGNALS,)),
    Mutant("rlhf/experiment/signals.py", "signal.signal(number, handler)", "pass", (SIGNALS,)),
    # Half a line that stays; lines written twice; the newest lost in the place of the oldest; a cut a byte too far.
    Mutant("rlhf/experiment/logs.py", "file.truncate(before)", "pass", (LOGS + "lines_wait_for_room",)),
    Mutant("rlhf/experiment/logs.py", "self._waiting.clear()", "pass", (LOGS + "lines_wait_for_room",)),
    Mutant("rlhf/experiment/logs.py", "popleft()", "pop()", (LOGS + "the_lines_that_wait_are_bounded",)),
    Mutant(
        "rlhf/experiment/logs.py",
        "return start + place + 1",
        "return start + place",
        ("tests/test_resume.py::test_c4_a_huge_log_is_cut_without_reading_it",),
    ),
    # A fault that never ends; a rise taken for a fall; EOS alone taken for a response; a best that forgets.
    Mutant(
        "rlhf/guards.py",
        "fired.get(name, 0) + 1 if name in faults else 0",
        "fired.get(name, 0) + (name in faults)",
        (GUARDS + "test_each_guard_has_a_limit_of_its_own",),
    ),
    Mutant(
        "rlhf/guards.py",
        'start["eos"] - now["eos"] > flags.guard_eos',
        'now["eos"] - start["eos"] > flags.guard_eos',
        (GUARDS + "test_each_guard_has_a_limit_of_its_own",),
    ),
    Mutant("rlhf/guards.py", "<= e.ended for", "< e.ended for", (GUARDS + "test_health_by_hand",)),
    Mutant("rlhf/guards.py", "else max(score, best)", "else score", (GUARDS + "test_held_out_scores",)),
    # Sizes in elements, a gap between tensors, a bomb, a folder above, a link, an overflow that is taken for NaN.
    Mutant(
        "rlhf/untrusted.py",
        "if 8 * (last - first) !=",
        "if (last - first) !=",
        (UNTRUSTED + "test_a_whole_file_is_read",),
    ),
    Mutant(
        "rlhf/untrusted.py", "if entry.first != end:", "if entry.first > end:", (UNTRUSTED + "test_headers_that_lie",)
    ),
    Mutant(
        "rlhf/untrusted.py",
        "len(names) != len(records) or ",
        "",
        (UNTRUSTED + "test_archives_that_unpack_to_more_than_they_are",),
    ),
    Mutant(
        "rlhf/untrusted.py",
        "or name != Path(name).name or",
        "or",
        (UNTRUSTED + "test_an_index_names_files_of_its_own_folder",),
    ),
    Mutant(
        "rlhf/untrusted.py", "path.resolve(strict=True)", "path.absolute()", (UNTRUSTED + "test_links_that_lead_out",)
    ),
    Mutant(
        "rlhf/untrusted.py",
        " and not torch.isfinite(tensor).all()",
        "",
        (UNTRUSTED + "test_one_value_that_is_not_finite_is_found",),
    ),
    # Seeds that are a step apart; purposes that share a stream.
    Mutant(
        "rlhf/seeds.py",
        '(int.from_bytes(digest, "big") + step)',
        "(seed + step)",
        ("tests/test_batches.py::test_c27_neighbouring_seeds_and_purposes_share_no_stream",),
    ),
    Mutant(
        "rlhf/seeds.py",
        'f"{purpose} {seed}"',
        'f"{seed}"',
        ("tests/test_batches.py::test_c27_neighbouring_seeds_and_purposes_share_no_stream",),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}-{mutant.new.strip()}")
def test_rows_are_not_stale(mutant):
    assert_not_stale(mutant)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each mutant")
def test_every_mutant_is_noticed(tmp_path):
    assert_noticed(MUTANTS, tmp_path, PRELOAD)
