"""TRL 1.12.0's `PPOTrainer.train`, run as it stands on given rollouts, and what its variables held.

A process of its own, with that version of TRL first on the path:

    PYTHONPATH=.peers/trl-1.12.0 python -m tests.trl_ppo request.pt answer.pt

The request holds folders of models, prompts, one list of responses an update, and settings of `PPOConfig`. Sampling is
replaced: `batch_generation` returns the given responses, with the logits that TRL's own forward pass has for them.
Nothing else is, but for the order (rows as they come, no shuffling) and the divisor of `masked_var`, by its own
argument; what whitening gives without that is in the answer, too. What `train` computes is read from its frame when it
whitens the advantages, calls `accelerator.backward` (once an optimiser step) and `log` (once an update).
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROLLOUT = (
    "scores",
    "logprobs",
    "ref_logprobs",
    "values",
    "kl",
    "rewards",
    "advantages",
    "returns",
    "padding_mask",
    "padding_mask_p1",
)
"""Variables of `train` that hold an update's rollout, (rows, columns) each but the scores."""

STEP = ("pg_loss", "vf_loss", "micro_batch_inds")
"""Those of one optimiser step."""

STATISTICS = ("approxkl", "pg_clipfrac", "vf_clipfrac", "entropy", "ratio")
"""Those that TRL keeps for its log, one number an optimiser step."""


def main(request: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Train; returns `updates` and `steps`, one dict of variables each, in order."""
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    if trl.__version__ != "1.12.0":
        raise RuntimeError(f"this is TRL {trl.__version__}, not 1.12.0")
    tokenizer = AutoTokenizer.from_pretrained(request["policy"], padding_side="left")
    value_model = AutoModelForSequenceClassification.from_pretrained(request["reward"], dtype=torch.float32)
    value_model.score = _with_bias(value_model.score)
    prompts = Dataset.from_list([{"input_ids": ids} for ids in request["prompts"]])
    num_updates, num_rows = len(request["responses"]), len(prompts)
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        total_episodes=num_updates * num_rows,
        per_device_train_batch_size=num_rows,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=3,
        num_sample_generations=0,
        stop_token="eos",
        warmup_steps=0,
        weight_decay=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **request["settings"],
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(request["policy"], dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(request["policy"], dtype=torch.float32),
        reward_model=AutoModelForSequenceClassification.from_pretrained(request["reward"], dtype=torch.float32),
        value_model=value_model,
        train_dataset=prompts,
    )
    trainer.dataloader = DataLoader(prompts, batch_size=num_rows, shuffle=False, collate_fn=trainer.data_collator)
    np.random.permutation = np.arange
    rollouts = iter(request["responses"])
    forward = ppo_trainer.forward

    def batch_generation(model, queries, batch_size, pad_token_id, generation_config):
        responses = torch.full((num_rows, args.response_length), pad_token_id)
        for row, response in zip(responses, next(rollouts), strict=True):
            row[: len(response)] = torch.tensor(response)
        query_responses = torch.cat([queries, responses], 1)
        logits = forward(model, query_responses, pad_token_id).logits[:, queries.shape[1] - 1 : -1]
        return query_responses, logits / generation_config.temperature

    answer: dict[str, list[dict[str, Any]]] = {"updates": [], "steps": []}
    whiten, backward = ppo_trainer.masked_whiten, trainer.accelerator.backward
    masked_var = ppo_trainer.masked_var
    ppo_trainer.masked_var = partial(masked_var, unbiased=False)

    def masked_whiten(values, mask, shift_mean=True):
        if shift_mean:  # the advantages, not the rewards
            with mock.patch.object(ppo_trainer, "masked_var", masked_var):
                answer["updates"].append({"raw_advantages": values.clone(), "as_trl_whitens": whiten(values, mask)})
        return whiten(values, mask, shift_mean)

    def watched_backward(loss, **kwargs):
        frame = sys._getframe(1).f_locals
        update = answer["updates"][-1]
        if "scores" not in update:
            update.update({name: frame[name].clone() for name in ROLLOUT})
        answer["steps"].append({name: _plain(frame[name]) for name in STEP})
        backward(loss, **kwargs)

    def log(metrics):
        frame = sys._getframe(1).f_locals
        answer["updates"][-1]["metrics"] = {name: float(value) for name, value in metrics.items()}
        kept = torch.stack([frame[f"{name}_stats"].flatten() for name in STATISTICS], 1)
        steps = answer["steps"][-len(kept) :]
        for step, values in zip(steps, kept.tolist(), strict=True):
            step.update(zip(STATISTICS, values, strict=True))

    ppo_trainer.batch_generation = batch_generation
    ppo_trainer.masked_whiten = masked_whiten
    trainer.accelerator.backward = watched_backward
    trainer.log = log
    trainer.train()
    return answer


def _with_bias(score: nn.Linear) -> nn.Linear:
    """The critic's head here has a bias; TRL's is whatever module the model brings."""
    head = nn.Linear(score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(score.weight)
        head.bias.zero_()
    return head


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return value.tolist() if isinstance(value, np.ndarray) else value


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(main(torch.load(sys.argv[1], weights_only=True)), sys.argv[2])
