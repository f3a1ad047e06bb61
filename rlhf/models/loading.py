"""Policies and scorers from a hub id, a local folder, or an earlier stage's experiment folder."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft import PeftModel, TaskType
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.data.text import is_hub_id, load_tokenizer, pad_token_id
from rlhf.errors import UserError
from rlhf.flags import ModelFlags
from rlhf.models.adapters import adapter_base, adapter_has_head, attach_adapter, with_lora
from rlhf.models.casts import share_casts
from rlhf.models.fits import check_shapes
from rlhf.models.forward import KEEP, enable_checkpointing, trunk_of, unwrapped
from rlhf.models.policy import Policy, Scorer
from rlhf.models.probe import tree_attention_fault
from rlhf.paths import check_path
from rlhf.untrusted import check_finite, check_folder, check_inside, first_line, why_no_pickle

Role = Policy | Scorer

REWARD_MEAN, REWARD_SCALE = "reward_mean", "reward_scale"
"""Keys of a reward model's config.json: reward = (score - reward_mean) / reward_scale."""


def resolve(source: str | None, flag: str) -> str:
    """The model folder behind `source`, an experiment folder, or `source` itself for a hub id or model folder.

    An experiment gives its newest weights: `final/`, or while it has none its last checkpoint; the best evaluation's
    only where a run was stopped before its first checkpoint. Where there is more, `<experiment>/checkpoints/best`
    asks for the best one.

    Raises:
        UserError: no source, or a path that holds no model.
    """
    if not source:
        raise UserError(f"no model is given; set --{flag} to a hub id, a model folder or an experiment folder")
    path = Path(source).expanduser()
    if not check_path(source, flag):
        if not is_hub_id(source):
            raise UserError(f"--{flag}={source}: there is no such folder; give a model, an experiment or a hub id")
        return source
    checkpoints = path / "checkpoints"
    in_order = path, path / "final", checkpoints / "last" / "model", checkpoints / "best" / "model", path / "model"
    for folder in in_order:
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            if folder != path:
                check_inside(folder, path)
            return str(folder)
    raise UserError(
        f"--{flag}={source} holds no model (no config.json, no final/, no checkpoint); give a folder that does"
    )


