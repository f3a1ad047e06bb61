"""The work that the speed benchmark times: rows, their tokens, the FLOPs they ask of a model, the machine's own rate.

Model FLOPs are those that the task asks for, whatever a program spends; padding, a prompt computed twice and logits
that nobody reads do not count. Of a pass over distinct tokens (the prompt of a pair once):

    forward = 2 N tokens + 2 H targets + 4 L a visible        forward and backward = 3 forward

N: weights in matrix products of one token, the embedding look-up and the vocabulary head left out; H: weights of
that head, whose logits are needed at target positions only; L: layers; a: width of the queries (heads x head size);
visible: keys that each token sees (itself, and all before it on its path), summed over the tokens. So a trained token
that sees k keys costs 6 N + 12 L a k. Sliding windows are not taken into account.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PAIR_STAGES = ("rm", "dpo", "dpo_long")
STAGES = ("sft", "rm", "dpo", "ppo", "rollouts", "dpo_long", "kto", "grpo", "grpo_long")
SAMPLED = ("ppo", "rollouts", "grpo", "grpo_long")
GROUPS = ("grpo", "grpo_long")
"""Stages whose batch is the responses to one prompt; of `grpo_long` the training pass alone counts."""
LONG = ("dpo_long", "grpo_long")
LONG_PROMPT, LONG_RESPONSE = (900, 1000), 50
"""Tokens of the prompts (from, to) and of every response of `dpo_long`; `grpo_long` has the same prompts."""
MATRICES = ((1024, 576, 1536), (2048, 2048, 2048), (1024, 2048, 4096))
"""Products (m, k, n) of which the fastest is the machine's rate."""


@dataclass(frozen=True)
class Dimensions:
    """What the FLOPs of a model depend on: N, H, L and a of the module's docstring."""

    trunk: int
    head: int
    layers: int
    width: int


@dataclass
class Work:
    """One pass, or several alike: distinct tokens, positions whose logits are needed, keys seen over all tokens."""

    tokens: int = 0
    targets: int = 0
    visible: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.targets + other.targets, self.visible + other.visible)

    def flops(self, model: Dimensions, *, backward: bool = True, head: bool = True) -> int:
        """Model FLOPs; without `head` the logits are left out (a reward model, a critic)."""
        forward = 2 * model.trunk * self.tokens + 4 * model.layers * model.width * self.visible
        forward += 2 * model.head * self.targets if head else 0
        return forward * (3 if backward else 1)


def dimensions(model_name: str) -> Dimensions:
    """The dimensions of a causal language model, from its configuration alone."""
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(model_name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    products = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Dimensions(
        sum(m.weight.numel() for m in products), head.weight.numel(), config.num_hidden_layers, heads * size
    )


def path_work(prompt: int, *branches: int) -> Work:
    """A prompt and the responses that hang on it, every response token a target.

    >>> path_work(2, 1, 2)  # keys: 1 + 2 of the prompt, 3 of the first response, 3 + 4 of the second
    Work(tokens=5, targets=3, visible=13)
    """
    visible = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in branches)
    return Work(prompt + sum(branches), sum(branches), visible)


def step_work(stage: str, rows: Sequence[dict[str, Any]], new_tokens: int, batch: int = 1) -> Work:
    """The distinct tokens of one step over these rows.

    PPO and rollouts add `new_tokens` to each prompt, GRPO `batch` times as many; KTO the response of the row before.
    """
    total = Work()
    for i, row in enumerate(rows):
        prompt = row["prompt_len"]
        if stage == "kto":
            total += path_work(prompt, len(row["input_ids"]) - prompt, _response_len(rows[i - 1]))
        elif stage in GROUPS:
            total += path_work(prompt, *[new_tokens] * batch)
        elif stage in ("ppo", "rollouts"):
            total += path_work(prompt, new_tokens)
        elif stage == "sft":
            total += path_work(prompt, len(row["chosen_input_ids"]) - prompt)
        else:
            total += path_work(prompt, *(len(row[f"{side}_input_ids"]) - prompt for side in ("chosen", "rejected")))
    return total


def _response_len(row: dict[str, Any]) -> int:
    return len(row["input_ids"]) - row["prompt_len"]


def step_flops(stage: str, rows: Sequence[dict[str, Any]], new_tokens: int, model: Dimensions, batch: int = 1) -> int:
    """Model FLOPs of one step.

    PPO: sampling and the reference (a forward pass with logits each), the old values and the rewards (without),
    the policy trained with logits and the critic without. GRPO: sampling and training. KTO: training on the row's own
    response, and a forward pass of the other.
    """
    work = step_work(stage, rows, new_tokens, batch)
    if stage == "rollouts":
        return work.flops(model, backward=False)
    if stage == "rm":
        return work.flops(model, head=False)
    if stage == "grpo":
        return work.flops(model, backward=False) + work.flops(model)
    if stage == "kto":
        own = Work()
        for row in rows:
            own += path_work(row["prompt_len"], _response_len(row))
        other = Work(work.tokens - own.tokens, work.targets - own.targets, work.visible - own.visible)
        return own.flops(model) + other.flops(model, backward=False)
    if stage == "ppo":
        judged = 2 * work.flops(model, backward=False) + 2 * work.flops(model, backward=False, head=False)
        return judged + work.flops(model) + work.flops(model, head=False)
    return work.flops(model)


