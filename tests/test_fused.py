"""The compiled kernels beside torch's operations: the same numbers to bfloat16's rounding; what is not finite shows."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from rlhf.models import fused, plain, products, runtime
from rlhf.trees.forest import Forest, Tree
from rlhf.trees.masks import dense_blocks

CPU = torch.device("cpu")
EPS = 1e-5
WIDTHS = (8, 48, 65)  # below, at and beside what a register holds

pytestmark = pytest.mark.skipif(
    not fused.usable(torch.float32, torch.bfloat16, CPU), reason="torch has no GNU OpenMP here, or numba is missing"
)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def near(found, expected, *, steps: float = 1.0) -> None:
    """Within so many roundings to bfloat16 of the largest value."""
    for a, b in zip(found, expected, strict=True):
        tolerance = steps * 2**-8 * b.float().abs().max().item()
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 7, 400])
def test_norms(rows, width, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, y, weight = drawn(rows, width, scale=3), drawn(rows, width, seed=1).bfloat16(), drawn(width) + 1.5
        near([fused.normed(x, weight, EPS)], [plain.normed(x, weight, EPS)])
        total, states = fused.added_and_normed(x, y, weight, EPS)
        assert torch.equal(total, x + y)
        near([states], [plain.normed(x + y, weight, EPS)])
        grad, residual = drawn(rows, width, seed=2).bfloat16(), drawn(rows, width, seed=3)
        found = fused.norm_backward(grad, x, weight, EPS, residual)
        expected = plain.norm_backward(grad, x.double(), weight.double(), EPS, residual.double())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_the_gradient_of_a_norm_is_autograds():
    x, weight = drawn(5, 24).double().requires_grad_(), (drawn(24) + 2).double().requires_grad_()
    grad, residual = drawn(5, 24, seed=1).double(), drawn(5, 24, seed=2).double()
    expected = torch.autograd.grad((F.rms_norm(x, (24,), weight, EPS) * grad).sum() + (x * residual).sum(), (x, weight))
    found = plain.norm_backward(grad, x.detach(), weight.detach(), EPS, residual)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("width", WIDTHS)
def test_gating(width):
    gate_up, grad = drawn(37, 2 * width, scale=4).bfloat16(), drawn(37, width, seed=1).bfloat16()
    near([fused.gated(gate_up)], [plain.gated(gate_up)])
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    (expected,) = torch.autograd.grad((F.silu(gate) * up * grad.double()).sum(), exact)
    near([fused.gated_backward(gate_up, grad)], [expected])
    near([plain.gated_backward(gate_up.double(), grad.double())], [expected], steps=1e-6)


def test_gating_of_extremes():
    """A far negative gate gives 0, a far positive one itself."""
    gate = torch.tensor([[-1e4, -200.0, 200.0, 1e4, 0.0]])
    found = fused.gated(torch.cat([gate, torch.ones_like(gate)], 1).bfloat16())
    expected = torch.tensor([[0.0, 0.0, 200.0, 1e4, 0.0]]).bfloat16()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-30)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 16), (2, 1, 10)])
def test_rotation(heads, kv_heads, size):
    rows, scaling = 21, 0.3
    packed = drawn(rows, heads + 2 * kv_heads, size).bfloat16()
    angles = drawn(rows, size // 2, scale=3)
    cos, sin = angles.cos(), angles.sin()
    turn = torch.cat([cos, cos], 1)[:, None], torch.cat([-sin, sin], 1)[:, None]
    found = fused.rotated(packed, turn, kv_heads, scaling)
    near(found, plain.rotated(packed, turn, kv_heads, scaling), steps=2)
    wide = tuple(part.double() for part in turn)
    exact = plain.rotated(packed.double(), wide, kv_heads, scaling)
    grads = [drawn(*x.shape, seed=5) for x in exact]
    grads[0] = grads[0].bfloat16()
    back = plain.rotated_backward(*(g.double() for g in grads), wide, scaling)
    # A linear map and its transpose give the same product.
    product = sum((x * g.double()).sum() for x, g in zip(exact, grads, strict=True))
    torch.testing.assert_close((packed.double() * back).sum(), product)
    near([fused.rotated_backward(*grads, turn, scaling)], [back])


@pytest.mark.parametrize("size", [64, 16, 10])
@pytest.mark.parametrize("window", [None, 7])
def test_decoding(size, window):
    kv_heads, group, num, room, length = 2, 3, 5, 40, 33
    q, k, v = (drawn(kv_heads, num, *rest, size, seed=i).bfloat16() for i, rest in enumerate([(group,), (), ()]))
    keys, values = (drawn(num * kv_heads, room, size, seed=i, scale=2).bfloat16() for i in (3, 4))
    starts = torch.tensor([0, 5, 31, 32, 17])
    expected_keys, expected_values = keys.clone(), values.clone()
    for cache, new in ((expected_keys, k), (expected_values, v)):
        cache.view(num, kv_heads, room, size)[:, :, length - 1] = new.transpose(0, 1)
    rows = []
    for b in range(num):
        first = max(int(starts[b]), length - (window or length))
        for h in range(kv_heads):
            of_row = slice(first, length)
            scores = q[h, b].double() @ expected_keys[b * kv_heads + h, of_row].double().T
            rows.append(scores.softmax(-1) @ expected_values[b * kv_heads + h, of_row].double())
    found = fused.decoded(q, k, v, keys, values, starts, length, window)
    near([found], [torch.stack(rows).view(num, -1)])
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize(("kv_heads", "group", "size"), [(3, 3, 64), (2, 1, 32), (1, 5, 96)])
@pytest.mark.parametrize("window", [None, 7, 33])
def test_decoding_in_tiles(kv_heads, group, size, window):
    needs_tiles()
    lengths, num_samples = [1, 5, 31, 32, 33, 70], 2
    num = len(lengths) * num_samples
    prompts = [drawn(kv_heads, sum(lengths), size, seed=i).bfloat16() for i in (1, 2)]
    buffers = fused.cached_in_tiles(*prompts, lengths, num_samples, 3)
    keys, values = ([part for part in x.split(lengths, 1) for _ in range(num_samples)] for x in prompts)
    places = torch.tensor(lengths).repeat_interleave(num_samples)
    for step in range(3):
        q, k, v = (
            drawn(kv_heads, num, *rest, size, seed=10 * step + i, scale=scale).bfloat16()
            for i, (rest, scale) in enumerate([((group,), 0.3), ((), 1.0), ((), 1.0)])
        )
        places = places + 1
        found = fused.decoded_in_tiles(q, k, v, *buffers, places, window)
        keys, values = (
            [torch.cat([a, x[:, i, None]], 1) for i, a in enumerate(of)] for of, x in ((keys, k), (values, v))
        )
        for i in range(num):
            seen = slice(max(0, int(places[i]) - (window or 1000)), None)
            weights = (q[:, i].double() @ keys[i][:, seen].double().mT).softmax(-1)
            near([found[i]], [(weights @ values[i][:, seen].double()).flatten()], steps=2)


@pytest.mark.parametrize("rows", [1, 8, 9, 23])
@pytest.mark.parametrize("biased", [False, True])
def test_products(rows, biased):
    needs_tiles()
    weights = [drawn(96, 34), drawn(32, 34, seed=1)]
    x, bias = drawn(rows, 34, seed=2).bfloat16(), drawn(128, seed=3) if biased else None
    packed = torch.cat([fused.packed_tiles(weight) for weight in weights])
    exact = x.double() @ torch.cat(weights).bfloat16().double().T + (0 if bias is None else bias.double())
    near([fused.product(x, packed, bias)], [exact])


FORESTS = {
    "one token": [(1,)],
    "chain": [(40, 7)],
    "branches": [(5, 3, 4), (1, 2, 2, 9), (33, 1, 40)],
    "empty segments": [(6, 0, 5), (3,)],
    "over a block": [(31, 2, 1), (64, 30, 35), (95,)],
    "many branches": [(45, *range(1, 40)), (70, 33, 64, 31, 90)],
}


@pytest.mark.parametrize(("kv_heads", "group", "size"), [(3, 3, 64), (2, 1, 32), (1, 5, 96)])
@pytest.mark.parametrize("trees", FORESTS)
def test_attention_of_trees(trees, kv_heads, group, size):
    """Nearer to exact arithmetic than bfloat16 products of blocks, which round what lies between."""
    needs_tiles()
    forest = Forest([Tree.of(*(torch.zeros(n, dtype=torch.long) for n in lengths)) for lengths in FORESTS[trees]])
    shape = kv_heads, forest.num_tokens
    q, k, v = drawn(*shape, group, size, scale=0.4), drawn(*shape, size, seed=100), drawn(*shape, size, seed=200)
    operands = [x.bfloat16() for x in (q, k, v)]
    grad = drawn(forest.num_tokens, kv_heads, group, size, seed=300).bfloat16()

    def in_blocks(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        given, blocks = [x.to(dtype) for x in operands], dense_blocks(forest, None, dtype)
        out, kept = products.attended(*given, blocks, keeps=True)
        return out, *products.attended_backward(grad.to(dtype), *given, out, kept, blocks)

    found, normalisers = fused.attended(*operands, forest)
    grads = fused.attended_backward(grad, *operands, found, normalisers, forest)
    for own, exact, rounded in zip((found, *grads), in_blocks(torch.float64), in_blocks(torch.bfloat16), strict=True):
        assert (own - exact).norm() <= (rounded - exact).norm() + 1e-5 * own.numel() ** 0.5


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("width", [1, 31, 512, 1601])
def test_log_probabilities(width, scale):
    """Values, entropies and both gradients, those of the same rounded numbers in float64."""
    rows = 5
    numbers, targets = drawn(rows, width, scale=4.0).bfloat16(), torch.arange(rows) % width
    exact = numbers.double().requires_grad_()
    log_probabilities = (scale * exact).log_softmax(-1)
    expected = log_probabilities[range(rows), targets], torch.special.entr(log_probabilities.exp()).sum(-1)
    logps, normalisers, entropies = fused.logps(numbers, targets, scale)
    for found, wanted in zip((logps, entropies), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=5e-6)
    grads = drawn(rows, seed=1), drawn(rows, seed=2)
    for of_entropy in (grads[1], torch.zeros(rows)):
        (wanted,) = torch.autograd.grad(expected, exact, (grads[0], of_entropy), retain_graph=True)
        found = numbers.clone()
        fused.logps_backward(found, targets, scale, normalisers, entropies, grads[0], of_entropy)
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=2e-6)


def test_log_probabilities_show_what_is_not_finite():
    numbers = drawn(4, 600).bfloat16()
    numbers[1, 5], numbers[2, 599], numbers[3, 7] = float("nan"), -float("nan"), float("inf")
    logps, normalisers, entropies = fused.logps(numbers, torch.zeros(4, dtype=torch.long), 1.0)
    for found in (logps, normalisers, entropies):
        assert found[0].isfinite()
        assert found[1:].isnan().all()
    fused.logps_backward(numbers, torch.zeros(4, dtype=torch.long), 1.0, normalisers, entropies, *torch.ones(2, 4))
    assert numbers[0].isfinite().all()
    assert numbers[1:].isnan().all()


def test_attention_says_what_it_does_not_serve():
    short, long = (Forest([Tree.of(torch.zeros(n, dtype=torch.long))]) for n in (9, fused.LONGEST_PATH + 1))
    assert fused.attends(short, 64)
    assert not fused.attends(short, 48)
    assert not fused.attends(long, 64)


def needs_tiles() -> None:
    if not fused.multiplies(torch.float32, torch.bfloat16, CPU):
        pytest.skip("the processor has no AVX512-BF16")


def test_what_is_not_finite_stays_so():
    x = drawn(3, 48)
    x[1, 5] = float("nan")
    assert fused.normed(x, torch.ones(48), EPS)[1].isnan().all()
    assert fused.normed(x, torch.ones(48), EPS)[::2].isfinite().all()
    gate_up = drawn(3, 48).bfloat16()
    gate_up[1, 5], gate_up[2, 30] = float("nan"), float("inf")
    found = fused.gated(gate_up)
    assert found[1, 5].isnan()
    assert not found[2, 6].isfinite()
    assert fused.gated_backward(gate_up, drawn(3, 24).bfloat16())[1, 5].isnan()
    q, k = drawn(1, 2, 1, 16).bfloat16(), drawn(1, 2, 16).bfloat16()
    q[0, 1] = float("nan")
    keys = drawn(2, 8, 16).bfloat16()
    found = fused.decoded(q, k, k, keys, keys.clone(), torch.zeros(2, dtype=torch.long), 5, None)
    assert found[1].isnan().all()
    assert found[0].isfinite().all()


def test_attention_of_trees_shows_what_is_not_finite():
    needs_tiles()
    forest = Forest([Tree.of(torch.zeros(n, dtype=torch.long)) for n in (5, 4)])
    q, k = drawn(1, 9, 1, 32).bfloat16(), drawn(1, 9, 32).bfloat16()
    k[0, 2, 3] = float("nan")
    out, normalisers = fused.attended(q, k, k, forest)
    assert out[2:5].isnan().all()
    assert out[5:].isfinite().all()  # another tree: another row
    grad = fused.attended_backward(torch.ones_like(out), q, k, k, out, normalisers, forest)[0]
    assert grad[0, 2:5].isnan().all()
    assert grad[0, 5:].isfinite().all()


def test_a_recording_runs_again_on_what_its_tensors_hold_then():
    x, y, weight = drawn(3, 48), drawn(3, 48, seed=1).bfloat16(), drawn(48)
    with runtime.recording() as made:
        total, states = fused.added_and_normed(x, y, weight, EPS)
        again = fused.normed(total, weight, EPS)
    fused.added(x, y)  # outside: no part of it
    x.copy_(drawn(3, 48, seed=2))
    expected = fused.added_and_normed(x, y, weight, EPS)
    made()
    assert all(map(torch.equal, (total, states, again), (*expected, expected[1])))


def test_threads_record_apart():
    x, weight, found = drawn(2, 8), torch.ones(8), []

    def beside() -> None:
        with runtime.recording() as made:
            found.append(fused.normed(x, weight, EPS))
            found.append(made)

    with runtime.recording() as mine:
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
    states, made = found
    states.zero_()
    mine()
    assert not states.any()
    made()
    assert states.any()


def test_without_the_compiler_layers_run_as_torch_operations(monkeypatch):
    monkeypatch.setattr(fused, "kernels", lambda: None)
    x = drawn(2, 8)
    assert plain.operations(x, torch.ones(8), torch.bfloat16) is plain
    assert not fused.multiplies(torch.float32, torch.bfloat16, CPU)


@pytest.mark.parametrize("fault", [ImportError("no numba"), RuntimeError("cannot cache function: no locator")])
def test_kernels_that_cannot_be_had_are_left_out(monkeypatch, recwarn, fault):
    """Silently where numba is missing; where it fails, a warning says why and what it costs."""

    def fail(*_):
        raise fault

    monkeypatch.setattr("llvmlite.binding.add_symbol", fail)
    assert runtime.kernels.__wrapped__() is None
    said = [str(warning.message) for warning in recwarn]
    assert [("no locator" in line and "longer" in line) for line in said] == [True] * isinstance(fault, RuntimeError)


def test_torch_on_another_runtime_has_none(monkeypatch):
    monkeypatch.setattr(runtime, "openmp", lambda: None)
    assert runtime.kernels.__wrapped__() is None


@pytest.mark.parametrize(
    ("residual", "weight", "products"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, torch.bfloat16),
    ],
)
def test_other_dtypes_run_as_torch_operations(residual, weight, products):
    assert plain.operations(torch.ones(2, 8, dtype=residual), torch.ones(8, dtype=weight), products) is plain
