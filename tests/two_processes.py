"""Started twice by tests/test_devices.py: runs of the scripts on two processes, and what each of them saw.

The argument names a JSON file with a list of [script, flags]; process r writes rank-r.pt into each run's folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rlhf import rlhf_dpo, rlhf_rm, rlhf_sft
from rlhf.experiment.run import Step

SCRIPTS = {
    "sft": (rlhf_sft.main, rlhf_sft.SFTFlags),
    "rm": (rlhf_rm.main, rlhf_rm.RMFlags),
    "dpo": (rlhf_dpo.main, rlhf_dpo.DPOFlags),
}


def run_all(plan: Path) -> None:
    """The runs of a plan, here: one process, or this one of several."""
    seen: list[dict] = []
    update = Step.update

    def watched(self, optimizer, **options):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        step = {"rows": self.global_rows, "gradients": [p.grad.clone() for p in parameters]}
        done = update(self, optimizer, **options)
        seen.append({**step, "weights": [p.detach().clone() for p in parameters]})
        return done

    Step.update = watched
    try:
        for script, settings in json.loads(plan.read_text(encoding="utf-8")):
            seen.clear()
            main, flags = SCRIPTS[script]
            main(flags(**settings))
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            torch.save(seen, Path(settings["experiment_dir"]) / f"rank-{rank}.pt")
    finally:
        Step.update = update


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(Path(sys.argv[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
