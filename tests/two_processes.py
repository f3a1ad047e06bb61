"""Started twice by tests/test_devices.py: runs of the scripts on two processes, and what each of them saw.

The argument names a JSON file with a list of [script, flags]; process r writes rank-r.pt into each run's folder.
"spoil": r among the flags adds infinity to every loss of process r in the first step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rlhf import rlhf_dpo, rlhf_grpo, rlhf_kto, rlhf_online_dpo, rlhf_rm, rlhf_sft
from rlhf.experiment.run import Step

SCRIPTS = {
    "sft": (rlhf_sft.main, rlhf_sft.SFTFlags),
    "rm": (rlhf_rm.main, rlhf_rm.RMFlags),
    "dpo": (rlhf_dpo.main, rlhf_dpo.DPOFlags),
    "kto": (rlhf_kto.main, rlhf_kto.KTOFlags),
    "grpo": (rlhf_grpo.main, rlhf_grpo.GRPOFlags),
    "online_dpo": (rlhf_online_dpo.main, rlhf_online_dpo.OnlineDPOFlags),
}


def run_all(plan: Path) -> None:
    """The runs of a plan, here: one process, or this one of several."""
    seen: list[dict] = []
    update, backward, spoil = Step.update, Step.backward, None

    def watched(self, optimizer, **options):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        step = {"rows": self.global_rows, "gradients": [p.grad.clone() for p in parameters]}
        done = update(self, optimizer, **options)
        seen.append({**step, "weights": [p.detach().clone() for p in parameters]})
        return done

    def spoiled(self, loss, **options):
        bad = self.run.step_index == 0 and self.run.rank == spoil
        return backward(self, loss + float("inf") if bad else loss, **options)

    Step.update, Step.backward = watched, spoiled
    try:
        for script, settings in json.loads(plan.read_text(encoding="utf-8")):
            seen.clear()
            spoil = settings.pop("spoil", None)
            main, flags = SCRIPTS[script]
            main(flags(**settings))
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            torch.save(seen, Path(settings["experiment_dir"]) / f"rank-{rank}.pt")
    finally:
        Step.update, Step.backward = update, backward


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(Path(sys.argv[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
