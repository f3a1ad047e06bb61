"""Our own layers beside the model's: the same states, samples and gradients, for the architectures they compute."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf import rollouts
from rlhf.models import decode, forward, fused, lean
from rlhf.models.forward import forest_states, packed_states
from rlhf.models.lean import LeanTrunk
from rlhf.models.policy import Policy
from rlhf.models.probe import tree_attention_fault
from rlhf.models.products import attended
from rlhf.rollouts import Sampling, generate
from rlhf.trees.forest import Forest, Tree
from rlhf.trees.masks import dense_blocks
from tests.tiny import ARCHITECTURES, make_model
from tests.trees import VOCABULARY

LEAN = ("llama", "mistral", "qwen2", "qwen3")


def forest() -> Forest:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randint(VOCABULARY, (n,), generator=generator) for n in (5, 9, 4, 12, 7)]
    return Forest([Tree.of(parts[0], parts[1], parts[2]), Tree.of(parts[3], parts[4])])


def ready(architecture: str, **options):
    model = make_model(architecture, **options).eval()
    assert tree_attention_fault(model) is None
    # Biases and norms start at values that hide them.
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


class WholeForest:
    """Attention of a forest in the place of a step's keys and values."""

    recordable = False

    def __init__(self, packed: Forest) -> None:
        self.packed = packed

    def decode(self, layer, q, k, v, window):
        blocks = dense_blocks(self.packed, window, q.dtype)
        return attended(q, k, v, blocks, keeps=False)[0].flatten(1)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("architecture", LEAN)
@torch.no_grad()
def test_the_states_are_the_models_own(architecture, autocast):
    model, packed = ready(architecture), forest()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, _ = packed_states(model, packed)
        trunk = LeanTrunk.of(model, 8)
        found = trunk(packed.input_ids, packed.positions, WholeForest(packed))
    assert trunk.dtype == (torch.bfloat16 if autocast else torch.float32)
    if autocast:
        exact, _ = packed_states(model, packed)
        assert (found - exact).norm() < 1.2 * (expected - exact).norm()
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(LEAN)))
def test_other_architectures_have_none(architecture):
    assert LeanTrunk.of(make_model(architecture), 8) is None


def test_another_activation_or_an_adapter_has_none():
    assert LeanTrunk.of(make_model("llama", hidden_act="gelu"), 8) is None
    adapted = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["up_proj"]))
    assert LeanTrunk.of(adapted, 8) is None


@pytest.mark.parametrize("architecture", LEAN)
def test_samples_are_those_of_the_models_own_trunk(architecture, monkeypatch):
    model = ready(architecture)
    policy = Policy(model, uses_trees=True)
    prompts = [tree[:n] for tree, n in ((forest().input_ids, 5), (forest().input_ids, 11))]
    monkeypatch.setattr(decode, "GROWTH", 5)
    found = generate(policy, prompts, Sampling(12), num_samples=3)
    monkeypatch.setattr(rollouts.LeanTrunk, "of", lambda *_: None)
    plain = generate(policy, prompts, Sampling(12), num_samples=3)
    assert all(map(torch.equal, found.response_ids, plain.response_ids))
    torch.testing.assert_close(torch.cat(found.token_logps), torch.cat(plain.token_logps), rtol=0, atol=1e-5)


@pytest.mark.skipif(not fused.multiplies(torch.float32, torch.bfloat16, torch.device("cpu")), reason="no AVX512-BF16")
@pytest.mark.parametrize("architecture", LEAN)
def test_a_recorded_step_is_the_step(architecture, monkeypatch):
    """Bit for bit, as rows end and buffers grow; and the log-probabilities are those of a fresh forward pass."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = ready(architecture, **sizes, head_dim=32)
    policy = Policy(model, uses_trees=True)
    prompts = [forest().input_ids[:n] for n in (5, 11, 30)]
    sampling = Sampling(75, stop_ids=(7, 8))
    recorded = []
    monkeypatch.setattr(decode, "GROWTH", 5)
    monkeypatch.setattr(lean, "Step", lambda *given, make=lean.Step: recorded.append(make(*given)) or recorded[-1])
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(policy, prompts, sampling, num_samples=3)
        times = len(recorded)
        monkeypatch.setattr(decode.TiledCache, "recordable", False)
        expected = generate(policy, prompts, sampling, num_samples=3)
    assert len(recorded) == times
    assert (times > 1) == (architecture != "qwen3")  # whose norms of heads are no kernels
    assert found.ended.any()
    assert all(map(torch.equal, found.response_ids, expected.response_ids))
    assert all(map(torch.equal, found.token_logps, expected.token_logps))
    for i, (response, logps) in enumerate(zip(found.response_ids, found.token_logps, strict=True)):
        ids = torch.cat([prompts[i // 3], response])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[None]).logits[0, -len(response) - 1 : -1].float()
        fresh = logits.log_softmax(-1).gather(1, response[:, None]).squeeze(1)
        assert (logps - fresh).abs().mean() < 0.03  # the rounding of bfloat16, here and there


def gradients(model, states, weights) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (states.float() * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [(), ("layers.0", "embed"), ("proj",), ("norm", "k_proj")], ids=str)
@pytest.mark.parametrize("architecture", LEAN)
def test_gradients_are_those_of_the_models_own_layers(architecture, frozen):
    """Also where part of the weights is frozen: exactly the others get one."""
    model, packed = ready(architecture), forest()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    weights = torch.randn(packed.num_tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    expected = gradients(model, packed_states(model, packed)[0], weights)
    found = gradients(model, forest_states(model, packed), weights)
    assert found
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


@pytest.mark.parametrize("at", [(38,), (3, 3, 20, 0, 36), ()], ids=str)
@pytest.mark.parametrize("architecture", LEAN)
def test_states_of_some_tokens_are_those_among_all(architecture, at):
    """In any order, some of them twice; the last layer computes no more than it must."""
    model, packed, at = ready(architecture), forest(), torch.tensor(at, dtype=torch.long).clamp(max=36)
    weights = torch.randn(len(at), model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    whole = forest_states(model, packed)[at]
    expected = gradients(model, whole, weights)
    some = forest_states(model, packed, at=at)
    torch.testing.assert_close(some, whole, rtol=0, atol=1e-6)
    found = gradients(model, some, weights)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item() + 1e-9
        )


@pytest.mark.parametrize("architecture", LEAN)
def test_gradients_under_autocast_are_as_near_to_float32_as_the_models_own(architecture):
    model, packed = ready(architecture), forest()
    weights = torch.randn(packed.num_tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    exact = gradients(model, packed_states(model, packed)[0], weights)
    with torch.autocast("cpu", torch.bfloat16):
        plain, own = packed_states(model, packed)[0], forest_states(model, packed)
    plain, own = gradients(model, plain, weights), gradients(model, own, weights)
    for name, grad in exact.items():
        assert own[name].dtype == grad.dtype
        assert (own[name] - grad).norm() < 1.5 * (plain[name] - grad).norm() + 1e-3 * grad.norm(), name


def test_what_the_layers_do_not_compute_goes_through_the_model(monkeypatch):
    """Adapters, and dropout of attention weights while training."""
    adapted = get_peft_model(ready("llama"), LoraConfig(r=2, target_modules=["up_proj"]))
    models = [adapted, ready("llama", attention_dropout=0.5), ready("gpt2")]
    monkeypatch.setattr(forward, "trained_states", lambda *_: pytest.fail("not for this model"))
    for model in models:
        forest_states(model.train(), forest())
