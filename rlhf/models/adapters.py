"""LoRA adapters: new ones, and those of an earlier stage that a run continues."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError
from rlhf.flags import ModelFlags
from rlhf.models.forward import trunk_of
from rlhf.untrusted import UnreadableFileError, check_finite, check_folder, first_line, read_json, why_no_pickle


def adapter_base(folder: str) -> str | None:
    """The base model that an adapter folder names; None for a folder or hub id of a whole model.

    Everything that peft is going to read in the folder is looked at first.

    Raises:
        UserError: a file is damaged or hostile, it is no LoRA adapter or asks for another rank than its weights have,
            or the base is not there or is an adapter itself.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    settings = _settings(path)
    _check_rank(folder, settings)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(f"{path} names no base_model_name_or_path; write the model's folder or hub id there")
    if not Path(base).is_dir():
        if Path(base).exists() or base.startswith((".", "/", "~")) or base.count("/") > 1:
            raise UserError(
                f"the adapter {folder} is of the model {base}, and there is no such folder; put it there, "
                f"or write where it is into {path}"
            )
    elif (Path(base) / "adapter_config.json").is_file():
        raise UserError(f"the adapter {folder} is of {base}, an adapter itself; merge that one into a model first")
    return base


def adapter_has_head(source: str) -> bool:
    """Whether an adapter folder is of a reward model: it then holds the trained head."""
    return _settings(Path(source) / "adapter_config.json").get("task_type") == "SEQ_CLS"


def adapter_weights(folder: str) -> dict[str, Tensor]:
    """The weights of an adapter folder by name, on the CPU.

    Raises:
        UserError: they can't be read, or hold NaN or infinite values.
    """
    check_folder(folder)
    try:
        weights = load_peft_weights(folder, device="cpu")
    except UnpicklingError as error:
        raise UserError(why_no_pickle(folder, error)) from None
    except Exception as error:  # of files that were tampered with, the libraries raise anything
        raise UserError(f"the weights in {folder} cannot be read ({first_line(error)}); copy them again") from None
    check_finite(weights.items(), folder)
    return weights


def adapter_settings(folder: str) -> LoraConfig:
    """The settings of an adapter folder as peft reads them.

    Raises:
        UserError: it can't read them.
    """
    _settings(Path(folder) / "adapter_config.json")
    try:
        return LoraConfig.from_pretrained(folder)
    except Exception as error:  # peft checks few of the values, and raises anything
        raise UserError(
            f"the settings in {folder}/adapter_config.json can't be used ({first_line(error)}); copy them again"
        ) from None


def _check_rank(folder: str, settings: dict[str, Any]) -> None:
    """Adapters are made of the rank that the settings say before their weights are read."""
    entries = check_folder(folder)
    ranks = [settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()]
    largest = max((size for entry in entries.values() for size in entry.shape), default=1 << 14)
    if not all(isinstance(rank, int) and 0 < rank <= largest for rank in ranks):
        raise UserError(f"{folder}/adapter_config.json asks for another rank than the weights have; copy both again")


def _settings(path: Path) -> dict[str, Any]:
    """An adapter's settings, as far as they are of LoRA: others may name code that peft would import."""
    settings = read_json(path, "copy the adapter again", constants=True)
    if settings.get("peft_type", "LORA") != "LORA" or settings.get("megatron_config"):
        raise UnreadableFileError(f"{path} is of no plain LoRA adapter ({settings.get('peft_type')}); give one that is")
    if not isinstance(settings.get("rank_pattern") or {}, dict):
        raise UnreadableFileError(f"{path} has no rank_pattern by names; copy the adapter again")
    return settings


def with_lora(model, continued: str | None, flags: ModelFlags, task: TaskType) -> PeftModel:
    """New adapters, or those of the folder `continued`, trainable, named "default"."""
    if continued is not None:
        settings = adapter_settings(continued)
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
    weights = adapter_weights(folder)
    try:
        peft_model = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
        missing = expected - set(weights)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = first_line(error)
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
    weights = {name: value for name, value in adapter_weights(folder).items() if "lora_" in name}
    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if set(weights) != {name for name in own if "lora_" in name}:
        raise UserError(
            f"the adapter weights of {folder} do not fit this model; give the adapter of the same base model"
        )
    set_peft_model_state_dict(model, {**own, **weights}, adapter_name=adapter)