def tokenizer_of(source: str, flags: ModelFlags) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; its pad token is one that is neither EOS nor BOS, if the vocabulary has one."""
    base = adapter_base(source)
    has_own = base is None or (Path(source) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(source if has_own else base, trust_remote_code=flags.trust_remote_code)
    pad = pad_token_id(tokenizer)
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def load_policy(source: str, flags: ModelFlags, *, trainable: bool = True) -> Policy:
    """A causal language model in float32, made trainable as `flags.finetune_mode` says.

    Args:
        source: what `resolve` returned.
        trainable: False loads it frozen, in evaluation mode (a reference, a model to evaluate or to talk to).

    A folder that holds an adapter is continued as that adapter under `--finetune_mode=lora`, with a second,
    frozen copy named "reference"; otherwise it is merged into its base.

    Raises:
        UserError: the model cannot be loaded, or is not a causal language model.
    """
    base = adapter_base(source)
    model: PreTrainedModel | PeftModel = _load(AutoModelForCausalLM, base or source, flags)
    adapter = KEEP
    if trainable and flags.finetune_mode == "lora":
        model = with_lora(model, source if base else None, flags, TaskType.CAUSAL_LM)
        if base:
            model.load_adapter(source, "reference", is_trainable=False)
            model.set_adapter("default")
        adapter = "default"
    elif base:
        model = attach_adapter(model, source, trainable=False).merge_and_unload().requires_grad_(True)
    return Policy(_prepare(model, flags, trainable), uses_trees=_probe(model, source), adapter=adapter)


def load_scorer(source: str, flags: ModelFlags, *, trainable: bool = True, new_head: bool = False) -> Scorer:
    """A model with a scalar head: `AutoModelForSequenceClassification` with one label.

    Args:
        source: what `resolve` returned.
        trainable: False loads it frozen, in evaluation mode (the reward model of PPO).
        new_head: start with fresh head weights N(0, 1 / (hidden + 1)) (a reward model to be trained from a
            language model); otherwise the folder must hold the head's weights.

    Raises:
        UserError: the model cannot be loaded; it has no trained head and `new_head` is False.
    """
    base = adapter_base(source)
    is_scorer_adapter = base is not None and adapter_has_head(source)
    fresh = new_head or is_scorer_adapter
    if base and not fresh:
        raise UserError(f"{source} is an adapter of a language model, not of a reward model: it has no trained head")
    model = _load(AutoModelForSequenceClassification, base or source, flags, num_labels=1, needs_head=not fresh)
    if fresh:
        head = model.score
        nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    adapter = KEEP
    if trainable and flags.finetune_mode == "lora":
        model = with_lora(model, source if base else None, flags, TaskType.SEQ_CLS)
        adapter = "default"
    elif base:
        model = attach_adapter(model, source, trainable=False).merge_and_unload().requires_grad_(True)
    uses_trees = _probe(model, source)
    _prepare(model, flags, trainable)
    scorer = Scorer(model, unwrapped(model).score, uses_trees=uses_trees, adapter=adapter)
    scorer.reward_mean, scorer.reward_scale = reward_moments(source) if not new_head else (0.0, 1.0)
    return scorer


def reward_moments(source: str) -> tuple[float, float]:
    """(mean, scale) with which a reward model was saved: reward = (score - mean) / scale; (0, 1) if it has none."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        return 0.0, 1.0
    mean, scale = getattr(config, REWARD_MEAN, 0.0), getattr(config, REWARD_SCALE, 1.0)
    numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in (mean, scale))
    if not numbers or scale <= 0:
        raise UserError(
            f"{source}: its config.json has {REWARD_MEAN}={mean} and {REWARD_SCALE}={scale}; the first must be "
            f"a number and the second one above 0"
        )
    return float(mean), float(scale)


def save_model(role: Policy | Scorer, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a Hugging Face folder that loads without this project (with peft, for an adapter)."""
    model, config = role.model, unwrapped(role.model).config
    if isinstance(role, Scorer):
        setattr(config, REWARD_MEAN, role.reward_mean)
        setattr(config, REWARD_SCALE, role.reward_scale)
    # transformers' classifier scores the last token that is no pad: with pad = EOS one before the end, silently.
    # Without a pad it scores the last one, and refuses a batch.
    ambiguous = isinstance(role, Scorer) and tokenizer.pad_token_id == tokenizer.eos_token_id
    config.pad_token_id = None if ambiguous else tokenizer.pad_token_id
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        if isinstance(role, Scorer):
            config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def set_dropout_off(model: nn.Module) -> None:
    """Set every dropout probability to 0, modules and plain numbers alike, without touching the configuration."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_kind(source: str, flags: ModelFlags, *, scorer: bool = False) -> None:
    """Refuse by its configuration alone, before any weights are read, what `load_policy` would refuse by it.

    Args:
        source: what `resolve` returned.
        scorer: what `load_scorer`, without a new head, would refuse.

    Raises:
        UserError: it can't be read, or is another kind of model.
    """
    base = adapter_base(source)
    if not scorer or base is None:
        _config_of(AutoModelForSequenceClassification if scorer else AutoModelForCausalLM, base or source, flags)
    elif not adapter_has_head(source):
        raise UserError(f"{source} is an adapter of a language model, not of a reward model: it has no trained head")


def _config_of(kind, source: str, flags: ModelFlags, *, needs_head: bool = True) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=flags.trust_remote_code)
    except Exception as error:  # of a configuration that was tampered with, transformers raises anything
        raise UserError(_why(source, error)) from None
    if config.is_encoder_decoder:
        raise UserError(f"{source} is an encoder-decoder ({config.model_type}); give a causal language model")
    _check_architecture(source, config, kind, needs_head)
    return config


