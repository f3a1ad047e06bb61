"""The scripts beside TRL 1.16.0 on real pairs: loss by loss over some optimiser steps, in float32.

Both train from the same weights on the same rows in file order (tests/peers.py says what is set on either side, and
what the two define differently). Prints a table a stage, and exits with status 1 if a loss differs by more than the
tolerance. Needs the `peer` extra.

    python experiments/benchmarks/parity.py --model_name=HuggingFaceTB/SmolLM2-135M --data_file=pairs.jsonl.gz
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep.helpful_harmless import prepare_data
from rlhf.errors import UserError
from rlhf.flags import check_positive, launch
from tests.peers import MORE_STAGES, STAGES, Comparison, Trajectory, data_stage_of, train_here, train_in_trl


@dataclass(kw_only=True)
class ParityFlags:
    """Comparison."""

    model_name: str
    """Language model that both start from: a hub id or a local folder."""
    data_file: str = "sample"
    """Pairs of dialogues (`chosen`, `rejected`), as data_prep/helpful_harmless/prepare_data.py reads them."""
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """Which of sft, rm, dpo, ipo, kto, apo_zero_unpaired, orpo, cpo and simpo; and robust, hinge, exo_pair, discopop,
    bco_pair, nca_pair, apo_zero, apo_down, sppo_hard, aot, aot_unpaired, mpo, ld_dpo, ln_dpo, js_dpo, wpo, tr_dpo
    (tests/peers.py)."""
    steps: int = 20
    """Optimiser steps."""
    batch: int = 4
    """Rows (pairs) of a step."""
    max_length: int = 256
    """Longest row in tokens; longer ones are left out."""
    learning_rate: float = 1e-5
    """Peak learning rate; it falls to 0 along a line."""
    tolerance: float = 1e-4
    """Largest difference of a loss that passes."""
    work_dir: str | None = None
    """Folder for the data and the runs; a temporary one unless set."""


def prepare(flags: ParityFlags, data: Path) -> None:
    """The training splits of the stages of data that are needed, in the order of the file."""
    for stage in sorted(set(map(data_stage_of, flags.stages))):
        prepare_data.main(
            prepare_data.PrepareFlags(
                destination_dir=str(data),
                tokenizer_name=flags.model_name,
                dataset_path=flags.data_file,
                stage=stage,
                max_length=flags.max_length,
                max_prompt_length=flags.max_length * 3 // 4,
                shuffle=False,
                validation_percentage=0.0,
                test_percentage=0.0,
                num_workers=1,
            )
        )


def run(flags: ParityFlags, stage: str, data: Path, work: Path) -> float:
    """Train one stage on both sides and print its table; returns the largest difference."""
    comparison = Comparison(
        stage=stage,
        model=flags.model_name,
        data=str(data),
        work=work,
        steps=flags.steps,
        batch=flags.batch,
        learning_rate=flags.learning_rate,
    )
    trajectories: list[Trajectory] = []
    seconds = []
    for train in (train_here, train_in_trl):
        began = time.perf_counter()
        trajectories.append(train(comparison))
        seconds.append(time.perf_counter() - began)
    ours, theirs = trajectories
    if ours.rows != theirs.rows:
        raise SystemExit(f"{stage}: the two were trained on different tokens")
    print(f"\n{stage}\n{'step':>4} {'ours':>12} {'TRL':>12} {'difference':>11}")
    gaps = []
    for step, (mine, other) in enumerate(zip(ours.losses, theirs.losses, strict=True), 1):
        gaps.append(abs(mine - other))
        print(f"{step:>4} {mine:>12.7f} {other:>12.7f} {gaps[-1]:>11.1e}")
    tokens = sum(map(len, ours.rows))
    print(f"{tokens:,} tokens; {seconds[0]:.0f} s here, {seconds[1]:.0f} s in TRL, loading included", flush=True)
    return max(gaps)


def main(flags: ParityFlags) -> dict[str, Any]:
    """Compare every stage; returns the largest difference of each.

    Raises:
        UserError: an unknown stage.
        SystemExit: status 1, where a difference is above the tolerance or the tokens differ.
    """
    check_positive(flags, "steps", "batch", "max_length", "learning_rate", "tolerance")
    known = (*STAGES, *MORE_STAGES)
    unknown = sorted(set(flags.stages) - set(known))
    if unknown:
        raise UserError(f"--stages: {unknown[0]!r} is not one of {', '.join(known)}")
    work = Path(flags.work_dir or tempfile.mkdtemp())
    gaps = {}
    try:
        prepare(flags, work / "data")
        for stage in flags.stages:
            place = work / stage
            gaps[stage] = run(flags, stage, work / "data", place)
            shutil.rmtree(place)
    finally:
        if flags.work_dir is None:
            shutil.rmtree(work)
    print(f"\n{'stage':<18} largest difference over {flags.steps} steps")
    for stage, gap in gaps.items():
        print(f"{stage:<18} {gap:.1e}{'' if gap <= flags.tolerance else '  above the tolerance'}")
    if max(gaps.values()) > flags.tolerance:
        raise SystemExit(1)
    return gaps


if __name__ == "__main__":
    launch(main, ParityFlags)
