"""LoRA adapters: new ones, and those of an earlier stage that a run continues."""

from __future__ import annotations

import json
from pathlib import Path

from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError
from rlhf.flags import ModelFlags
from rlhf.models.forward import trunk_of


def adapter_base(folder: str) -> str | None:
    """The base model that an adapter folder names; None for a folder or hub id of a whole model."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]


def adapter_has_head(source: str) -> bool:
    """Whether an adapter folder is of a reward model: it then holds the trained head."""
    settings = json.loads((Path(source) / "adapter_config.json").read_text(encoding="utf-8"))
    return settings.get("task_type") == "SEQ_CLS"


def with_lora(model, continued: str | None, flags: ModelFlags, task: TaskType) -> PeftModel:
    """New adapters, or those of the folder `continued`, trainable, named "default"."""
    if continued is not None:
        settings = LoraConfig.from_pretrained(continued)
        asked = {"r": flags.lora_rank, "lora_alpha": flags.lora_alpha, "lora_dropout": flags.lora_dropout}
        for name, value in asked.items():
            if value is not None and value != getattr(settings, name):
                flag = "lora_rank" if name == "r" else name
                raise UserError(
                    f"--{flag}={value} differs from {getattr(settings, name)} of the adapter {continued} that this "
                    f"run continues; leave the flag out"
                )
        if settings.task_type == task.value:
            return attach_adapter(model, continued, trainable=True)
        settings.task_type = task
        settings.modules_to_save = ["score"] if task is TaskType.SEQ_CLS else None
        peft_model = get_peft_model(model, settings)
        copy_adapter(continued, peft_model)
        return peft_model
    rank = flags.lora_rank or 8
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if flags.lora_alpha is None else flags.lora_alpha,
        lora_dropout=flags.lora_dropout or 0.0,
        target_modules=flags.lora_targets or "all-linear",
        task_type=task,
        modules_to_save=["score"] if task is TaskType.SEQ_CLS else None,
    )
    if settings.target_modules == "all-linear":
        settings.target_modules = linear_layers(model)
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"--lora_targets={flags.lora_targets}: {str(error).splitlines()[0]}") from None


def attach_adapter(model: PreTrainedModel, folder: str, *, trainable: bool) -> PeftModel:
    """`model` with the adapter of `folder`, named "default".

    Raises:
        UserError: the adapter is of another base model, or its folder lacks weights, which peft would make anew.
    """
    try:
        peft_model = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
        missing = expected - set(load_peft_weights(folder, device="cpu"))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the adapter {folder} does not fit its base model ({reason}); give its own base") from None
    except KeyError as error:  # of a weight besides the adapter's matrices
        missing = set(error.args)
    if missing:
        what = "its trained head" if any(".score." in name for name in missing) else min(missing)
        raise UserError(f"the adapter {folder} lacks {what}; the folder is incomplete: copy it again")
    return peft_model


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the trunk's linear layers (also GPT-2's transposed ones), without any head."""
    return sorted({n.split(".")[-1] for n, m in trunk_of(model).named_modules() if isinstance(m, (nn.Linear, Conv1D))})


def copy_adapter(folder: str, model: PeftModel, adapter: str = "default") -> None:
    """Load the LoRA matrices of `folder` into one adapter of `model`, whatever head either of them has.

    Raises:
        UserError: the folder has no such matrices, or they are of another base model.
    """
    weights = {k: v for k, v in load_peft_weights(folder, device="cpu").items() if "lora_" in k}
    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if set(weights) != {name for name in own if "lora_" in name}:
        raise UserError(
            f"the adapter weights of {folder} do not fit this model; give the adapter of the same base model"
        )
    set_peft_model_state_dict(model, {**own, **weights}, adapter_name=adapter)
