"""The check on loading that a model's tree forward equals its plain one."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

from rlhf.models.attention import IMPLEMENTATION, UnsupportedAttention
from rlhf.models.forward import accepted, forest_states, packed_states, padded_rows, place_in_rows, trunk_of, unwrapped
from rlhf.models.policy import logit_scale, logit_softcap
from rlhf.trees.forest import Forest, Tree

TOLERANCE = 1e-3


def tree_attention_fault(model: PreTrainedModel | PeftModel) -> str | None:
    """Set `model` to tree attention if it computes the same numbers with it; else say why not.

    A forest with forks, a deep tree and a lone trunk goes through the model packed, and each of its paths alone
    through the plain model. Models that ignore the registered attention function, or add to it what a tree
    cannot have, differ there. Sliding windows longer than the probe cannot show there: a configuration that
    declares one must hand it to the attention function.

    Returns:
        None where the two agree to 1e-3 of the states' size (the model is then left on tree attention), else one
        clause for the user (the model is left as it came).
    """
    hf = unwrapped(model)
    before, training, verbosity = hf.config._attn_implementation, model.training, logging.get_verbosity()
    try:
        # A model that ignores the attention function warns of it at length; the caller says it in one line.
        logging.set_verbosity_error()
        model.eval()
        fault = _fault(hf)
    finally:
        model.train(training)
        if before is not None:
            hf.set_attn_implementation(before)
        logging.set_verbosity(verbosity)
    if fault is None:
        hf.set_attn_implementation(IMPLEMENTATION)
    return fault


@torch.no_grad()
def _fault(hf: PreTrainedModel) -> str | None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(hf.config.vocab_size, hf.get_input_embeddings().weight.shape[0])

    def ids(n: int) -> torch.Tensor:
        return torch.randint(vocabulary, (n,), generator=generator)

    forest = Forest(
        [
            Tree([ids(5), ids(3), ids(4)], [-1, 0, 0]),
            Tree([ids(2), ids(3), ids(1), ids(2), ids(4)], [-1, 0, 1, 1, 0]),
            Tree.of(ids(6)),
        ]
    ).to(hf.device)
    inputs = accepted(trunk_of(hf), padded_rows(forest))
    plain = trunk_of(hf)(**inputs, use_cache=False, return_dict=True).last_hidden_state
    row, column = place_in_rows(forest)
    plain = plain[row, column]
    if not torch.isfinite(plain).all():
        return "its hidden states are not finite"
    if "attention_mask" in inputs and IMPLEMENTATION not in AttentionInterface().valid_keys():
        return "tree attention is not registered"
    try:
        hf.set_attn_implementation(IMPLEMENTATION)
        packed, plan = packed_states(hf, forest)
        trained = forest_states(hf, forest)
    except (UnsupportedAttention, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        return f"it does not take another attention function ({error})".replace("\n", " ")
    except RuntimeError as error:
        return f"its forward pass fails on packed rows ({error})".replace("\n", " ")
    if not plan.windows:
        return "it ignores the attention function"
    for states in (packed, trained):
        difference = (states - plain).abs().max() / plain.abs().max().clamp(min=1e-6)
        if not difference < TOLERANCE:
            return f"its packed states differ from its plain ones by {difference:.1e} of their size"
    declared = _declared_window(hf.config)
    if declared is not None and declared not in plan.windows:
        return f"its sliding window of {declared} does not reach the attention function"
    return _head_fault(hf, plain, inputs, row, column)


def _declared_window(config) -> int | None:
    types = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def _head_fault(hf, states, inputs, row, column) -> str | None:
    """Whether the head's log-probabilities, from its weights and our scale and cap, are those of the full model."""
    head = hf.get_output_embeddings()
    if head is None or getattr(hf, "score", None) is not None:
        return None
    logits = head(states).float()
    softcap = logit_softcap(hf.config)
    logits = (softcap * torch.tanh(logits / softcap) if softcap is not None else logits) * logit_scale(hf.config)
    full = hf(**inputs, use_cache=False).logits[row, column].float()
    if (logits.log_softmax(-1) - full.log_softmax(-1)).abs().max() > TOLERANCE * max(1.0, full.abs().max().item()):
        return "its logits are not its head's product with its hidden states"
    return None
