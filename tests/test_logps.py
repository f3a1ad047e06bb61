"""Chunked log-probabilities against the full matrix: values, entropies, gradients, and what is never held."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.models.logps import chunked_logps
from rlhf.models.policy import logps_of_logits

ROWS, HIDDEN, VOCABULARY = 7, 5, 11
OPTIONS = [
    {},
    {"scale": 0.7},
    {"softcap": 2.0},
    {"scale": 1.6, "softcap": 1.5},
]
CHUNKS = pytest.mark.parametrize("chunk_rows", [1, 3, 100], ids=["one", "three", "all"])


def inputs(dtype=torch.float64, *, bias: bool = True, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, offset = (
        torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
        for shape in ((ROWS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden, weight, offset if bias else None, targets


def full(hidden, weight, bias, targets, scale=1.0, softcap=None):
    """The same by the book: all logits, `log_softmax`, and the entropy's definition."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probabilities = F.log_softmax(scale * logits, dim=-1)
    return log_probabilities[range(len(targets)), targets], torch.special.entr(log_probabilities.exp()).sum(-1)


@CHUNKS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_are_those_of_the_full_matrix(options, bias, chunk_rows):
    """C18: log-probabilities and entropies to 1e-12 in float64, whatever the chunk."""
    given = inputs(bias=bias)
    logps, entropies = chunked_logps(*given, **options, entropy=True, chunk_rows=chunk_rows)
    expected, expected_entropies = full(*given, **options)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropies, expected_entropies, rtol=0, atol=1e-12)


@CHUNKS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_collisions_are_those_of_the_full_matrix(options, chunk_rows):
    """log sum p^2, without a gradient, and the log-probabilities beside it with theirs; not beside entropies. The same
    from full logits, as a model without tree attention gives them."""
    given = inputs(bias=True)
    logps, collisions = chunked_logps(*given, **options, collision=True, chunk_rows=chunk_rows)
    hidden, weight, bias, targets = given
    logits = hidden @ weight.T + bias
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    logits = logits * options.get("scale", 1.0)
    expected = logits.softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(collisions, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logps, full(*given, **options)[0], rtol=0, atol=1e-12)
    assert logps.requires_grad
    assert not collisions.requires_grad
    _, of_logits = logps_of_logits(logits.float(), targets, collision=True)
    torch.testing.assert_close(of_logits, expected.float(), rtol=0, atol=1e-5)
    assert not of_logits.requires_grad
    with pytest.raises(ValueError, match="not computed together"):
        chunked_logps(*given, entropy=True, collision=True)


