"""What micro-batches share: gradients as autograd adds them up, casts made once, nothing stale, hooks served."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rlhf import rlhf_sft
from rlhf.experiment import steps
from rlhf.models import accumulation, fused, layers
from rlhf.models.accumulation import added, gradients_added, made_of, weights_unchanged
from rlhf.models.policy import Policy
from rlhf.trees.forest import Forest, Tree
from tests.splits import make_data, make_model_dir, quick_flags
from tests.tiny import make_model
from tests.trees import VOCABULARY

LEAN = ("llama", "qwen2", "qwen3", "mistral")
kernels = pytest.mark.skipif(
    not fused.usable(torch.float32, torch.bfloat16, torch.device("cpu")), reason="the kernels cannot run here"
)


def policy_of(architecture: str) -> Policy:
    return Policy(make_model(architecture), uses_trees=True)


def forest(seed: int) -> Forest:
    """Two trees, some of whose tokens are the padding token and some of whose tokens repeat."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(VOCABULARY, (n,), generator=generator) for n in (5, 9, 4, 7, 3)]
    parts[0][2], parts[3][:3] = 0, parts[3][0]
    return Forest([Tree.of(*parts[:3]), Tree.of(*parts[3:])])


def loss_of(policy: Policy, seed: int, autocast: bool = True) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps, entropies = policy(forest(seed), entropy=True)
    return -(logps.mean() + 0.1 * entropies.mean())


def gradients(policy: Policy, *, shared: bool, autocast: bool = True, num: int = 3) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    with weights_unchanged(enabled=shared):
        for seed in range(num):
            loss = loss_of(policy, seed, autocast)
            with gradients_added(enabled=shared):
                loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("architecture", LEAN)
def test_the_gradients_are_those_that_autograd_adds_up(architecture, autocast):
    """Over three micro-batches, of every parameter; only the sums of the float32 gradients may round otherwise."""
    policy = policy_of(architecture)
    expected = gradients(policy, shared=False, autocast=autocast)
    found = gradients(policy, shared=True, autocast=autocast)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("chunk_bytes", [2**27, 2 * VOCABULARY])
def test_so_are_those_of_a_head_in_chunks(monkeypatch, chunk_bytes):
    monkeypatch.setattr("rlhf.models.logps.CHUNK_BYTES", chunk_bytes)
    policy = policy_of("llama")
    expected, found = gradients(policy, shared=False), gradients(policy, shared=True)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item(), msg=name)


def test_the_padding_tokens_embedding_gets_no_gradient():
    """As in torch: beside an untied head its row stays zero, whether the gradient is added or returned."""
    policy = policy_of("qwen2")
    assert policy.model.model.embed_tokens.padding_idx == 0
    for shared in (False, True):
        grad = gradients(policy, shared=shared)["model.model.embed_tokens.weight"]
        assert not grad[0].any()
        packed = forest(2)
        others = torch.ones(packed.num_tokens, dtype=torch.bool).index_fill(0, packed.branch_last, False)
        read = packed.input_ids[others].unique()
        assert read[0] == 0
        assert grad[read[1:]].any(1).all()


@kernels
def test_halves_are_added_where_the_gradient_stands():
    weight = torch.nn.Parameter(torch.zeros(3, 40))
    part = torch.randn(3, 40).bfloat16()
    with gradients_added(), torch.no_grad():
        assert added(weight, part)
        first = weight.grad
        assert torch.equal(first, part.float())
        assert added(weight, part)
    assert weight.grad is first
    assert torch.equal(first, 2 * part.float())


def test_nothing_is_added_outside_or_on_the_way_to_a_hook():
    weight, part = torch.nn.Parameter(torch.zeros(3, 40)), torch.ones(3, 40).bfloat16()
    with torch.no_grad():
        assert not added(weight, part)
        with gradients_added():
            assert not added(torch.zeros(3, 40), part)  # no parameter
            assert not added(weight, part.float())
            handle = weight.register_hook(lambda grad: grad)
            assert not added(weight, part)
            handle.remove()
            weight.register_post_accumulate_grad_hook(lambda p: None)
            assert not added(weight, part)
    assert weight.grad is None


