"""One run of this project for the speed benchmark, in a process of its own (see speed.py).

python -m experiments.benchmarks.speed_ours request.json answer.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from experiments.benchmarks import speed_work
from rlhf import evaluation, rlhf_dpo, rlhf_grpo, rlhf_kto, rlhf_ppo, rlhf_rm, rlhf_sft
from rlhf.allocator import keep_freed_memory
from rlhf.experiment.run import Run
from rlhf.flags import ModelFlags, parse
from rlhf.models.accumulation import gradients_added, weights_unchanged
from rlhf.models.loading import load_policy, load_scorer, save_model, tokenizer_of
from rlhf.rollouts import Sampling, generate
from rlhf.trees.forest import Forest, Tree

SCRIPTS = {
    "sft": (rlhf_sft.main, rlhf_sft.SFTFlags),
    "rm": (rlhf_rm.main, rlhf_rm.RMFlags),
    "dpo": (rlhf_dpo.main, rlhf_dpo.DPOFlags),
    "dpo_long": (rlhf_dpo.main, rlhf_dpo.DPOFlags),
    "ppo": (rlhf_ppo.main, rlhf_ppo.PPOFlags),
    "kto": (rlhf_kto.main, rlhf_kto.KTOFlags),
    "grpo": (rlhf_grpo.main, rlhf_grpo.GRPOFlags),
    "grpo_long": (rlhf_grpo.main, rlhf_grpo.GRPOFlags),
}


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """The flags of the stage's script, but for its folders."""
    batch = request["batch"]
    if request["stage"] == "rollouts":
        return {"precision": request["precision"], "allocator": "ours", **request["flags"]}
    shared = {
        "precision": request["precision"],
        "mini_batch_size": batch,
        "micro_batch_size": batch,
        "disable_dropout": True,
        "lr_schedule": "constant",
    }
    if request["stage"] in speed_work.GROUPS:
        return {
            **shared,
            "learning_rate": 1e-6,
            "mini_batch_size": 1,
            "micro_batch_size": 1,
            "rollout_size": 1,
            "num_samples": batch,
            "max_new_tokens": request["new_tokens"],
            "reward": "length:200",
            **request["flags"],
        }
    if request["stage"] != "ppo":
        return {**shared, "learning_rate": 1e-6, **request["flags"]}
    return {
        **shared,
        "rollout_size": batch,
        "rollout_mini_batch_size": batch,
        "ppo_epochs": 1,
        "max_new_tokens": request["new_tokens"],
        "missing_eos": "keep",
        **request["flags"],
    }


def train(request: dict[str, Any]) -> dict[str, Any]:
    """Run the stage's script; seconds of every step, and the memory."""
    main, flags_class = SCRIPTS[request["stage"]]
    folder = Path(request["work"]) / "run"
    given = {
        "data_dir": request["data_dir"],
        "experiment_dir": folder,
        "max_steps": request["num_steps"],
        "shuffle": False,
        "eval_interval": 0,
        "save_interval": 0,
        "log_interval": 1,
        "logger": "none",
        "accelerator": "cpu",
        "devices": 1,
        **settings(request),
    }
    if request["stage"] in speed_work.GROUPS:
        given["sft_experiment_dir"] = request["model"]
    elif request["stage"] == "ppo":
        given.update(sft_experiment_dir=request["model"], rm_experiment_dir=request["reward_model"])
    else:
        given["model_name"] = request["model"]
    with _measured() as found:
        main(parse(flags_class, [f"--{name}={value}" for name, value in given.items()]))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    name = "perf/train_seconds" if request["stage"] == "grpo_long" else "perf/step_seconds"
    return {"step_seconds": [line[name] for line in lines if name in line], **found}


@contextmanager
def _measured() -> Iterator[dict[str, int]]:
    """Note the memory before the first step and after the last; nothing is evaluated or written after that.

    No sample ends at a stop token: every response has its full length.
    """
    found: dict[str, int] = {}
    open_folder = Run.open

    def opened(run: Run) -> None:
        open_folder(run)
        found["loaded_bytes"] = speed_work.memory("VmRSS")

    def finished(run: Run, *_: Any) -> dict[str, Any]:
        found["peak_bytes"] = speed_work.memory("VmHWM")
        run.logs.close()
        return {}

    with (
        mock.patch.object(Run, "open", opened),
        mock.patch.object(Run, "finish", finished),
        mock.patch.object(evaluation, "stop_ids", return_value=()),
    ):
        yield found