def _load(kind, source: str, flags: ModelFlags, *, num_labels: int | None = None, needs_head: bool = True):
    tensors = check_folder(source) if os.path.isdir(source) else {}
    config = _config_of(kind, source, flags, needs_head=needs_head)
    if num_labels is not None:
        config.num_labels = num_labels
    try:
        if os.path.isdir(source) and not flags.trust_remote_code:
            check_shapes(source, config, kind, tensors)
        model, info = kind.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            trust_remote_code=flags.trust_remote_code,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:  # so does what reads the weights
        raise UserError(_why(source, error)) from None
    missing = [name for name in info["missing_keys"] if needs_head or not name.startswith("score")]
    if missing:
        if any(name.startswith("score") for name in missing):
            raise UserError(
                f"{source} has no trained reward head ({missing[0]} is missing); give a folder written by rlhf_rm.py"
            )
        raise UserError(f"{source} lacks the weights of {missing[0]}; the folder is incomplete: copy it again")
    check_finite(model.named_parameters(), source)
    model.config.use_cache = False
    share_casts(trunk_of(model))
    return model


def _check_architecture(source: str, config: PretrainedConfig, kind, needs_head: bool) -> None:
    architectures = " ".join(map(str, config.architectures or []))
    if kind is AutoModelForSequenceClassification and needs_head and re.search("CausalLM|LMHead", architectures):
        raise UserError(
            f"{source} is a language model ({architectures}) and has no trained reward head; give a folder written by "
            f"rlhf_rm.py"
        )
    if kind is AutoModelForCausalLM and "SequenceClassification" in architectures:
        raise UserError(f"{source} is a reward model ({architectures}), not a language model; give a policy's folder")
    if type(config) not in kind._model_mapping:
        what = "causal language model" if kind is AutoModelForCausalLM else "sequence classifier"
        raise UserError(f"{source}: transformers has no {what} for model type {config.model_type!r}; give another")


def _why(source: str, error: Exception) -> str:
    first = first_line(error)
    if "trust_remote_code" in str(error):
        return f"{source} needs code of its own to load; read that code, then set --trust_remote_code=True"
    if isinstance(error, UnpicklingError):
        return why_no_pickle(source, error)
    if "ignore_mismatched_sizes" in str(error):
        first = "its weights have other shapes than its config.json asks for"
    if os.path.isdir(source):
        return f"the model folder {source} cannot be read ({first}); write or copy it again"
    return f"the model {source!r} is neither a local folder nor reachable on the hub ({first}); give a folder"


def _prepare(model: PreTrainedModel | PeftModel, flags: ModelFlags, trainable: bool):
    if not trainable:
        model.requires_grad_(False)
        return model.eval()
    if flags.disable_dropout:
        set_dropout_off(model)
    if flags.finetune_mode == "last_layer":
        _thaw_last_layer(model)
    if flags.gradient_checkpointing:
        enable_checkpointing(model)
    return model.train()


def _thaw_last_layer(model: PreTrainedModel) -> None:
    """Train the last block, what follows it in the trunk (the final norm), and the head unless it is tied."""
    model.requires_grad_(False)
    trunk = trunk_of(model)
    depth = model.config.get_text_config().num_hidden_layers
    stacks = [m for m in trunk.children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        raise UserError(f"{type(model).__name__} has no list of {depth} blocks; use --finetune_mode all or lora")
    stacks[0][-1].requires_grad_(True)
    after = False
    for child in trunk.children():
        if after and not isinstance(child, nn.Embedding):
            child.requires_grad_(True)
        after = after or child is stacks[0]
    for name in ("final_layer_norm", "norm", "ln_f"):
        if hasattr(trunk, name) and isinstance(getattr(trunk, name), nn.Module):
            getattr(trunk, name).requires_grad_(True)
    head = getattr(model, "score", None) or model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(True)


def _probe(model: PreTrainedModel | PeftModel, source: str) -> bool:
    fault = tree_attention_fault(model)
    if fault is not None:
        print(f"note: {source} runs on padded batches, prompts not shared: {fault}.", flush=True)
    return fault is None