def usable_rows(rows: Sequence[dict[str, Any]], num: int, max_prompt: int, max_response: int) -> list[dict[str, Any]]:
    """The first pairs within the limits, at most `num`."""
    fit = []
    for row in rows:
        n = row["prompt_len"]
        if n <= max_prompt and max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"])) - n <= max_response:
            fit.append(row)
        if len(fit) == num:
            break
    return fit


def grouped_by_length(rows: list[dict[str, Any]], stage: str, batch: int, seed: int) -> list[dict[str, Any]]:
    """The order that `train_sampling_strategy="group_by_length"` of transformers gives these rows."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    columns = {"sft": ("chosen_input_ids",), "kto": ("input_ids",)}.get(
        stage, ("chosen_input_ids", "rejected_input_ids")
    )
    lengths = [max(len(row[c]) for c in columns) for row in rows]
    order = get_length_grouped_indices(lengths, batch, generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order]


def long_rows(rows: Sequence[dict[str, Any]], num: int, seed: int) -> list[dict[str, Any]]:
    """`num` pairs with prompts of `LONG_PROMPT` and responses of `LONG_RESPONSE` tokens, of the text of real pairs.

    A prompt is the end of a row of dialogues, the pair's own prompt last; a response too short goes on with the
    next dialogues, one too long is cut.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = LONG_PROMPT
    out = []
    for i in range(num):
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        prompt = rows[i % len(rows)]["chosen_input_ids"][: rows[i % len(rows)]["prompt_len"]]
        k = i
        while len(prompt) < length:
            k += 1
            prompt = torch.cat([rows[k % len(rows)]["chosen_input_ids"], prompt])
        prompt = prompt[-length:]
        responses = []
        for column in ("chosen_input_ids", "rejected_input_ids"):
            response = rows[i % len(rows)][column][rows[i % len(rows)]["prompt_len"] :]
            k = i
            while len(response) < LONG_RESPONSE:
                k += 1
                response = torch.cat([response, rows[k % len(rows)][column]])
            responses.append(torch.cat([prompt, response[:LONG_RESPONSE]]))
        out.append({"prompt_len": length, "chosen_input_ids": responses[0], "rejected_input_ids": responses[1]})
    return out


def prompts_of_steps(request: dict[str, Any]) -> list[list[torch.Tensor]]:
    """The prompts of each step of a run, in the order of its data."""
    rows = torch.load(Path(request["data_dir"]) / "preference_train.pt", weights_only=True)
    prompts = [row["chosen_input_ids"][: row["prompt_len"]] for row in rows]
    num = 1 if request["stage"] in GROUPS else request["batch"]
    return [prompts[i : i + num] for i in range(0, len(prompts), num)]


def check_lengths(lengths: Sequence[int], request: dict[str, Any]) -> None:
    """Raise `RuntimeError` unless every response has its full length: the two sides would not do the same work."""
    if list(lengths) != [request["new_tokens"]] * request["batch"]:
        raise RuntimeError(f"responses of {sorted(set(lengths))} tokens where {request['new_tokens']} were asked for")


def matmul_rate(precision: str, seconds: float) -> float:
    """FLOPs/s of the fastest matrix product of `MATRICES`, timed for `seconds` in all."""
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    best = 0.0
    for m, k, n in MATRICES:
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
        a @ b
        end = time.perf_counter() + seconds / len(MATRICES)
        while True:
            began = time.perf_counter()
            a @ b
            now = time.perf_counter()
            best = max(best, 2 * m * k * n / (now - began))
            if now > end:
                break
    return best


def memory(name: str) -> int:
    """Bytes of this process's memory: `VmRSS` now, or `VmHWM`, the most since it began.

    Not `ru_maxrss`: a process begins with its parent's.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def limit_memory() -> None:
    """Let an allocation fail once the machine's free memory is used up, before it swaps or kills a process."""
    import resource

    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            resource.setrlimit(resource.RLIMIT_DATA, (free, free))


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    import importlib.metadata

    names = [x.split(":", 1)[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    versions = {}
    for package in ("torch", "transformers", "trl", "accelerate", "lightning"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "threads": torch.get_num_threads(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "python": platform.python_version(),
        "versions": versions,
    }


def serve(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The command line of a run's own process: request.json in, answer.json out.

    What `run` measured is joined by the machine's rate, taken right after, and by what the process ran on.
    """
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    limit_memory()
    answer = run(request)
    answer["matmul_flops_per_second"] = matmul_rate(request["precision"], request["rate_seconds"])
    answer["machine"] = machine()
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
