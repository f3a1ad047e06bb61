"""Casts under autocast: shared by the layers of one input, gone after the forward pass, the same numbers."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.models.casts import share_casts
from rlhf.models.forward import packed_states, trunk_of
from rlhf.models.probe import tree_attention_fault
from rlhf.trees.forest import Forest, Tree
from tests.tiny import make_model
from tests.trees import VOCABULARY


class _Casts(TorchDispatchMode):
    """Counts casts of activations, that is of tensors with the packed tokens as an axis, to bf16."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens, self.found = num_tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.found += out.dim() == 3 and out.shape[1] == self.num_tokens
        return out


def forest() -> Forest:
    generator = torch.Generator().manual_seed(3)
    return Forest([Tree.of(*(torch.randint(VOCABULARY, (n,), generator=generator) for n in (5, 9, 4)))])


def run(model, autocast: bool = True):
    model.zero_grad()
    packed = forest()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), _Casts(packed.num_tokens) as casts:
        states, _ = packed_states(model, packed)
    states.square().mean().backward()
    return states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, casts.found


def test_one_cast_serves_all_layers_of_an_input():
    """A block casts two inputs (of the attention, of the MLP) where it cast five; states do not change by a bit."""
    model = make_model("llama")
    assert tree_attention_fault(model) is None
    plain, plain_grads, many = run(model)
    share_casts(trunk_of(model))
    shared, shared_grads, few = run(model)
    assert many - few == 3 * model.config.num_hidden_layers
    assert torch.equal(plain, shared)
    for name, grad in plain_grads.items():
        torch.testing.assert_close(shared_grads[name], grad, rtol=0.05, atol=0.01 * grad.abs().max().item())


def test_in_float32_nothing_changes():
    model = make_model("qwen2")
    assert tree_attention_fault(model) is None
    plain, plain_grads, _ = run(model, autocast=False)
    share_casts(trunk_of(model))
    shared, shared_grads, _ = run(model, autocast=False)
    assert torch.equal(plain, shared)
    assert all(torch.equal(shared_grads[name], grad) for name, grad in plain_grads.items())


def test_nothing_is_kept_after_the_forward_pass_and_a_changed_input_is_cast_again():
    model = make_model("llama")
    share_casts(trunk_of(model))
    linear = trunk_of(model).layers[0].mlp.up_proj
    (shared,) = linear._forward_pre_hooks.values()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, linear.in_features)
        first = linear(x)
        assert shared.source is x
        x.zero_()
        assert first.abs().max() > 0
        assert linear(x).abs().max() == 0
        model(torch.tensor([[1, 2, 3]]))
    assert shared.source is None
    assert shared.cast is None
