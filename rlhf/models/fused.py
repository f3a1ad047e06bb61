"""The kernels of `rlhf/models/kernels.py` and of tiles as functions of tensors.

Norms, rotation, gating and their gradients cost little arithmetic and much memory traffic: as torch operations each
reads and writes whole tensors three to eight times. Here each is one pass, for bfloat16 products beside a float32
residual stream (`bf16-mixed` on a CPU). Where they cannot run (`rlhf/models/runtime.py`), `usable` says so and layers
run as torch operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.models.runtime import kernels, run, tile_attention, tiles
from rlhf.trees.forest import Forest

Turn = tuple[Tensor, Tensor]
"""(T, 1, D) cosines of the positions, and sines whose first half is negated."""


def usable(residual: torch.dtype, products: torch.dtype, device: torch.device) -> bool:
    """Whether layers with this residual stream, these products, on this device run through the kernels."""
    kinds = residual == torch.float32 and products == torch.bfloat16 and device.type == "cpu"
    return kinds and kernels() is not None


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(T, H) bfloat16: the root-mean-square norm of a float32 (T, H) times its weight."""
    x, (rows, width) = x.contiguous(), x.shape
    out = x.new_empty(rows, width, dtype=torch.bfloat16)
    run(kernels().normed, rows, x.numel(), x, weight, width, eps, out)
    return out


def added(x: Tensor, y: Tensor) -> Tensor:
    """(T, H) float32 x + y, with y bfloat16."""
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    run(kernels().added, len(x), x.numel(), x, y, x.shape[1], out)
    return out