def sample(request: dict[str, Any]) -> dict[str, Any]:
    """Sample `new_tokens` tokens to every prompt of each step."""
    keep_freed_memory()
    policy = load_policy(request["model"], ModelFlags(), trainable=False)
    sampling = Sampling(max_new_tokens=request["new_tokens"])
    loaded, seconds = speed_work.memory("VmRSS"), []
    for step, prompts in enumerate(speed_work.prompts_of_steps(request)):
        sampling.seed = step
        began = time.perf_counter()
        with _autocast(request["precision"]):
            samples = generate(policy, prompts, sampling)
        seconds.append(time.perf_counter() - began)
        speed_work.check_lengths([len(ids) for ids in samples.response_ids], request)
    return {"step_seconds": seconds, "loaded_bytes": loaded, "peak_bytes": speed_work.memory("VmHWM")}


def make_reward_model(request: dict[str, Any]) -> dict[str, Any]:
    """The model with a new scalar head, as a folder for both sides of PPO."""
    flags = ModelFlags()
    torch.manual_seed(0)
    scorer = load_scorer(request["model"], flags, new_head=True)
    save_model(scorer, tokenizer_of(request["model"], flags), request["reward_model"])
    return {}


def scaling(request: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward in three series, their cases in turn, `repeats` times each after one more.

    `rows`: the policy on pairs in micro-batches of 1, 2, 4, 8 and 16 times `base` of them, up to four from all over the
    pairs. `responses`: on prompts with 1, 2, 4, 8 and 16 responses each, in micro-batches of equally many distinct
    tokens. `scored`: a reward model on the same trees. Gradients lie in the same memory from case to case.
    """
    keep_freed_memory()
    flags = ModelFlags()
    policy, scorer = load_policy(request["model"], flags), load_scorer(request["model"], flags, new_head=True)
    rows = torch.load(Path(request["data_dir"]) / "preference_train.pt", weights_only=True)
    prompts = [row["chosen_input_ids"][: row["prompt_len"]] for row in rows]
    columns = ("chosen_input_ids", "rejected_input_ids")
    responses = [row[column][row["prompt_len"] :] for row in rows for column in columns]
    size, base = 16 * request["base"], request["base"]
    pairs = [Tree.of(prompts[i], *responses[2 * i : 2 * i + 2]) for i in range(size)]
    cases = []
    for k in (1, 2, 4, 8, 16):
        apart = max(k * base, size // 4)
        cases.append(("rows", k, [pairs[i : i + k * base] for i in range(0, size, apart)]))
    budget = sum(tree.num_tokens for tree in pairs) // 4
    for k in (1, 2, 4, 8, 16):
        trees: list[Tree] = []
        while sum(tree.num_tokens for tree in trees) < budget:
            i = len(trees)
            trees.append(
                Tree.of(prompts[i % len(prompts)], *(responses[(i * k + j) % len(responses)] for j in range(k)))
            )
        cases += [("responses", k, [trees]), ("scored", k, [trees])]
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(1 + request["repeats"]):
        for times, (series, _, batches) in zip(seconds, cases, strict=True):
            model = scorer if series == "scored" else policy
            model.zero_grad(set_to_none=False)
            began = time.perf_counter()
            with weights_unchanged():  # as `Step` has it
                for forest in map(Forest, batches):
                    with _autocast(request["precision"]):
                        numbers = scorer(forest, forest.branch_last) if model is scorer else policy(forest)[0]
                    with gradients_added():
                        (-numbers.mean()).backward()
            times.append(time.perf_counter() - began)
    results = []
    for times, (series, factor, batches) in zip(seconds, cases, strict=True):
        work = speed_work.Work()
        for tree in (tree for trees in batches for tree in trees):
            work += speed_work.path_work(*map(len, tree.segments))
        results.append({"series": series, "factor": factor, "micro_batches": len(batches), "seconds": times[1:]})
        results[-1]["work"] = vars(work)
    return {"cases": results, "peak_bytes": speed_work.memory("VmHWM")}


def _autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def run(request: dict[str, Any]) -> dict[str, Any]:
    """What the request's stage asks for."""
    kinds = {"rollouts": sample, "reward_model": make_reward_model, "scaling": scaling}
    return kinds.get(request["stage"], train)(request)


if __name__ == "__main__":
    speed_work.serve(run)
