"""Runs that die: each in a process of its own, forked from one that has imported everything, and ended at a moment.

A moment is a number: the operations that change files in the run's folder are counted (opening to write, renaming,
removing, syncing, the native writers before and after), and the process kills itself before the one of that number.
Or it is a time, after which the parent kills it. The same count serves for a disk that is full from a moment on.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors_torch
from tqdm import tqdm

from rlhf import files, merge, rlhf_dpo, rlhf_grpo, rlhf_kto, rlhf_online_dpo, rlhf_ppo, rlhf_rm, rlhf_sft
from rlhf.errors import UserError
from tests.splits import make_data, make_model_dir, quick_flags

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "os.link"}
"""Audit events of changes in a folder; opening comes besides, where it is for writing."""

NEEDS_ROOM = {"open", "os.mkdir", "os.symlink", "fsync", "serialize_file", "save", "exchange"}
"""What fails on a full disk; renaming, removing and cutting do not."""

DROPOUT = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}

REWARD = '''
import random

import numpy as np


def noisy(prompts, responses, rows):
    """The share of even ids, and what both generators of random numbers draw."""
    even = [sum(i % 2 == 0 for i in row["response_ids"]) / 8 for row in rows]
    return [score + 0.1 * random.random() + 0.1 * float(np.random.rand()) for score in even]
'''

OFFLINE = {"max_steps": 5, "mini_batch_size": 3, "disable_dropout": False}
ONLINE = {"max_steps": 4, "mini_batch_size": 2, "rollout_size": 4, "max_new_tokens": 6}
SETTINGS: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "sft": (rlhf_sft, rlhf_sft.SFTFlags, OFFLINE),
    "rm": (rlhf_rm, rlhf_rm.RMFlags, OFFLINE),
    "dpo": (rlhf_dpo, rlhf_dpo.DPOFlags, {**OFFLINE, "ref_update_interval": 2}),
    "kto": (rlhf_kto, rlhf_kto.KTOFlags, {**OFFLINE, "loss_type": "bco"}),
    "ppo": (
        rlhf_ppo,
        rlhf_ppo.PPOFlags,
        {**ONLINE, "learning_rate": None, "adaptive_kl_coeff": True, "normalize_rewards": True},
    ),
    "grpo": (rlhf_grpo, rlhf_grpo.GRPOFlags, {**ONLINE, "num_samples": 3, "kl_coef": 0.1}),
    "online_dpo": (rlhf_online_dpo, rlhf_online_dpo.OnlineDPOFlags, {**ONLINE, "ref_update_interval": 2}),
}
"""Of each script: its module, its flags, and what its run is: steps, saves and evaluations in five or fewer steps."""


@dataclass
class World:
    """Data, a policy with dropout, a reward model and a reward that draws random numbers."""

    data: str
    policy: str
    reward_model: str
    reward: str

    @staticmethod
    def make(folder: Path) -> World:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "noisy_reward.py").write_text(REWARD, encoding="utf-8")
        return World(
            make_data(folder / "data"),
            make_model_dir(folder / "policy", "gpt2", **DROPOUT),
            make_model_dir(folder / "reward", "gpt2", scorer=True, seed=1),
            f"function:{folder / 'noisy_reward.py'}:noisy",
        )

    def flags(self, script: str, folder: Path, **given: Any) -> Any:
        """The flags of the script's run into `folder`."""
        _, flags_class, own = SETTINGS[script]
        settings = {
            "model_name": self.policy,
            "eval_interval": 2,
            "eval_iters": 1,
            "save_interval": 2,
            "keep_weights": 1,
            "keep_checkpoints": 1,
            "logger": "csv",
            **own,
        }
        if script in ("ppo", "grpo", "online_dpo"):
            settings["reward"] = [self.reward]
        if given.get("finetune_mode") == "lora":  # a reference that is the policy without its adapter cannot move
            settings.pop("ref_update_interval", None)
        if script == "ppo":
            settings["rm_experiment_dir"] = self.reward_model
            del settings["learning_rate"]
            settings |= {"actor_learning_rate": 1e-2, "critic_learning_rate": 1e-2}
        return quick_flags(flags_class, self.data, folder, **{**settings, **given})

    def run(self, script: str, folder: Path, **given: Any) -> Callable[[], Any]:
        """A call of the script, for `in_child`."""
        flags = self.flags(script, folder, **given)
        return lambda: SETTINGS[script][0].main(flags)


@dataclass
class Child:
    """How a process ended.

    Attributes:
        status: what it exited with, 2 for a UserError; negative: the signal that killed it.
        output: what all of them printed; operations: how many it counted, where it lived to say so.
        others: what the other processes of the run exited with.
    """

    status: int
    output: str
    operations: int = 0
    others: tuple[int, ...] = ()