def add_to(total: Tensor, part: Tensor) -> None:
    """Add bfloat16 to a contiguous float32 tensor of the same shape, in place."""
    part, width = part.contiguous(), part.shape[-1]
    run(kernels().added, part.numel() // width, part.numel(), total, part, width, total)


def added_and_normed(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(T, H) float32 x + y, with y bfloat16, and its norm as in `normed`."""
    x, y, (rows, width) = x.contiguous(), y.contiguous(), x.shape
    total, out = torch.empty_like(x), torch.empty_like(y)
    run(kernels().added_and_normed, rows, x.numel(), x, y, weight, width, eps, total, out)
    return total, out


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (T, H) and (H,) of a norm's input and weight, to the first of which `residual` (T, H) is added.

    Args:
        grad: (T, H) bfloat16, of the norm's output; x: (T, H) float32, its input.
    """
    (rows, width), threads = x.shape, torch.get_num_threads()
    grad, x, residual = grad.contiguous(), x.contiguous(), residual.contiguous()
    out, weights = torch.empty_like(x), x.new_zeros(threads, width)
    run(kernels().norm_backward, rows, x.numel(), grad, x, weight, width, eps, residual, out, weights)
    return out, weights.sum(0)


def gated(gate_up: Tensor) -> Tensor:
    """(T, F) silu(gate) * up of bfloat16 (T, 2 F)."""
    gate_up, (rows, double) = gate_up.contiguous(), gate_up.shape
    out = gate_up.new_empty(rows, double // 2)
    run(kernels().gated, rows, gate_up.numel(), gate_up, double // 2, out)
    return out


def gated_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """(T, 2 F) gradient of `gated`'s input from that of its output, bfloat16."""
    (rows, width), grad = grad.shape, grad.contiguous()
    out = torch.empty_like(gate_up)
    run(kernels().gated_backward, rows, gate_up.numel(), gate_up, grad, width, out)
    return out


def rotated(packed: Tensor, turn: Turn, kv_heads: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned to their positions, heads first.

    Args:
        packed: (T, heads + 2 kv_heads, D) bfloat16: queries, keys and values.
        turn: float32.
        scaling: factor of the queries.

    Returns:
        (kv_heads, T, heads / kv_heads, D), and (kv_heads, T, D) twice.
    """
    rows, all_heads, size = packed.shape
    heads, (cos, sin) = all_heads - 2 * kv_heads, (part.contiguous() for part in turn)
    q = packed.new_empty(kv_heads, rows, heads // kv_heads, size)
    k, v = packed.new_empty(kv_heads, rows, size), packed.new_empty(kv_heads, rows, size)
    run(kernels().rotated, rows, packed.numel(), packed.contiguous(), cos, sin, heads, kv_heads, size, scaling, q, k, v)
    return q, k, v


def rotated_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, turn: Turn, scaling: float) -> Tensor:
    """(T, heads + 2 kv_heads, D) gradient of `rotated`'s input; grad_q bfloat16, those of k and v float32."""
    kv_heads, rows, group, size = grad_q.shape
    heads, (cos, sin) = kv_heads * group, (part.contiguous() for part in turn)
    out = grad_q.new_empty(rows, heads + 2 * kv_heads, size)
    of = grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()
    run(kernels().rotated_backward, rows, out.numel(), *of, cos, sin, heads, kv_heads, size, scaling, out)
    return out


def logps(products: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of `targets` (R,) under logits `scale` * products, bfloat16 (R, V).

    Returns:
        (R,) float32 three times: these; logs of the sums of exponentials; entropies in nats.
    """
    rows, width = products.shape
    found = tuple(products.new_empty(rows, dtype=torch.float32) for _ in range(3))
    given = products.contiguous(), targets.contiguous(), width, scale
    run(kernels().logps, rows, products.numel(), *given, *found)
    return found


def logps_backward(
    products: Tensor, targets: Tensor, scale: float, normalisers: Tensor, entropies: Tensor, *grads: Tensor
) -> None:
    """Put the gradient of `products`, contiguous, in their place.

    Args:
        normalisers, entropies: of `logps`, contiguous; grads: (R,) float32, of its log-probabilities and entropies.
    """
    (rows, width), grads = products.shape, [grad.contiguous() for grad in grads]
    given = products, targets.contiguous(), width, scale, normalisers, entropies, *grads
    run(kernels().logps_backward, rows, products.numel(), *given)


def decoded(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, starts: Tensor, length: int, window: int | None
) -> Tensor:
    """Attention of one new token of each of B sequences to those before; its key and value join them.

    Args:
        q, k, v: of `rotated`, with T = B.
        keys, values: (B * kv_heads, room, D) bfloat16; sequence b's stand in columns starts[b] .. length - 2.
        starts: (B,) int64.
        window: keys that a query sees, its own included; None: all.

    Returns:
        (B, heads * D) bfloat16.
    """
    kv_heads, num, group, size = q.shape
    room, threads = keys.shape[1], torch.get_num_threads()
    out = q.new_empty(num, kv_heads * group * size)
    scratch = torch.empty(threads, room + 2 * size)
    sizes = num, kv_heads, group, size
    run(
        kernels().decoded,
        num * kv_heads,
        num * kv_heads * length * size,
        *sizes,
        q,
        k,
        v,
        keys,
        values,
        room,
        starts,
        length,
        window or length,
        out,
        scratch,
    )
    return out


COLUMNS = 32
"""`product` makes so many outputs at once; matrices have a multiple of them."""
FEW_ROWS = 32
"""Rows up to which `product` is faster than oneDNN's, whose loads and sums wait for each other there."""


def multiplies(weights: torch.dtype, products: torch.dtype, device: torch.device) -> bool:
    """Whether `product` serves these weights: the processor has the instruction that it is made of."""
    return usable(weights, products, device) and tiles() is not None


def packed_tiles(matrix: Tensor) -> Tensor:
    """A float32 (outputs, inputs) matrix as bfloat16 of the same shape, laid out for `product`.

    Outputs are a multiple of `COLUMNS`, inputs even; so matrices of the same inputs may be put end to end.
    """
    outputs, inputs = matrix.shape
    out = matrix.new_empty(outputs, inputs, dtype=torch.bfloat16)
    run(tiles().packed_tiles, outputs // 16, matrix.numel(), matrix.contiguous(), inputs, out)
    return out


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """(T, outputs) bfloat16 x W^T + b for few rows: the weights go by once, about as fast as memory gives them.

    Args:
        x: (T, inputs) bfloat16; packed: W of `packed_tiles`; bias: (outputs,) float32.
    """
    (rows, inputs), outputs = x.shape, len(packed)
    out = x.new_empty(rows, outputs)
    # Of each thread: the sums of 8 rows and 32 columns, and up to 8 rows of x.
    scratch = torch.empty(torch.get_num_threads() * (8 * 32 + 8 * inputs // 2))
    given = rows, inputs, x.contiguous(), packed, 0 if bias is None else bias, out, scratch
    run(tiles().product, outputs // COLUMNS, outputs * inputs, *given)
    return out


LONGEST_PATH = 512
"""Tokens from root to leaf up to which `attended` serves; over longer paths oneDNN's products are the faster ones."""


def attends(forest: Forest, size: int) -> bool:
    """Whether `attended` serves these trees and this size of heads, where `multiplies` says that it can run."""
    return size % COLUMNS == 0 and int(forest.positions.max()) < LONGEST_PATH


def attended(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> tuple[Tensor, Tensor]:
    """Tree attention of what `rotated` returns, for the forest's T tokens.

    Returns:
        (T, kv_heads, group, D) bfloat16; and (kv_heads, T, group) float32: log of the sum of each query's exponentials.
    """
    kv_heads, num, group, size = q.shape
    out, normalisers = q.new_empty(num, kv_heads, group, size), q.new_empty(q.shape[:3], dtype=torch.float32)
    keys = -(-_longest(forest) // 32) * 32
    words = keys * size + size * 4 + keys * 4 + 512 + keys * 8 + keys + 3 * keys // 32
    scratch = torch.empty(torch.get_num_threads(), words, dtype=torch.int32)
    given = *_places(forest), num, kv_heads, group, size, q, k, v, out, normalisers, scratch, words
    run(tile_attention().attended, forest.num_trees * kv_heads, q.numel() * keys, *given)
    return out, normalisers


def attended_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, normalisers: Tensor, forest: Forest
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attended`'s q (bfloat16), k and v (float32) from that of its output, (T, kv_heads, group, D)."""
    kv_heads, num, group, size = q.shape
    grad_q, grad_k, grad_v = torch.empty_like(q), *(torch.empty_like(x, dtype=torch.float32) for x in (k, v))
    keys, half_queries = -(-_longest(forest) // 32) * 32, -(-_longest(forest) * group // 8) * 4
    words = (
        3 * keys * size // 2
        + 2 * half_queries * size
        + size * 8
        + keys * 4
        + 768
        + keys
        + 3 * keys // 32
        + 3 * keys // 8
        + 16 * _pairs_seeing(forest, group)
    )
    scratch = torch.empty(torch.get_num_threads(), words, dtype=torch.int32)
    operands = q, k, v, out, normalisers, grad.contiguous(), grad_q, grad_k, grad_v
    given = *_places(forest), num, kv_heads, group, size, *operands, scratch, words
    run(tile_attention().attended_backward, forest.num_trees * kv_heads, q.numel() * keys, *given)
    return grad_q, grad_k, grad_v


KEYS = 32
"""Tokens of a block of the keys and values that `decoded_in_tiles` reads."""


def cached_in_tiles(k: Tensor, v: Tensor, lengths: list[int], num_samples: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Keys and values of prompts, laid out for `decoded_in_tiles`: N = prompts x samples sequences.

    Args:
        k, v: (kv_heads, T, D) bfloat16, the prompts of `lengths` end to end; D a multiple of `COLUMNS`.
        blocks: room for so many times `KEYS` tokens of each.

    Returns:
        (N * kv_heads, 2 * blocks, D / 2, 16, 2) and (N * kv_heads, D / 16, 16 * blocks, 16, 2) bfloat16, zero where
        there is no token.
    """
    (kv_heads, num, size), rows = k.shape, len(lengths) * num_samples * len(k)
    keys, values = k.new_empty(rows, 2 * blocks, size // 2, 16, 2), k.new_empty(rows, size // 16, 16 * blocks, 16, 2)
    stops = torch.tensor(lengths).cumsum(0)
    places = torch.stack([stops - torch.tensor(lengths), stops], 1)
    given = places, num_samples, kv_heads, size, num, k.contiguous(), v.contiguous(), blocks, keys, values
    run(tile_attention().cached, rows, keys.numel(), *given)
    return keys, values


def decoded_in_tiles(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int | None
) -> Tensor:
    """What `decoded` returns, from the keys and values of `cached_in_tiles`, which the new token's join.

    Args:
        lengths: (B,) int64 tokens of each sequence, the new one included.
    """
    kv_heads, num, group, size = q.shape
    blocks = keys.shape[1] // 2
    out = q.new_empty(num, kv_heads * group * size)
    words = size // 2 * 4 + blocks * 16 * 4 + 4 * 32 + blocks * 4 * 32
    scratch = torch.empty(torch.get_num_threads(), words, dtype=torch.int32)
    sizes = num, kv_heads, group, size
    given = *sizes, q, k, v, blocks, keys, values, lengths, window or blocks * KEYS, out, scratch, words
    run(tile_attention().decoded, num * kv_heads, keys.numel(), *given)
    return out


def _pairs_seeing(forest: Forest, group: int) -> int:
    """Pairs of queries from 8 keys to the end of their subtrees, over all keys of a tree: the most of any tree."""
    key = ("pairs seeing", group)
    if key not in forest._cache:
        found = [0]
        for start, stop in forest.trees:
            ends = F.pad(forest.end[start:stop] - start, (0, -(stop - start) % 32)).view(-1, 8).amax(1)
            begins = torch.arange(len(ends)) * 8 * group // 2
            found.append(int(((ends * group + 7) // 8 * 4 - begins).clamp(min=0).sum()))
        forest._cache[key] = max(found)
    return forest._cache[key]


def _longest(forest: Forest) -> int:
    return max(stop - start for start, stop in forest.trees)


def _places(forest: Forest) -> tuple[Tensor, Tensor]:
    """(trees, 2) starts and stops, and (T,) ends of the tokens' subtrees, kept on the forest."""
    if "places" not in forest._cache:
        forest._cache["places"] = torch.tensor(forest.trees, dtype=torch.long), forest.end.contiguous()
    return forest._cache["places"]