@CHUNKS
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_the_full_matrix(options, entropy, chunk_rows):
    """C18: gradients of states, weight and bias, of a random weighting of both outputs, to 1e-12 in float64."""
    weights = torch.randn(2, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for compute in (chunked_logps, full):
        given = inputs()
        extra = {"entropy": entropy, "chunk_rows": chunk_rows} if compute is chunked_logps else {}
        logps, entropies = compute(*given, **options, **extra)
        loss = weights[0] @ logps + (weights[1] @ entropies if entropy else 0)
        gradients.append(torch.autograd.grad(loss, given[:3]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options, entropy):
    """Analytic gradients against differences, in float64."""
    hidden, weight, bias, targets = inputs()

    def compute(hidden, weight, bias):
        found = chunked_logps(hidden, weight, bias, targets, **options, entropy=entropy, chunk_rows=3)
        return found if entropy else found[0]

    assert torch.autograd.gradcheck(compute, (hidden, weight, bias))


def test_by_hand():
    """Logits 0 and ln 3 make probabilities 1/4 and 3/4, with entropy ln 4 - 3/4 ln 3; at scale 2: 1/10 and 9/10."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]])
    logps, entropies = chunked_logps(hidden, weight, None, torch.tensor([0, 1]), entropy=True)
    torch.testing.assert_close(logps.exp(), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(entropies, torch.full((2,), math.log(4) - 0.75 * math.log(3)))
    logps, none = chunked_logps(hidden, weight, None, torch.tensor([0, 1]), scale=2.0)
    torch.testing.assert_close(logps.exp(), torch.tensor([0.1, 0.9]))
    assert none is None


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_others_keep_theirs(frozen):
    """A frozen head (`--finetune_mode=last_layer` on tied weights, or LoRA) costs no vocabulary-sized gradient."""
    hidden, weight, bias, targets = inputs()
    full(hidden, weight, bias, targets)[0].sum().backward()
    given = {
        name: x.detach().requires_grad_(name != frozen)
        for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias))
    }
    chunked_logps(**given, targets=targets)[0].sum().backward()
    for name, expected in (("hidden", hidden.grad), ("weight", weight.grad), ("bias", bias.grad)):
        if name == frozen:
            assert given[name].grad is None
        else:
            torch.testing.assert_close(given[name].grad, expected, rtol=0, atol=1e-12)


def test_no_rows_are_no_log_probabilities():
    """A micro-batch without a target: empty, with gradients of 0."""
    hidden, weight, bias, _ = inputs()
    empty = hidden[:0]
    logps, entropies = chunked_logps(empty, weight, bias, torch.empty(0, dtype=torch.long), entropy=True)
    assert logps.shape == entropies.shape == (0,)
    (logps.sum() + entropies.sum()).backward()
    assert weight.grad.abs().max() == 0


def test_large_logits_stay_finite():
    """Logits of 1e4: float32 without overflow, gradient included."""
    hidden, weight = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0]])
    logps, entropies = chunked_logps(hidden, weight, None, torch.tensor([0, 1]), entropy=True)
    (logps.sum() + entropies.sum()).backward()
    assert logps.tolist() == [0.0, -2e4]
    assert entropies.tolist() == [0.0, 0.0]
    assert torch.isfinite(hidden.grad).all()


def test_bf16_products_give_float32_results_and_gradients_in_the_weights_type():
    """Autocast: bf16 logits, normalised in float32; the master weights get float32 gradients."""
    hidden, weight, bias, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = chunked_logps(hidden, weight, bias, targets)
    logps.sum().backward()
    assert logps.dtype == weight.grad.dtype == hidden.grad.dtype == torch.float32
    torch.testing.assert_close(logps, full(hidden, weight, bias, targets)[0], rtol=0, atol=0.1)
    exact = [x.bfloat16() for x in (hidden, weight, bias)]
    rounded = F.linear(*exact).float().log_softmax(-1)[range(ROWS), targets]
    torch.testing.assert_close(logps, rounded, rtol=0, atol=1e-6)


class _LargestHeld(TorchDispatchMode):
    """The largest number of elements, in tensors with a vocabulary dimension, that are alive at once."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.alive, self.peak = vocabulary, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == self.vocabulary:
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.alive:
                    self.alive[storage.data_ptr()] = storage.nbytes() // x.element_size()
                    weakref.finalize(storage, self.alive.pop, storage.data_ptr(), None)
                self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_gradients_of_halves_do_not_depend_on_the_chunks():
    """Of bfloat16 the products of two chunks are kept, each for its own rows; one of four rows is computed again."""
    given = torch.randn(14, 8).bfloat16(), torch.randn(30, 8).bfloat16()
    targets, factors = torch.randint(30, (14,)), torch.randn(14)

    def gradients(chunk_rows: int) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        logps, _ = chunked_logps(*leaves, None, targets, chunk_rows=chunk_rows)
        return list(torch.autograd.grad((logps * factors).sum(), leaves))

    for whole, parts in zip(gradients(14), gradients(4), strict=True):
        torch.testing.assert_close(parts, whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [True, False])
def test_c18_only_a_few_chunks_of_logits_exist(entropy, dtype):
    """C18: over forward and backward of 64 rows in chunks of 4, only the temporaries of a chunk or two are alive."""
    vocabulary, rows = 1000, 64
    hidden = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))

    def peak(compute) -> int:
        with _LargestHeld(vocabulary) as held:
            logps, entropies = compute()
            (logps.sum() + (entropies.sum() if entropy else 0)).backward()
        return held.peak

    chunked = peak(lambda: chunked_logps(hidden, weight, None, targets, entropy=entropy, chunk_rows=4))
    assert 4 * vocabulary <= chunked <= 8 * 4 * vocabulary
    assert peak(lambda: full(hidden, weight, None, targets)) >= rows * vocabulary


def test_c18_the_default_chunk_is_bounded_by_bytes(monkeypatch):
    """C18: with a vocabulary of 1,000 in float32, a budget of 20,000 bytes is five rows at a time."""
    from rlhf.models import logps as module

    seen = []
    monkeypatch.setattr(module, "CHUNK_BYTES", 20_000)
    plain = module._parts
    monkeypatch.setattr(
        module, "_parts", lambda chunk, products: (seen.append(len(products)), plain(chunk, products))[1]
    )
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(1000, 8)
    chunked_logps(hidden, weight, None, torch.zeros(12, dtype=torch.long))[0].sum().backward()
    assert seen == [5, 5, 2] * 2


def test_parts_of_a_chunk_change_nothing(monkeypatch):
    """The rows of a chunk are summed three at a time or all at once: values and gradients are the same."""
    from rlhf.models import logps as module

    hidden, weight, targets = torch.randn(11, 8), torch.randn(20, 8), torch.randint(20, (11,))

    def compute(elements: int) -> list[torch.Tensor]:
        monkeypatch.setattr(module, "PART_ELEMENTS", elements)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logps, entropies = chunked_logps(*leaves, None, targets, entropy=True, chunk_rows=8)
        (logps.square() + entropies).sum().backward()
        return [logps, entropies, *(leaf.grad for leaf in leaves)]

    for found, expected in zip(compute(60), compute(10_000), strict=True):
        assert torch.equal(found, expected)


def test_a_second_backward_pass_gives_the_same_gradient():
    """The products kept for the first backward pass are written over there; the second computes them again."""
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    logps, _ = chunked_logps(hidden, weight, None, torch.randint(20, (7,)), chunk_rows=4)
    first = torch.autograd.grad(logps.square().sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logps.square().sum(), (hidden, weight))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
