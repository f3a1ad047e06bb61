"""Started by tests/test_preflight.py: runs of scripts, each in a process of its own, what was estimated and taken.

The argument names a JSON file with a list of [script, flags]. A process that has run something keeps the freed memory,
so that another run in it takes less from the system; hence a fresh process, of which each run is a copy. Prints a JSON
list of {"found": the estimate, "peak": bytes}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from rlhf import rlhf_ppo
from rlhf.experiment import preflight
from tests.two_processes import SCRIPTS

ALL = {**SCRIPTS, "ppo": (rlhf_ppo.main, rlhf_ppo.PPOFlags)}


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measured(script: str, settings: dict) -> dict:
    """The estimate of a run, and the peak of this process with it."""
    seen, estimate = {}, preflight.estimate

    def watched(*args):
        found = estimate(*args)
        seen.update(vars(found))
        return found

    preflight.estimate = watched
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    main, flags = ALL[script]
    main(flags(**settings))
    return {"found": seen, "peak": status("VmHWM")}


def in_a_child(script: str, settings: dict) -> dict:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        found = {}
        try:
            os.dup2(2, 1)
            found = measured(script, settings)
        finally:
            os.write(write, json.dumps(found).encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said)


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps([in_a_child(script, settings) for script, settings in jobs]))
