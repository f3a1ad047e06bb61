"""The start of every script: its folder, its devices, its processes, its seeds."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.experiment.devices import make_fabric
from rlhf.experiment.folder import check_new
from rlhf.experiment.lifeline import hold
from rlhf.experiment.logs import check_logger
from rlhf.experiment.run import Run
from rlhf.paths import check_writable


def start_experiment(flags: Any, script: str) -> Run:
    """Set up devices and seeds for `script`; nothing is written before `Run.open`, but the lock of a resumed folder.

    Raises:
        UserError: flags that contradict each other, an experiment folder that is taken, or one to resume that isn't
            there, or that another run is writing to.
    """
    folder = Path(flags.experiment_dir or f"experiments/runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}")
    if flags.resume and not flags.experiment_dir:
        raise UserError("--resume needs --experiment_dir, the folder of the run to go on with")
    if flags.resume and not folder.is_dir():
        raise UserError(f"--experiment_dir={folder}: there is no run there to resume; leave --resume out to start it")
    if flags.keep_weights and not flags.keep_checkpoints:
        raise UserError("--keep_weights has no meaning with --keep_checkpoints=0, which keeps all of every checkpoint")
    if flags.experiment_dir and not flags.resume:
        check_new(folder)
    check_writable(folder, "experiment_dir")
    check_logger(flags.logger)
    fabric, why = make_fabric(flags)
    if not os.environ.get("LT_CLI_USED"):  # `fabric run` has launched the processes already
        fabric.launch()
    lifeline = hold(fabric.global_rank, fabric.world_size, fabric.broadcast)
    folder = Path(fabric.broadcast(str(folder)))
    fabric.seed_everything(flags.seed, verbose=False)
    run = Run(fabric, flags, script, folder, lifeline)
    if flags.resume:
        run.take_folder()
    run.say(f"{script}: {why}")
    return run
