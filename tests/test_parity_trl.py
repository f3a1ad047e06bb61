"""Whole trajectories of SFT, RM, KTO, DPO and its relatives against TRL 1.16.0, step by step; tests/peers.py names the
deviations.

Rows of very unequal lengths in file order, 14 of them by fours, so that each of the 5 epochs ends in a step of two.
"""

from __future__ import annotations

import pytest

from tests.peers import STAGES, Comparison, Trajectory, compare, require_trl
from tests.splits import make_data, make_model_dir, metrics_of

TOLERANCE = 1e-4

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::FutureWarning")]


def agree(ours: Trajectory, theirs: Trajectory) -> None:
    """The same tokens went in, and 20 losses came out within the tolerance, while training moved them by far more."""
    assert ours.rows == theirs.rows
    assert len(ours.losses) == len(theirs.losses) == 20
    gaps = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    assert max(gaps) <= TOLERANCE, f"step {gaps.index(max(gaps))} differs by {max(gaps):.1e}"
    first, last = sum(ours.losses[:4]), sum(ours.losses[16:])
    assert abs(first - last) > 1000 * TOLERANCE, "the model hardly moved: nothing was compared"


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_in_trl(stage, tmp_path):
    """R1, R5, C5: rotary positions, a linear schedule, the step packed as one forest against TRL's padded batch."""
    require_trl()
    data, model = make_data(tmp_path / "data", num_validation=0), make_model_dir(tmp_path / "model", "llama")

    agree(*compare(Comparison(stage=stage, model=model, data=data, work=tmp_path, learning_rate=1e-3)))
    if stage == "kto":
        assert sum(line["train/kl"] > 0.1 for line in metrics_of(tmp_path / "kto-here") if "train/kl" in line) >= 5


@pytest.mark.parametrize(
    ("stage", "given"),
    [
        ("mpo", {}),
        ("wpo", {}),
        ("tr_dpo", {"learning_rate": 3e-3}),
        ("ld_dpo", {}),
        ("aot_unpaired", {"micro_batch": 3}),
    ],
)
def test_twenty_steps_in_trl_of_other_objectives(stage, given, tmp_path):
    """What one loss's value doesn't show: a likelihood a token, collisions of a real model's distributions, a reference
    that moves, and C3: ranks of a whole step that is cut."""
    require_trl()
    data, model = make_data(tmp_path / "data", num_validation=0), make_model_dir(tmp_path / "model", "llama")

    given = {"learning_rate": 1e-3, **given}
    agree(*compare(Comparison(stage=stage, model=model, data=data, work=tmp_path, **given)))


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ipo", "orpo", "cpo"])
def test_twenty_steps_in_trl_with_absolute_positions_and_cut_steps(stage, tmp_path):
    """C3, C5, R1, R5: a GPT-2, a constant rate, no clipping; here each step is cut into micro-batches of three rows."""
    require_trl()
    data, model = make_data(tmp_path / "data", num_validation=0), make_model_dir(tmp_path / "model", "gpt2")

    comparison = Comparison(
        stage=stage,
        model=model,
        data=data,
        work=tmp_path,
        learning_rate=1e-3,
        schedule="constant",
        clip=0.0,
        micro_batch=3,
    )
    agree(*compare(comparison))


def test_twenty_steps_in_trl_on_all_tokens(tmp_path):
    """`--use_targets=False`: prompts are learnt too; neither side counts the first token, which nothing predicts."""
    require_trl()
    data, model = make_data(tmp_path / "data", num_validation=0), make_model_dir(tmp_path / "model", "llama")

    agree(
        *compare(Comparison(stage="sft", use_targets=False, model=model, data=data, work=tmp_path, learning_rate=1e-3))
    )
