"""A tiny world for PPO: a policy that ends some of its answers, a reward model, data, and a watch on what runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf import rlhf_ppo
from rlhf.experience import Experience, collect
from rlhf.experiment.run import Run
from rlhf.experiment.start import start_experiment
from rlhf.models.loading import tokenizer_of
from rlhf.models.roles import Roles, load_roles
from rlhf.rewards.mix import Rewards, load_rewards
from rlhf.rlhf_ppo import PPOFlags
from tests.splits import make_data, tokenizer_for
from tests.tiny import make_model

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}


@dataclass
class World:
    """Paths of the data, of an SFT policy and of a reward model of the same architecture (Phi) and tokenizer."""

    data: str
    sft: str
    rm: str


def make_world(folder: Path, *, num_train: int = 14) -> World:
    """Both models have dropout 0.1 in their configuration; the policy ends about half of its answers."""
    tokenizer = tokenizer_for()
    sizes = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **DROPOUT,
    }
    policy = make_model("phi", **sizes)
    with torch.no_grad():
        policy.lm_head.weight.mul_(2.0)
        policy.lm_head.bias[tokenizer.eos_token_id] = 5.0
    scorer = make_model("phi", scorer=True, seed=1, **sizes)
    scorer.config.reward_mean, scorer.config.reward_scale = 0.3, 1.7
    for model, name in ((policy, "sft"), (scorer, "rm")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return World(data=make_data(folder / "data", num_train=num_train), sft=str(folder / "sft"), rm=str(folder / "rm"))


def flags_of(world: World, folder: Path | str, **changes: Any) -> PPOFlags:
    """Small flags: 4 rollouts of at most 8 tokens a step, one epoch of one mini-batch; no evaluation, no saving."""
    settings = {
        "data_dir": world.data,
        "sft_experiment_dir": world.sft,
        "rm_experiment_dir": world.rm,
        "experiment_dir": str(folder),
        "rollout_size": 4,
        "mini_batch_size": 4,
        "ppo_epochs": 1,
        "max_new_tokens": 8,
        "max_steps": 1,
        "eval_interval": 0,
        "eval_iters": 1,
        "save_interval": 0,
        "logger": "none",
        "memory_check": "none",
        "accelerator": "cpu",
        "precision": "32-true",
    }
    return PPOFlags(**{**settings, **changes})


@dataclass
class Setting:
    """What `rlhf_ppo.main` sets up before its loop."""

    flags: PPOFlags
    run: Run
    roles: Roles
    rewards: Rewards
    prompts: Any

    def collect(self, rows: list[int] | None = None, **changes: Any) -> list[Experience]:
        """Experiences on `rows` (all unless given), with some flags changed."""
        flags = PPOFlags(**{**vars(self.flags), **changes})
        rows = list(range(len(self.prompts))) if rows is None else rows
        given = self.run, flags, self.roles, self.rewards, self.prompts, rows, flags.temperature
        return collect(*given, stop_at_eos=flags.stop_at_eos)


def set_up(flags: PPOFlags) -> Setting:
    """The run, its roles, reward and prompts, without the loop."""
    run = start_experiment(flags, "rlhf_ppo")
    tokenizer = tokenizer_of(flags.sft_experiment_dir, flags)
    roles = load_roles(flags.sft_experiment_dir, flags.rm_experiment_dir, flags.critic_init, flags)
    prompts = run.load_prompts("train", tokenizer)
    rewards = load_rewards(flags, prompts, tokenizer, loaded={flags.rm_experiment_dir: roles.reward})
    return Setting(flags, run, roles, rewards, prompts)


@dataclass
class Watched:
    """What a run of `rlhf_ppo.main` did: its metrics, and what passed through the functions that were watched."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    experiences: list[list[Experience]] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    packed: list[list[int]] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=lambda: [[], []])
    gradients: list[list[Tensor]] = field(default_factory=lambda: [[], []])
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    roles: Roles | None = None

    def train_lines(self) -> list[dict[str, float]]:
        return [line for line in self.metrics if "train/score" in line]

    def val_lines(self) -> list[dict[str, float]]:
        return [line for line in self.metrics if "val/score" in line]

    def weights(self) -> dict[str, Tensor]:
        """Copies of what was trained."""
        parts = {"actor": self.roles.actor, "critic": self.roles.critic}
        return {f"{name}.{key}": p.detach().clone() for name, role in parts.items() for key, p in trained(role).items()}


def trained(role) -> dict[str, Tensor]:
    return role.own_parameters()


def train(flags: PPOFlags, monkeypatch) -> Watched:
    """Run `rlhf_ppo.main`, watching rollouts, packed rows, gradient norms at each optimiser step, and the roles.

    `experiences` and `rows` hold those of the training rollouts alone, in order; `norms` the gradient norms that
    the actor's and the critic's optimiser saw, and `gradients` the first two of these gradients, each in one tensor.
    """
    watched = Watched()
    make_optimizer, load, pack = rlhf_ppo.make_optimizer, rlhf_ppo.load_roles, rlhf_ppo.pack

    def watch_collect(run, flags, roles, rewards, prompts, rows, temperature, **options):
        found = collect(run, flags, roles, rewards, prompts, rows, temperature, **options)
        if temperature == flags.temperature:
            watched.experiences.append(found)
            watched.rows.append(rows)
        return found

    def watch_load(*args, **options):
        watched.roles = load(*args, **options)
        return watched.roles

    def watch_pack(experiences, targets, advantages, rows):
        watched.packed.append(rows)
        return pack(experiences, targets, advantages, rows)

    def watch_optimizer(*args):
        optimizer = make_optimizer(*args)
        norms, gradients = (part[len(watched.optimizers)] for part in (watched.norms, watched.gradients))

        def before_step(opt, *_):
            parameters = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
            gradient = torch.nn.utils.parameters_to_vector([p.grad for p in parameters])
            norms.append(gradient.norm().item())
            if len(gradients) < 2:
                gradients.append(gradient.clone())

        optimizer.register_step_pre_hook(before_step)
        watched.optimizers.append(optimizer)
        return optimizer

    with monkeypatch.context() as patched:
        for name, value in (
            ("collect", watch_collect),
            ("load_roles", watch_load),
            ("pack", watch_pack),
            ("make_optimizer", watch_optimizer),
        ):
            patched.setattr(rlhf_ppo, name, value)
        rlhf_ppo.main(flags)
    lines = (Path(flags.experiment_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    watched.metrics = [json.loads(line) for line in lines]
    return watched


def relative_gap(one: list[list[Tensor]], other: list[list[Tensor]], step: int) -> float:
    """Largest difference between the gradients of a step in two runs, over the largest of its gradients: the larger
    of the actor's and the critic's.
    """
    return max(
        ((mine[step] - theirs[step]).abs().max() / mine[step].abs().max()).item()
        for mine, theirs in zip(one, other, strict=True)
    )


def on_two_processes(script: Path, argument: str, *, status: int = 0, timeout: float = 240) -> list[str]:
    """Run a Python script on two processes that Fabric takes for those of `torchrun`; returns what each printed.

    Raises:
        AssertionError: one of them ended with another status; the message holds what both printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), argument],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [status, status], "\n".join(printed)
    return printed
