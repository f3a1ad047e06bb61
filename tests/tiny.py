"""Tiny seeded models of every architecture that the tests name, made in memory."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.trees import VOCABULARY

_common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_llama_like = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 8,
    **_common,
}
ARCHITECTURES: dict[str, dict] = {
    "llama": {**_llama_like, "tie_word_embeddings": True},
    "qwen2": {**_llama_like},
    "qwen3": {**_llama_like},
    "olmo2": {**_llama_like},
    "mistral": {**_llama_like, "sliding_window": 5},
    "gemma2": {
        **_llama_like,
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_llama_like,
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {**_llama_like, "logits_scaling": 2.0},
    "cohere": {**_llama_like, "logit_scale": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **_common},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 32,
        **_common,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        **_common,
    },
    "phi": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        **_common,
    },
    "phi3": {**_llama_like},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4, **_common},
    "gpt_neo": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 5,
        "max_position_embeddings": 512,
        **_common,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_common},
    "gpt_oss": {**_llama_like, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, **_common},
}
ARCHITECTURES["llama"].pop("head_dim")


def make_model(
    architecture: str = "llama", *, scorer: bool = False, seed: int = 0, dtype=torch.float32, **overrides
) -> PreTrainedModel:
    """A seeded model with two layers; its weights are large enough that tokens matter."""
    settings = {**ARCHITECTURES[architecture], **overrides}
    config = AutoConfig.for_model(architecture, **settings)
    config.use_cache = False
    torch.manual_seed(seed)
    if scorer:
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.to(dtype).eval()
