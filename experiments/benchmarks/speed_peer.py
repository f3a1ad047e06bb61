"""One run of the peer for the speed benchmark, in a process of its own (see speed.py).

    python -m experiments.benchmarks.speed_peer request.json answer.json
    PYTHONPATH=.peers/trl-1.12.0 python -m experiments.benchmarks.speed_peer request.json answer.json    (PPO)

Imports as little of this project as can be, so that the process's memory is the peer's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    TrainerCallback,
)

from experiments.benchmarks import speed_work
from rlhf.allocator import keep_freed_memory
from rlhf.data.text import pad_token_id

ALTERNATIVES: dict[str, dict[str, list[Any]]] = {
    "sft": {"loss_type": ["nll", "chunked_nll"], "padding_free": [False, True]},
    "rm": {},
    "dpo": {},
    "dpo_long": {"accumulation": [4, 1]},
    "ppo": {"accumulation": [1, 4]},
    "kto": {},
    "grpo": {},
    "grpo_long": {},
    "rollouts": {"weights": ["bfloat16", "float32"], "cache": ["dynamic", "static"]},
}
"""What may make the peer faster on a stage (or let it fit into memory), tried in this order; `accumulation`: cuts of a
step. Besides, both attentions."""


class Clock(TrainerCallback):
    """Seconds of every step, and the memory before the first.

    From `on_step_begin` where the trainer calls it (its next batch is made before, outside the step), else from the
    end of the step before.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.loaded_bytes = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.loaded_bytes = speed_work.memory("VmRSS")
        self._began = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the trainer's config, but for its folder."""
    chosen, batch = request["settings"], request["batch"]
    accumulation = min(chosen.get("accumulation", 1), batch)
    arguments = {
        "max_steps": request["num_steps"],
        "per_device_train_batch_size": batch // accumulation,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "bf16": request["precision"] == "bf16-mixed",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    stage = request["stage"]
    if stage == "ppo":
        for name in ("max_steps", "train_sampling_strategy", "max_grad_norm"):
            del arguments[name]
        return {
            **arguments,
            "total_episodes": request["num_steps"] * batch,
            "num_ppo_epochs": 1,
            "num_mini_batches": 1,
            "local_rollout_forward_batch_size": batch,
            "response_length": request["new_tokens"],
            "num_sample_generations": 0,
            "temperature": 1.0,
            "adam_epsilon": 1e-5,
        }
    if stage in speed_work.GROUPS:
        return {
            **arguments,
            "num_generations": batch,
            "max_completion_length": request["new_tokens"],
            "generation_kwargs": {"min_new_tokens": request["new_tokens"]},
            "beta": 0.0,
            "shuffle_dataset": False,
            "disable_dropout": True,
        }
    arguments["max_length"] = None
    if stage == "sft":
        return {**arguments, "loss_type": chosen["loss_type"], "padding_free": chosen["padding_free"]}
    if stage in ("dpo", "dpo_long", "kto"):
        arguments.update(precompute_ref_log_probs=True, precompute_ref_batch_size=max(1, batch // 4))
    return {**arguments, "disable_dropout": True}


def rows_for_trl(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the run under the names that TRL's trainers have for token ids."""
    sft = request["stage"] == "sft"
    name = "finetune_train.pt" if sft else "preference_train.pt"
    found = torch.load(Path(request["data_dir"]) / name, weights_only=True)
    if sft:
        return [{"input_ids": row["input_ids"].tolist(), "labels": row["targets"].tolist()} for row in found]
    rows = []
    for row in found:
        n = 0 if request["stage"] == "rm" else row["prompt_len"]
        chosen, rejected = row["chosen_input_ids"].tolist(), row["rejected_input_ids"].tolist()
        rows.append({"prompt_ids": chosen[:n], "chosen_ids": chosen[n:], "rejected_ids": rejected[n:]})
    return rows


def train(request: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFT, reward or DPO trainer on the rows as they stand."""
    import trl

    stage, clock = request["stage"], Clock()
    tokenizer = _tokenizer(request["model"])
    if stage == "rm":
        trainer_class, config = trl.RewardTrainer, trl.RewardConfig
        model = _load(AutoModelForSequenceClassification, request["model"], request, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        trainer_class = trl.SFTTrainer if stage == "sft" else trl.DPOTrainer
        config = trl.SFTConfig if stage == "sft" else trl.DPOConfig
        model = _load(AutoModelForCausalLM, request["model"], request)

    class OnTokens(trainer_class):
        """The trainer, whose rows are token ids already."""

        def _prepare_dataset(self, dataset, *rest):
            return dataset if trainer_class is trl.DPOTrainer else super()._prepare_dataset(dataset, *rest)

    with _autocast(request["precision"]):  # the stored reference, in the precision of training
        trainer = OnTokens(
            model=model,
            args=config(output_dir=str(Path(request["work"]) / "run"), **settings(request)),
            train_dataset=Dataset.from_list(rows_for_trl(request)),
            processing_class=tokenizer,
            callbacks=[clock],
        )
    trainer.train()
    return _found(clock)


def _tokens_of_text(_, text: str, **__: Any) -> dict[str, list[int]]:
    return {"input_ids": [int(word) for word in text.split() if word.isdigit()]}


def train_kto(request: dict[str, Any]) -> dict[str, Any]:
    """TRL's KTO trainer, whose preparation pairs prompts with other responses: its rows are text of token numbers."""
    import trl

    clock, rows = Clock(), []
    for row in torch.load(Path(request["data_dir"]) / "feedback_train.pt", weights_only=True):
        n, words = row["prompt_len"], [str(token) for token in row["input_ids"].tolist()]
        rows.append({"prompt": " ".join(words[:n]) + " ", "completion": " ".join(words[n:]), "label": row["label"]})
    with mock.patch("trl.trainer.kto_trainer._tokenize", _tokens_of_text), _autocast(request["precision"]):
        trainer = trl.KTOTrainer(
            model=_load(AutoModelForCausalLM, request["model"], request),
            args=trl.KTOConfig(output_dir=str(Path(request["work"]) / "run"), **settings(request)),
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(request["model"]),
            callbacks=[clock],
        )
    trainer.train()
    return _found(clock)


def train_grpo(request: dict[str, Any]) -> dict[str, Any]:
    """TRL's GRPO trainer without a reference; the reward is the length of the text."""
    import trl

    clock, tokenizer = Clock(), _tokenizer(request["model"], padding_side="left")
    prompts = [{"prompt": tokenizer.decode(ids)} for step in speed_work.prompts_of_steps(request) for ids in step]

    class Timed(trl.GRPOTrainer):
        """The trainer; `apart` are the seconds that a step spends before its training pass."""

        apart = 0.0

        def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            inputs = super()._prepare_inputs(*args, **kwargs)
            speed_work.check_lengths(inputs["completion_mask"].sum(1).tolist(), request)
            self.apart += time.perf_counter() - began
            return inputs

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    class Training(Clock):
        """Seconds of every step's training pass alone."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end(*args, **kwargs)
            self.seconds[-1] -= trainer.apart
            trainer.apart = 0.0

    clock = Training() if request["stage"] == "grpo_long" else clock
    trainer = Timed(
        model=_load(AutoModelForCausalLM, request["model"], request),
        reward_funcs=reward,
        args=trl.GRPOConfig(output_dir=str(Path(request["work"]) / "run"), **settings(request)),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return _found(clock)


def train_ppo(request: dict[str, Any]) -> dict[str, Any]:
    """TRL 1.12.0's PPO trainer, the prompts in file order, no stop token.

    The trainer leaves sampling, reference and reward in float32 whatever `bf16` says; patched they run under autocast,
    with logits in float32, as its policy and critic do.
    """
    if request["precision"] == "bf16-mixed":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    import trl
    from torch.utils.data import DataLoader
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    if trl.__version__ != "1.12.0":
        raise RuntimeError(f"this is TRL {trl.__version__}, not 1.12.0")
    clock, batch = Clock(), request["batch"]
    tokenizer = _tokenizer(request["model"], padding_side="left")
    prompts = [{"input_ids": ids.tolist()} for step in speed_work.prompts_of_steps(request) for ids in step]
    dataset = Dataset.from_list(prompts)
    scorers = [_load(AutoModelForSequenceClassification, request["reward_model"], request) for _ in range(2)]
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=str(Path(request["work"]) / "run"), **settings(request)),
        processing_class=tokenizer,
        model=_load(AutoModelForCausalLM, request["model"], request),
        ref_model=_load(AutoModelForCausalLM, request["model"], request),
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=dataset,
        callbacks=[clock],
    )
    trainer.policy_model.generation_config.use_cache = True
    trainer.dataloader = DataLoader(dataset, batch_size=batch, collate_fn=trainer.data_collator)
    generate = ppo_trainer.batch_generation

    def batch_generation(model, queries, *rest):
        sequences, logits = generate(model, queries, *rest)
        speed_work.check_lengths([sequences.shape[1] - queries.shape[1]] * len(sequences), request)
        return sequences, logits

    ppo_trainer.batch_generation = batch_generation
    if request["settings"]["patched"]:
        for name in ("batch_generation", "get_reward", "forward"):
            setattr(ppo_trainer, name, _under_autocast(getattr(ppo_trainer, name), request["precision"]))
    trainer.train()
    return _found(clock)


def sample(request: dict[str, Any]) -> dict[str, Any]:
    """`generate` of transformers on the left-padded prompts of each step."""
    chosen = request["settings"]
    model = _load(AutoModelForCausalLM, request["model"], request, dtype=getattr(torch, chosen["weights"])).eval()
    tokenizer = _tokenizer(request["model"], padding_side="left")
    model.generation_config = GenerationConfig()
    config = GenerationConfig(
        max_new_tokens=request["new_tokens"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        cache_implementation="static" if chosen["cache"] == "static" else None,
    )
    loaded, seconds = speed_work.memory("VmRSS"), []
    for step, prompts in enumerate(speed_work.prompts_of_steps(request)):
        torch.manual_seed(step)
        began = time.perf_counter()
        inputs = tokenizer.pad({"input_ids": [ids.tolist() for ids in prompts]}, return_tensors="pt")
        with torch.inference_mode(), _autocast(request["precision"] if chosen["weights"] == "float32" else "32-true"):
            sequences = model.generate(**inputs, generation_config=config)
        seconds.append(time.perf_counter() - began)
        length = sequences.shape[1] - inputs["input_ids"].shape[1]
        speed_work.check_lengths([length] * len(sequences), request)
    return {"step_seconds": seconds, "loaded_bytes": loaded, "peak_bytes": speed_work.memory("VmHWM")}


def _found(clock: Clock) -> dict[str, Any]:
    peak = speed_work.memory("VmHWM")
    return {"step_seconds": clock.seconds, "loaded_bytes": clock.loaded_bytes, "peak_bytes": peak}


def _load(kind: Any, source: str, request: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    attention = request["settings"]["attention"]
    return kind.from_pretrained(source, dtype=dtype, attn_implementation=attention, **options)


def _tokenizer(source: str, **options: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    pad = pad_token_id(tokenizer)
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        yield


def _under_autocast(function: Callable, precision: str) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _autocast(precision):
            out = function(*args, **kwargs)
        if hasattr(out, "logits"):
            out.logits = out.logits.float()
        return out

    return wrapped


def run(request: dict[str, Any]) -> dict[str, Any]:
    """What the request's stage asks for, at its settings."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if request["settings"]["patched"]:
        keep_freed_memory()
    kinds = {"rollouts": sample, "ppo": train_ppo, "kto": train_kto, "grpo": train_grpo, "grpo_long": train_grpo}
    return kinds.get(request["stage"], train)(request)


if __name__ == "__main__":
    speed_work.serve(run)
