"""Kill runs of the training scripts at many moments, go on with each, and compare what is left with the unbroken run.

Tiny models on a CPU; each run is a process (or two) of its own, forked from this one. Half of the moments are
operations on the run's files, before which the process kills itself; the others are times by the clock. Prints a line
a script, and one for every moment whose run did not end as the unbroken one; exits with status 1 if there is any.

    python experiments/kill_runs.py --scripts sft ppo --moments=50
    python experiments/kill_runs.py --scripts sft --moments=20 --processes=2 --finetune_mode=lora
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from rlhf.errors import UserError
from rlhf.flags import check_positive, launch
from tests.kill import SETTINGS, World, in_child, moments, survive


@dataclass(kw_only=True)
class KillFlags:
    """Runs to kill."""

    scripts: list[str] = field(default_factory=lambda: list(SETTINGS))
    """Which of sft, rm, dpo, kto, ppo, grpo and online_dpo."""
    moments: int = 50
    """Moments at which a run of each script is killed."""
    processes: int = 1
    """Processes of a run; with 2 (gloo, DDP) the first kills itself, and the other is killed with it."""
    finetune_mode: Literal["all", "last_layer", "lora"] = "all"
    """What is trained."""
    seed: int = 0
    """Seed of the moments."""


def main(flags: KillFlags) -> dict[str, int]:
    """Returns, by script, how many of its runs did not end as the unbroken one."""
    check_positive(flags, "moments", "processes")
    for script in flags.scripts:
        if script not in SETTINGS:
            raise UserError(f"--scripts {script}: there is no such script; take some of {', '.join(SETTINGS)}")
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="kill-runs-"))
    try:
        world = World.make(root / "world")
        return {script: kill(world, script, root / script, flags) for script in flags.scripts}
    finally:
        shutil.rmtree(root, ignore_errors=True)


def kill(world: World, script: str, folder: Path, flags: KillFlags) -> int:
    """Kill runs of one script; returns how many did not end as the unbroken one.

    Raises:
        UserError: the run fails without being killed.
    """
    folder.mkdir()
    given = {"finetune_mode": flags.finetune_mode}
    if flags.processes > 1:
        given |= {"devices": str(flags.processes), "strategy": "ddp"}
    options = {"processes": flags.processes, "given": given}
    began = time.perf_counter()
    whole = folder / "whole"
    ended = in_child(world.run(script, whole, **given), whole, processes=flags.processes)
    seconds = time.perf_counter() - began
    if ended.status != 0:
        raise UserError(f"{script} ends with status {ended.status} by itself:\n{ended.output}")
    draw = random.Random(flags.seed)
    deaths: list[dict] = [{"moment": at} for at in moments(ended.operations, (flags.moments + 1) // 2, flags.seed)]
    deaths += [{"seconds": draw.uniform(0.0, seconds)} for _ in range(flags.moments - len(deaths))]
    failed = 0
    for i, death in enumerate(deaths):
        run = folder / f"run-{i}"
        found = survive(world, script, run, whole, **options, **death)
        if found:
            failed += 1
            print(f"{script}: killed at {death}: {'; '.join(found)}", flush=True)
        shutil.rmtree(run, ignore_errors=True)
    print(
        f"{script}: {len(deaths) - failed} of {len(deaths)} ended as the unbroken run ({ended.operations} operations "
        f"on files; {flags.finetune_mode}, {flags.processes} process{'es' * (flags.processes > 1)}, "
        f"{time.perf_counter() - began:.0f} s)",
        flush=True,
    )
    return failed


if __name__ == "__main__":
    launch(lambda flags: sys.exit(1) if any(main(flags).values()) else None, KillFlags)
