"""The roles of RL: actor, reference, critic and reward model; with LoRA as few copies of a base as can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from rlhf.data.text import tokenizer_fingerprint
from rlhf.errors import UserError
from rlhf.flags import ModelFlags
from rlhf.models.adapters import adapter_base, adapter_has_head, adapter_settings, adapter_weights, copy_adapter
from rlhf.models.forward import unwrapped
from rlhf.models.loading import load_policy, load_scorer, reward_moments, set_dropout_off, tokenizer_of
from rlhf.models.policy import Policy, Scorer

CriticInit = Literal["reward", "sft", "zero"]
_NUMBER = {3: "three", 4: "four"}


@dataclass
class Roles:
    """Actor and critic are trained; reference and reward are frozen. A role that a run doesn't have is None.

    Attributes:
        sharing: one clause for the user: which roles share one copy of the weights.
    """

    actor: Policy
    reference: Policy | None
    critic: Scorer | None
    reward: Scorer | None
    sharing: str


def load_actor(sft: str, flags: ModelFlags, *, with_reference: bool) -> Roles:
    """The roles of RL without a critic: the actor and, where it is asked for, its frozen reference.

    Args:
        sft: what `resolve` returned: where both start.

    With `--finetune_mode=lora` the reference is the actor's weights without the trained adapter.
    """
    actor = load_policy(sft, flags)
    set_dropout_off(actor)
    if not with_reference:
        return Roles(actor, None, None, None, "no reference")
    if flags.finetune_mode == "lora":
        return Roles(actor, _reference_under(actor), None, None, "policy and reference on 1 copy")
    reference = load_policy(sft, flags, trainable=False)
    set_dropout_off(reference)
    return Roles(actor, reference, None, None, "policy and reference are two models")


def _reference_under(actor: Policy) -> Policy:
    """The reference over the weights of a LoRA actor: the adapter that it continues, or none."""
    continued = "reference" in actor.model.peft_config
    return Policy(actor.model, uses_trees=actor.uses_trees, adapter="reference" if continued else None)


def load_roles(
    sft: str, reward: str | None, critic_init: CriticInit, flags: ModelFlags, *, reward_weight: float = 1.0
) -> Roles:
    """Load the roles from the folders of an SFT policy and a reward model.

    Args:
        sft, reward: what `resolve` returned; None where rewards come from elsewhere.
        critic_init: the critic starts as the reward model (its value at the last token is the normalised
            reward, times `reward_weight`), as the SFT trunk with a random head, or as the SFT trunk with a head of
            zeros (V = 0).

    With `--finetune_mode=lora` the reference is the actor's weights without the trained adapter, and the critic is
    an adapter and a head over the actor's base or over the reward model's. A reward model that is itself an
    adapter of the actor's base joins it, so that all four roles share one copy.

    Raises:
        UserError: a critic that is to start as a reward model that is not there or that reads other tokens, or a model
            that can't be loaded.
    """
    if critic_init == "reward":
        _check_critic_can_start_as(reward, sft, flags)
    if flags.finetune_mode != "lora":
        return _separate(sft, reward, critic_init, flags, reward_weight)
    actor = load_policy(sft, flags)
    reference = _reference_under(actor)
    shares = (
        reward is not None and adapter_base(reward) is not None and adapter_has_head(reward) and _same_base(sft, reward)
    )
    if shares:
        scorer = _adapter_scorer(actor, reward)
    else:
        scorer = None if reward is None else load_scorer(reward, flags, trainable=False)
    if critic_init == "reward" and not shares:
        settings = _lora_like(actor.model.peft_config["default"])
        peft_model = PeftModel(scorer.model, settings, adapter_name="critic")
        critic = Scorer(peft_model, _linear_head(peft_model), uses_trees=scorer.uses_trees, adapter="critic")
        scorer.model, scorer.adapter = peft_model, None
    else:
        from_reward = critic_init == "reward"
        settings = actor.model.peft_config["reward" if from_reward else "default"]
        critic = _new_scorer(actor, settings, reward if from_reward else None, "critic")
    if critic_init == "reward":
        _start_at_reward(critic.head, scorer, reward_weight)
    else:
        _start_fresh(critic.head, zero=critic_init == "zero")
    for role in (actor, critic):
        for name, parameter in role.model.named_parameters():
            parameter.requires_grad_(".default." in name or ".critic." in name)
        role.train()
    critic.head.requires_grad_(True)
    roles = [role for role in (actor, reference, critic, scorer) if role is not None]
    for role in roles:
        set_dropout_off(role)
    copies = len({id(unwrapped(role.model)) for role in roles})
    sharing = f"{_NUMBER[len(roles)]} roles on {copies} {'copy' if copies == 1 else 'copies'}"
    return Roles(actor, reference, critic, scorer, sharing)


def _separate(sft: str, reward: str | None, critic_init: CriticInit, flags: ModelFlags, reward_weight: float) -> Roles:
    actor, reference = load_policy(sft, flags), load_policy(sft, flags, trainable=False)
    scorer = None if reward is None else load_scorer(reward, flags, trainable=False)
    if critic_init == "reward":
        critic = load_scorer(reward, flags)
        head = _linear_head(critic.model)
        _start_at_reward(head, scorer, reward_weight)
    else:
        critic = load_scorer(sft, flags, new_head=True)
        head = _linear_head(critic.model)
        _start_fresh(head, zero=critic_init == "zero")
    # The critic's own head, with a bias, takes the place of the classifier's.
    unwrapped(critic.model).score = head
    critic.head = head
    roles = [role for role in (actor, reference, critic, scorer) if role is not None]
    for role in roles:
        set_dropout_off(role)
    return Roles(actor, reference, critic, scorer, f"{_NUMBER[len(roles)]} models, one for each role")


def _check_critic_can_start_as(reward: str | None, sft: str, flags: ModelFlags) -> None:
    if reward is None:
        raise UserError(
            "--critic_init=reward starts the critic as the reward model, and there is none among the rewards; set "
            "--critic_init=sft or zero, or add --rm_experiment_dir"
        )
    theirs, own = (tokenizer_fingerprint(tokenizer_of(source, flags)) for source in (reward, sft))
    if theirs != own:
        raise UserError(
            f"the reward model {reward} and the policy {sft} have different tokenizers, so the critic, which reads the "
            f"policy's tokens, can't start as the reward model; set --critic_init=sft or zero"
        )


def _same_base(sft: str, reward: str) -> bool:
    base = adapter_base(sft) or sft
    other = adapter_base(reward)
    return base == other or (Path(base).exists() and Path(base).resolve() == Path(other).resolve())


def _linear_head(model) -> nn.Linear:
    hf = unwrapped(model)
    score = getattr(hf, "score", None)
    size = score.in_features if score is not None else hf.config.get_text_config().hidden_size
    return nn.Linear(size, 1, device=hf.device)


def _start_at_reward(head: nn.Linear, scorer: Scorer, weight: float) -> None:
    """Make a value head give the normalised reward times its weight in the mix: weight * (score - mean) / scale."""
    factor = weight / scorer.reward_scale
    with torch.no_grad():
        head.weight.copy_(scorer.head.weight * factor)
        head.bias.fill_(-scorer.reward_mean * factor)


def _start_fresh(head: nn.Linear, *, zero: bool) -> None:
    nn.init.zeros_(head.bias)
    nn.init.normal_(head.weight, std=0.0 if zero else (head.in_features + 1) ** -0.5)


def _adapter_scorer(actor: Policy, reward: str) -> Scorer:
    """The reward model as a frozen adapter on the actor's base, with its own head."""
    scorer = _new_scorer(actor, adapter_settings(reward), reward, "reward")
    weights = adapter_weights(reward)
    (key,) = [name for name in weights if name.endswith("score.weight")]
    with torch.no_grad():
        scorer.head.weight.copy_(weights[key])
        scorer.head.bias.zero_()
    scorer.head.requires_grad_(False)
    scorer.reward_mean, scorer.reward_scale = reward_moments(reward)
    return scorer


def _new_scorer(actor: Policy, settings: LoraConfig, weights_from: str | None, adapter: str) -> Scorer:
    """One more adapter and a head on the actor's base."""
    model: PeftModel = actor.model
    model.add_adapter(adapter, _lora_like(settings))
    if weights_from is not None:
        copy_adapter(weights_from, model, adapter)
    return Scorer(model, _linear_head(model), uses_trees=actor.uses_trees, adapter=adapter)


def _lora_like(settings: LoraConfig) -> LoraConfig:
    """The same shape of adapter, for the trunk alone."""
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=settings.target_modules,
        use_rslora=settings.use_rslora,
    )