@pytest.mark.parametrize("autocast", [True, False])
def test_frozen_weights_get_no_gradient(autocast):
    """The last layer and the head are trained alone, as with --finetune_mode=last_layer; and the embedding alone."""
    for trained in ("layers.1.", "embed_tokens"):
        policy = policy_of("llama")
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(trained in name)
        for seed in range(2):
            loss = loss_of(policy, seed, autocast)
            with gradients_added():
                loss.backward()
        assert {name for name, p in policy.named_parameters() if p.grad is not None} == {
            name for name, p in policy.named_parameters() if p.requires_grad
        }


def test_hooks_see_the_whole_gradient():
    policy = policy_of("llama")
    expected = gradients(policy, shared=False, num=1)
    seen = {}
    for name, parameter in policy.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    gradients(policy, shared=True, num=1)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], grad) for name, grad in expected.items())


def test_what_is_made_of_weights_is_made_once_and_anew_when_they_change():
    weight, made = torch.nn.Parameter(torch.ones(2)), []

    def make():
        made.append(weight.detach().clone())
        return made[-1]

    assert made_of([weight], "x", make) is not made_of([weight], "x", make)
    with weights_unchanged():
        one = made_of([weight], "x", make)
        assert made_of([weight], "x", make) is one
        assert made_of([weight], "y", make) is not one
        with torch.no_grad():
            weight.mul_(3)
        two = made_of([weight], "x", make)
        assert torch.equal(two, torch.full((2,), 3.0))
        weight.data = torch.zeros(2)
        assert torch.equal(made_of([weight], "x", make), torch.zeros(2))
        computed = weight * 2
        assert made_of([computed], "x", lambda: 1) + made_of([computed], "x", lambda: 2) == 3
    assert accumulation._scopes.made is None


def test_an_update_between_two_micro_batches_is_seen():
    policy = policy_of("llama")
    with weights_unchanged():
        loss_of(policy, 0)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        found = loss_of(policy, 0)
    assert found == loss_of(policy, 0)


def test_a_step_lays_out_the_weights_once_and_trains_as_without(tmp_path, monkeypatch):
    """Two steps of SFT on 6 rows, one at a time: every matrix is laid out twice in training, not twelve times; and
    the weights move as they do without sharing.
    """
    laid_out, original = [], layers.LeanLinear.__init__

    def counted(self, *args, **kwargs):
        laid_out.append(1)
        original(self, *args, **kwargs)

    monkeypatch.setattr(layers.LeanLinear, "__init__", counted)
    data, model = make_data(tmp_path / "data", num_train=12), make_model_dir(tmp_path / "llama")
    start, ends, counts = load_file(tmp_path / "llama" / "model.safetensors"), {}, {}
    options = {"optimizer": "sgd", "learning_rate": 0.5, "lr_schedule": "constant", "gradient_clip_val": 0.0}
    cut = {"precision": "bf16-mixed", "mini_batch_size": 6, "micro_batch_size": 1}
    for name in ("shared", "apart"):
        if name == "apart":
            for scope in (weights_unchanged, gradients_added):
                monkeypatch.setattr(steps, scope.__name__, lambda enabled, scope=scope: scope(enabled=False))
        laid_out.clear()
        rlhf_sft.main(quick_flags(rlhf_sft.SFTFlags, data, tmp_path / name, model_name=model, **options, **cut))
        ends[name], counts[name] = load_file(tmp_path / name / "final" / "model.safetensors"), len(laid_out)
    matrices = 2 * 4  # layers, inputs
    assert counts["apart"] - counts["shared"] == 2 * 5 * matrices
    for key, end in ends["apart"].items():
        moved = end - start[key]
        assert (ends["shared"][key] - end).norm() <= 1e-4 * moved.norm(), key
