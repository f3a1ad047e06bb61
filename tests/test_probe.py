"""The check on loading: which models may run on trees, what is said of the others, and that nothing else changes."""

from __future__ import annotations

import logging

import pytest
import torch

from rlhf.flags import ModelFlags
from rlhf.models import probe
from rlhf.models.attention import IMPLEMENTATION
from rlhf.models.loading import load_policy, load_scorer
from rlhf.models.probe import tree_attention_fault
from tests.splits import make_model_dir
from tests.tiny import make_model


class _Collect(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("architecture", ["gptj", "bloom"])
def test_a_model_that_ignores_the_attention_function_says_so_in_one_line(tmp_path, capfd, monkeypatch, architecture):
    """GPT-J and BLOOM give wrong numbers silently on trees: loading prints one note, and they take padded rows."""
    folder = make_model_dir(tmp_path, architecture)
    capfd.readouterr()
    warned = []
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [_Collect(warned)])
    policy = load_policy(folder, ModelFlags())
    assert not policy.uses_trees
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith(f"note: {folder} runs on padded batches, prompts not shared: ")
    assert warned == []
    assert not load_scorer(folder, ModelFlags(), new_head=True).uses_trees


def test_a_model_that_takes_it_is_quiet(tmp_path, capfd):
    folder = make_model_dir(tmp_path)
    capfd.readouterr()
    assert load_policy(folder, ModelFlags()).uses_trees
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_the_model_as_it_came(architecture, training):
    """Mode, weights, gradients and the random state; a model that fails keeps its own attention too."""
    model = make_model(architecture).train(training)
    before = {name: p.clone() for name, p in model.named_parameters()}
    implementation, state = model.config._attn_implementation, torch.get_rng_state()
    fault = tree_attention_fault(model)
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == (IMPLEMENTATION if fault is None else implementation)
    assert (fault is None) == (architecture == "llama")


def test_sinks_are_named():
    """What a tree's softmax doesn't have (GPT-OSS's attention sinks) is an error there, not a wrong number."""
    assert "'s_aux'" in tree_attention_fault(make_model("gpt_oss"))


def test_a_window_that_does_not_reach_the_attention_is_found():
    """Llama ignores a window in its configuration; a model that applied one elsewhere would pass the probe else."""
    assert "sliding window of 300" in tree_attention_fault(make_model("llama", sliding_window=300))
    assert tree_attention_fault(make_model("mistral", sliding_window=300)) is None
    assert tree_attention_fault(make_model("qwen2", sliding_window=300, use_sliding_window=False)) is None


@pytest.mark.parametrize("seed", range(3))
def test_leaking_branches_are_found(monkeypatch, seed):
    """With plain causal attention on the packed row, branches see each other: the probe must notice."""
    plan = probe.Forest.__init__

    def leaky(self, trees):
        plan(self, trees)
        self.end[:] = self.num_tokens

    monkeypatch.setattr(probe.Forest, "__init__", leaky)
    assert "differ from its plain ones" in tree_attention_fault(make_model("llama", seed=seed))


def test_wrong_positions_are_found(monkeypatch):
    """Positions of the packed row instead of depths: rotary and absolute models differ."""
    packed = probe.packed_states

    def shifted(model, forest):
        forest.positions = torch.arange(forest.num_tokens)
        return packed(model, forest)

    monkeypatch.setattr(probe, "packed_states", shifted)
    for architecture in ("llama", "gpt2"):
        assert "differ from its plain ones" in tree_attention_fault(make_model(architecture))


def test_layers_that_are_not_what_their_architecture_says_are_found(monkeypatch):
    """Training computes the layers of known architectures itself: one that is not, must not be taken for one."""
    plain = probe.forest_states
    monkeypatch.setattr(probe, "forest_states", lambda *args: 1.01 * plain(*args))
    assert "differ from its plain ones" in tree_attention_fault(make_model("llama"))


@pytest.mark.parametrize("name", ["logit_scale", "logit_softcap"])
def test_a_head_with_a_scale_or_cap_that_we_do_not_know_is_found(monkeypatch, name):
    """Chunked log-probabilities use the head's weights: Gemma-2 without its cap, Cohere without its scale, differ."""
    architecture = "cohere" if name == "logit_scale" else "gemma2"
    monkeypatch.setattr(probe, name, lambda config: 1.0 if name == "logit_scale" else None)
    assert "logits are not its head's product" in tree_attention_fault(make_model(architecture))


def test_states_that_are_not_finite_are_named():
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    assert tree_attention_fault(model) == "its hidden states are not finite"
