"""What a training script logs, computed again the slow way: plain transformers models, one row at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

Row = dict[str, Any]


def causal(folder: str | Path) -> PreTrainedModel:
    """A policy by transformers alone, in evaluation mode, so without dropout."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def classifier(folder: str | Path) -> PreTrainedModel:
    """A reward model by transformers alone."""
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()


def model_before(experiment_dir: Path, step: int, source: str) -> Path:
    """The folder of the weights that optimiser step `step` (from 1) started with, in a run that saved every step."""
    return Path(source) if step == 1 else experiment_dir / "checkpoints" / f"step-{step - 1:08d}" / "model"


def logps(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of a row's tokens from the second on."""
    return model(ids[None]).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]


def token_scores(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The reward head at every token of a row."""
    return model.score(model.base_model(ids[None]).last_hidden_state)[0, :, 0]


def sft_numbers(
    model: PreTrainedModel, rows: list[Row], *, use_targets: bool = True
) -> tuple[Tensor, dict[str, float]]:
    """Loss of an SFT step, with a graph, and what the step logs."""
    total, count = 0.0, 0
    for row in rows:
        counted = row["targets"][1:] != -100 if use_targets else torch.ones(len(row["input_ids"]) - 1, dtype=torch.bool)
        total = total - logps(model, row["input_ids"])[counted].sum()
        count += int(counted.sum())
    return total / count, {"train/loss": (total / count).item()}


def rm_numbers(model: PreTrainedModel, rows: list[Row], loss_type: str) -> tuple[Tensor, dict[str, float]]:
    """Loss of a reward model's step, with a graph, and what the step logs."""
    losses, chosen, rejected = [], [], []
    for row in rows:
        n = row["prompt_len"]
        both = [row[f"{side}_input_ids"] for side in ("chosen", "rejected")]
        c, r = (token_scores(model, ids)[n:] for ids in both)
        chosen.append(c[-1])
        rejected.append(r[-1])
        if loss_type == "last_token":
            losses.append(-F.logsigmoid(c[-1] - r[-1]))
        elif loss_type == "average":
            losses.append(-F.logsigmoid(c.mean() - r.mean()))
        else:
            a, b = (ids[n:].tolist() for ids in both)
            first = next(t for t in range(max(len(a), len(b))) if a[t : t + 1] != b[t : t + 1])
            at = [
                -F.logsigmoid(c[min(t, len(a) - 1)] - r[min(t, len(b) - 1)]) for t in range(first, max(len(a), len(b)))
            ]
            losses.append(torch.stack(at).mean())
    loss, c, r = torch.stack(losses).mean(), torch.stack(chosen), torch.stack(rejected)
    return loss, {
        "train/loss": loss.item(),
        "train/accuracy": (c > r).float().mean().item(),
        "train/margin": (c - r).mean().item(),
        "train/chosen_score": c.mean().item(),
        "train/rejected_score": r.mean().item(),
    }


def dpo_numbers(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    rows: list[Row],
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_coef: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of a DPO step with its SFT term, with a graph, and what the step logs; the reference runs online."""
    losses, rewards, changes, tokens = [], {"chosen": [], "rejected": []}, {"chosen": 0.0, "rejected": 0.0}, {}
    tokens, nll = {"chosen": 0, "rejected": 0}, 0.0
    for row in rows:
        ratio = {}
        for side in ("chosen", "rejected"):
            ids, n = row[f"{side}_input_ids"], row["prompt_len"]
            own = logps(model, ids)[n - 1 :]
            with torch.no_grad():
                theirs = torch.zeros_like(own) if reference is None else logps(reference, ids)[n - 1 :]
            change = (own - theirs).sum()
            rewards[side].append(beta * change.item())
            changes[side] += change.item()
            tokens[side] += len(own)
            ratio[side] = change / len(own) if loss_type == "ipo" else change
            if side == "chosen":
                nll = nll - own.sum()
        margin = ratio["chosen"] - ratio["rejected"]
        if loss_type == "ipo":
            losses.append((margin - 1 / (2 * beta)) ** 2)
        elif loss_type == "hinge":
            losses.append((1 - beta * margin).clamp(min=0))
        else:
            e = label_smoothing
            losses.append(-(1 - e) * F.logsigmoid(beta * margin) - e * F.logsigmoid(-beta * margin))
    pairs = list(zip(rewards["chosen"], rewards["rejected"], strict=True))
    loss = torch.stack(losses).mean() + sft_coef * nll / tokens["chosen"]
    change = "logp_per_token" if reference is None else "logp_change_per_token"
    return loss, {
        "train/loss": loss.item(),
        "train/accuracy": sum(c > r for c, r in pairs) / len(pairs),
        "train/margin": sum(c - r for c, r in pairs) / len(pairs),
        "train/chosen_reward": sum(rewards["chosen"]) / len(pairs),
        "train/rejected_reward": sum(rewards["rejected"]) / len(pairs),
        f"train/chosen_{change}": changes["chosen"] / tokens["chosen"],
        f"train/rejected_{change}": changes["rejected"] / tokens["rejected"],
        "train/chosen_nll": nll.item() / tokens["chosen"],
    }


def grad_norm(model: PreTrainedModel, loss: Tensor) -> float:
    """The global norm of the gradient of `loss`."""
    model.zero_grad()
    loss.backward()
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))
