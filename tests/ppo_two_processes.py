"""Started twice by tests/test_ppo_run.py: PPO runs on two processes, each of which writes down what it saw.

The argument names a JSON file with a list of flags; process r writes what `tests.ppo.train` watched to
<experiment_dir>/rank-r.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from rlhf.rlhf_ppo import PPOFlags
from tests.ppo import train


def main() -> None:
    torch.set_num_threads(1)
    for settings in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        watched = train(PPOFlags(**settings), pytest.MonkeyPatch())
        seen = {
            "weights": watched.weights(),
            "gradients": watched.gradients,
            "metrics": watched.metrics,
            "responses": [[e.response for e in rollout] for rollout in watched.experiences],
            "prompts": [[e.prompt for e in rollout] for rollout in watched.experiences],
            "rows": watched.rows,
            "steps": [len(norms) for norms in watched.norms],
        }
        torch.save(seen, Path(settings["experiment_dir"]) / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