class Counter:
    """Counts operations in a folder, in the process that it is installed in, and does `at` at the moment given."""

    def __init__(self, folder: Path, moment: int | None, full: float = 0, error: int = errno.ENOSPC) -> None:
        self.folder, self.moment, self.full, self.error, self.count = str(folder), moment, full, error, 0

    def install(self) -> None:
        sys.addaudithook(self.hear)
        for owner, name in ((os, "fsync"), (safetensors_torch, "serialize_file"), (torch, "save")):
            setattr(owner, name, self.around(name, getattr(owner, name)))
        files.exchanged = merge.exchanged = self.around("exchange", files.exchanged)

    def hear(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set(mode) & set("wax+")
            if writes and str(path).startswith(self.folder):
                self.tick(event)
        elif event in CHANGES and any(str(a).startswith(self.folder) for a in arguments[:2]):
            self.tick(event)

    def around(self, name: str, operation: Callable) -> Callable:
        def counted(*arguments, **options):
            self.tick(name)
            result = operation(*arguments, **options)
            self.tick("exchanged" if name == "exchange" else name)
            return result

        return counted

    def tick(self, name: str) -> None:
        self.count += 1
        if self.moment is None or self.count < self.moment:
            return
        if not self.full:
            self.die()
        fails = name in NEEDS_ROOM or (self.error != errno.ENOSPC and name != "exchanged")  # which is done by then
        if fails and self.count < self.moment + self.full:
            raise OSError(self.error, os.strerror(self.error))

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def in_child(
    work: Callable[[], Any],
    folder: Path,
    *,
    moment: int | None = None,
    full: float = 0,
    error: int = errno.ENOSPC,
    seconds: float | None = None,
    processes: int = 1,
    timeout: float = 120.0,
) -> Child:
    """Do `work` in one forked process, or on two that Fabric takes for those of `torchrun`.

    Args:
        folder: where operations are counted, by the first process.
        moment: the operation before which it kills itself, or from which on the disk is full for `full` operations.
        error: ENOSPC meets what needs room alone; any other is that of a disk which fails whatever it is asked.
        seconds: after which it is killed. The other process of a killed one is killed with it.
    """
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    environment = _torchrun(processes)
    reading, writing = os.pipe()
    children = []
    gc.freeze()  # the forks need not walk all of torch when they collect garbage
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ.update({**environment, **({"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} if environment else {})})
            counter = Counter(folder, moment if rank == 0 else None, full, error)
            _work(work, counter, log, writing if rank == 0 else None)
        children.append(child)
    gc.unfreeze()
    os.close(writing)
    status = _wait(children[0], seconds, timeout)
    if status < 0:
        for child in children[1:]:
            os.kill(child, signal.SIGKILL)
    others = tuple(_wait(child, None, timeout) for child in children[1:])
    with os.fdopen(reading) as pipe:
        count = pipe.read()
    return Child(status, log.read_text(encoding="utf-8", errors="replace"), int(count or 0), others)


def _work(work: Callable[[], Any], counter: Counter, log: Path, pipe: int | None) -> None:
    # In the fork: out without any of the parent's clean-up.
    status = 1
    try:
        with log.open("a", encoding="utf-8") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        tqdm.set_lock(threading.RLock())  # its own is shared with all forks: who dies with it held would hang them
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        counter.install()
        try:
            work()
            status = 0
        except UserError as error:
            print(f"error: {error}")
            status = 2
        if torch.distributed.is_initialized() and status == 0:
            torch.distributed.destroy_process_group()
        if pipe is not None:
            os.write(pipe, str(counter.count).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _wait(child: int, seconds: float | None, timeout: float) -> int:
    began, killed = time.monotonic(), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        lived = time.monotonic() - began
        if not killed and lived > (timeout if seconds is None else seconds):
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.005)


def _torchrun(processes: int) -> dict[str, str]:
    if processes == 1:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "kill",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
    }


def differences(one: Path, other: Path) -> list[str]:
    """What two runs' folders do not have in common: names, weights, optimiser state, counters and lines.

    Left out is what must differ: clocks (perf/*), the folder's own name, the flag --resume, and bytes of log files.
    """
    names = [
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or p.is_file()}
        for folder in (one, other)
    ]
    faults = [f"{name} is in one alone" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if name not in ("environment.json", "lock.json") and _content(one / name) != _content(other / name):
            faults.append(f"{name} differs")
    return faults


def times(folder: Path) -> dict[str, int]:
    """When each file of a folder was changed; but for its lock, which says who looked at it last."""
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock.json"}


def _content(path: Path) -> Any:
    if path.is_symlink():
        return os.readlink(path)
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]
    if path.name == "metrics.csv":
        header, *rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
        columns = [i for i, name in enumerate(header) if not name.startswith("perf/")]
        return [[row[i] for i in columns] for row in (header, *rows)]
    if path.name in ("state.json", "args.json", "summary.json"):
        return _plain(json.loads(path.read_text(encoding="utf-8")))
    return path.read_bytes()


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    left_out = ("resume", "experiment_dir", "log_sizes")
    return {k: _plain(v) if isinstance(v, dict) else v for k, v in value.items() if k not in left_out}


def survive(
    world: World, script: str, folder: Path, whole: Path, *, processes: int = 1, given: dict[str, Any], **death: Any
) -> list[str]:
    """Start a run (or go on with one), kill it, go on; returns the `differences` from the run that never died."""
    resume = folder.exists()
    died = in_child(world.run(script, folder, resume=resume, **given), folder, processes=processes, **death)
    if died.status not in (0, -signal.SIGKILL):
        return [f"died of something else: {died.status}\n{died.output}"]
    again = in_child(world.run(script, folder, resume=folder.exists(), **given), folder, processes=processes)
    if again.status != 0:
        return [f"did not go on: {again.status}\n{again.output}"]
    return differences(whole, folder)


def moments(operations: int, count: int, seed: int) -> list[int]:
    """`count` distinct moments of a run, in order."""
    return sorted(random.Random(seed).sample(range(1, operations + 1), min(count, operations)))


def raise_signals(monkeypatch, module: Any, name: str, at: int, *numbers: int) -> None:
    """Send this process the signals as `module.name` is called for the `at`-th time."""
    original, calls = getattr(module, name), []

    def sending(*arguments, **options):
        calls.append(0)
        if len(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, sending)
