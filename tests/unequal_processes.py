"""Started twice by tests/test_unequal.py: runs whose two processes have unequal work, and what each of them did.

The argument names a JSON file with a list of [script, flags]. Process 0 samples nothing but EOS, process 1 nothing that
ends before the limit. Process r writes how often each run updated its weights to <experiment_dir>/rank-r.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from rlhf import experience, rlhf_ppo
from rlhf.experiment.steps import Step
from rlhf.rollouts import Samples, generate
from rlhf.trees.forest import Forest, Tree
from tests.two_processes import SCRIPTS

ALL = {**SCRIPTS, "ppo": (rlhf_ppo.main, rlhf_ppo.PPOFlags)}


def unequal(policy, prompts, sampling, **options) -> Samples:
    """`generate` on process 1 without a stop token; on process 0 its responses are an EOS each."""
    if torch.distributed.get_rank() == 1:
        return generate(policy, prompts, replace(sampling, stop_ids=()), **options)
    stop = torch.tensor([policy.model.config.eos_token_id])
    trees = [Tree.of(prompt, stop) for prompt in prompts for _ in range(options.get("num_samples", 1))]
    logps = policy(Forest(trees), temperature=sampling.temperature)[0].detach() if trees else torch.empty(0)
    return Samples([stop] * len(trees), list(logps.split(1)), torch.ones(len(trees), dtype=torch.bool))


def main(plan: Path) -> None:
    torch.set_num_threads(1)
    experience.generate, experience.cut_after_stop = unequal, lambda ids, stops: (len(ids), len(ids) == 1)
    update = Step.update
    for script, settings in json.loads(plan.read_text(encoding="utf-8")):
        updates: list[float] = []

        def counted(self, optimizer, updates=updates, **options):
            done = update(self, optimizer, **options)
            updates.append(sum(p.sum().item() for group in optimizer.param_groups for p in group["params"]))
            return done

        Step.update = counted
        run, flags = ALL[script]
        summary = run(flags(**settings))
        found = {"updates": updates, "steps": summary["steps"]}
        folder = Path(settings["experiment_dir"])
        (folder / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
