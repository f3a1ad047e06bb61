"""What lies between the matrix products of a decoder layer, one pass over memory each, and what decoding is made of.

Compiled for the processor by numba and kept beside this file (or in numba's cache folder), so made once for a machine.
How tasks are given is told in `rlhf/models/compiled.py`.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from rlhf.models.compiled import (
    F32,
    ONE,
    OPTIONS,
    TASK,
    ZERO,
    as_double,
    begin,
    exp,
    floats,
    halves,
    ints_at,
    narrow,
    thread,
    threads,
    wide,
    words_at,
)


@njit(**OPTIONS)
def _scale_of(squares, width, eps):
    return F32(1 / math.sqrt(squares / width + eps))


@cfunc(TASK, **OPTIONS)
def normed(task):
    """x, weight, width, eps, out."""
    a, first, last = begin(task)
    width, eps = a[3], as_double(a[4])
    x, weight = floats(a[1], a[0], width), floats(a[2], 1, width)[0]
    out = halves(a[5], a[0], width)
    for t in range(first, last):
        squares = ZERO
        for i in range(width):
            squares += x[t, i] * x[t, i]
        scale = _scale_of(squares, width, eps)
        for i in range(width):
            out[t, i] = narrow(x[t, i] * scale * weight[i])


@cfunc(TASK, **OPTIONS)
def added_and_normed(task):
    """x, y (halves), weight, width, eps, total, out."""
    a, first, last = begin(task)
    width, eps = a[4], as_double(a[5])
    x, y, weight = floats(a[1], a[0], width), halves(a[2], a[0], width), floats(a[3], 1, width)[0]
    total, out = floats(a[6], a[0], width), halves(a[7], a[0], width)
    for t in range(first, last):
        squares = ZERO
        for i in range(width):
            both = x[t, i] + wide(y[t, i])
            total[t, i] = both
            squares += both * both
        scale = _scale_of(squares, width, eps)
        for i in range(width):
            out[t, i] = narrow(total[t, i] * scale * weight[i])


@cfunc(TASK, **OPTIONS)
def norm_backward(task):
    """grad (halves), x, weight, width, eps, residual gradient, out, one row of the weight's gradient a thread."""
    a, first, last = begin(task)
    width, eps = a[4], as_double(a[5])
    grad, x, weight = halves(a[1], a[0], width), floats(a[2], a[0], width), floats(a[3], 1, width)[0]
    residual, out = floats(a[6], a[0], width), floats(a[7], a[0], width)
    total = floats(a[8], threads(), width)[thread()]
    for i in range(width):
        total[i] = ZERO
    for t in range(first, last):
        squares, products = ZERO, ZERO
        for i in range(width):
            squares += x[t, i] * x[t, i]
            products += wide(grad[t, i]) * weight[i] * x[t, i]
        scale = _scale_of(squares, width, eps)
        mean = products * scale * scale / F32(width)
        for i in range(width):
            g = wide(grad[t, i])
            total[i] += g * x[t, i] * scale
            out[t, i] = residual[t, i] + (g * weight[i] - x[t, i] * mean) * scale


@cfunc(TASK, **OPTIONS)
def gated(task):
    """gate and up (halves, 2 width), width, out (halves)."""
    a, first, last = begin(task)
    width = a[2]
    packed, out = halves(a[1], a[0], 2 * width), halves(a[3], a[0], width)
    for t in range(first, last):
        for i in range(width):
            gate = wide(packed[t, i])
            silu = narrow(gate / (ONE + exp(-gate)))
            out[t, i] = narrow(wide(silu) * wide(packed[t, width + i]))


@cfunc(TASK, **OPTIONS)
def gated_backward(task):
    """gate and up (halves, 2 width), grad (halves), width, out (halves, 2 width)."""
    a, first, last = begin(task)
    width = a[3]
    packed, grad, out = halves(a[1], a[0], 2 * width), halves(a[2], a[0], width), halves(a[4], a[0], 2 * width)
    for t in range(first, last):
        for i in range(width):
            gate, up, g = wide(packed[t, i]), wide(packed[t, width + i]), wide(grad[t, i])
            sigmoid = ONE / (ONE + exp(-gate))
            out[t, i] = narrow(g * up * sigmoid * (ONE + gate * (ONE - sigmoid)))
            out[t, width + i] = narrow(g * gate * sigmoid)


@cfunc(TASK, **OPTIONS)
def rotated(task):
    """packed (halves), cosines, sines, heads, kv heads, size, scaling, q, k, v (halves).

    Of a row's heads (queries, keys, values) the first two kinds are rotated; q is (kv heads, rows, group, size), k and
    v (kv heads, rows, size).
    """
    a, first, last = begin(task)
    rows, heads, kv_heads, size, scaling = a[0], a[4], a[5], a[6], F32(as_double(a[7]))
    group, half = heads // kv_heads, size // 2
    packed = halves(a[1], rows * (heads + 2 * kv_heads), size)
    cos, sin = floats(a[2], rows, size), floats(a[3], rows, size)
    q, k, v = (
        halves(a[8], kv_heads * rows * group, size),
        halves(a[9], kv_heads * rows, size),
        halves(a[10], kv_heads * rows, size),
    )
    for t in range(first, last):
        here = t * (heads + 2 * kv_heads)
        for h in range(heads):
            x, out = packed[here + h], q[((h // group) * rows + t) * group + h % group]
            for i in range(half):
                out[i] = narrow((wide(x[i]) * cos[t, i] + wide(x[i + half]) * sin[t, i]) * scaling)
                out[i + half] = narrow((wide(x[i + half]) * cos[t, i + half] + wide(x[i]) * sin[t, i + half]) * scaling)
        for h in range(kv_heads):
            x, out = packed[here + heads + h], k[h * rows + t]
            for i in range(half):
                out[i] = narrow(wide(x[i]) * cos[t, i] + wide(x[i + half]) * sin[t, i])
                out[i + half] = narrow(wide(x[i + half]) * cos[t, i + half] + wide(x[i]) * sin[t, i + half])
            x, out = packed[here + heads + kv_heads + h], v[h * rows + t]
            for i in range(size):
                out[i] = x[i]


@cfunc(TASK, **OPTIONS)
def rotated_backward(task):
    """Gradients of q (halves), k and v (floats); cosines, sines, heads, kv heads, size, scaling, out: see `rotated`."""
    a, first, last = begin(task)
    rows, heads, kv_heads, size, scaling = a[0], a[6], a[7], a[8], F32(as_double(a[9]))
    group, half = heads // kv_heads, size // 2
    q, k, v = (
        halves(a[1], kv_heads * rows * group, size),
        floats(a[2], kv_heads * rows, size),
        floats(a[3], kv_heads * rows, size),
    )
    cos, sin = floats(a[4], rows, size), floats(a[5], rows, size)
    packed = halves(a[10], rows * (heads + 2 * kv_heads), size)
    for t in range(first, last):
        here = t * (heads + 2 * kv_heads)
        for h in range(heads):
            out, g = packed[here + h], q[((h // group) * rows + t) * group + h % group]
            for i in range(half):
                one, other = wide(g[i]) * scaling, wide(g[i + half]) * scaling
                out[i] = narrow(one * cos[t, i] + other * sin[t, i + half])
                out[i + half] = narrow(other * cos[t, i + half] + one * sin[t, i])
        for h in range(kv_heads):
            out, g = packed[here + heads + h], k[h * rows + t]
            for i in range(half):
                out[i] = narrow(g[i] * cos[t, i] + g[i + half] * sin[t, i + half])
                out[i + half] = narrow(g[i + half] * cos[t, i + half] + g[i] * sin[t, i])
            out, g = packed[here + heads + kv_heads + h], v[h * rows + t]
            for i in range(size):
                out[i] = narrow(g[i])


@njit(inline="always")
def _attended(q, keys, values, scores, into, out, size):
    """One query's attention: floats, (n, size) halves twice, floats (n,) and (size,) to work in, the result."""
    count, whole = len(keys), len(keys) // 4 * 4
    for j in range(0, whole, 4):
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for i in range(size):
            s0 += q[i] * wide(keys[j, i])
            s1 += q[i] * wide(keys[j + 1, i])
            s2 += q[i] * wide(keys[j + 2, i])
            s3 += q[i] * wide(keys[j + 3, i])
        scores[j], scores[j + 1], scores[j + 2], scores[j + 3] = s0, s1, s2, s3
    for j in range(whole, count):
        s0 = ZERO
        for i in range(size):
            s0 += q[i] * wide(keys[j, i])
        scores[j] = s0
    top, total = scores[0], ZERO
    for j in range(count):
        top = scores[j] if scores[j] > top else top
    for j in range(count):
        scores[j] = exp(scores[j] - top)
        total += scores[j]
    for i in range(size):
        into[i] = ZERO
    for j in range(0, whole, 4):
        w0, w1, w2, w3 = scores[j], scores[j + 1], scores[j + 2], scores[j + 3]
        for i in range(size):
            first = w0 * wide(values[j, i]) + w1 * wide(values[j + 1, i])
            into[i] += first + (w2 * wide(values[j + 2, i]) + w3 * wide(values[j + 3, i]))
    for j in range(whole, count):
        for i in range(size):
            into[i] += scores[j] * wide(values[j, i])
    for i in range(size):
        out[i] = narrow(into[i] / total)


@cfunc(TASK, **OPTIONS)
def decoded(task):
    """Sequences, kv heads, group, size, q, k, v, keys, values, room, starts, length, window, out, scratch.

    A row is a key head of a sequence; scratch: room + 2 size floats a thread.
    """
    a, first, last = begin(task)
    num, kv_heads, group, size, room, length, window = a[1], a[2], a[3], a[4], a[10], a[12], a[13]
    q, k, v = (
        halves(a[5], kv_heads * num * group, size),
        halves(a[6], kv_heads * num, size),
        halves(a[7], kv_heads * num, size),
    )
    keys, values, out = (
        halves(a[8], a[0] * room, size),
        halves(a[9], a[0] * room, size),
        halves(a[14], a[0] * group, size),
    )
    starts = carray(ints_at(a[11]), (num,))
    scratch = floats(a[15], threads(), room + 2 * size)[thread()]
    scores, query, into = scratch[:room], scratch[room : room + size], scratch[room + size :]
    for row in range(first, last):
        b, h = row // kv_heads, row % kv_heads
        new, oldest = row * room + length - 1, row * room + max(starts[b], length - window)
        for i in range(size):
            keys[new, i] = k[h * num + b, i]
            values[new, i] = v[h * num + b, i]
        for g in range(group):
            for i in range(size):
                query[i] = wide(q[(h * num + b) * group + g, i])
            to = out[row * group + g]
            if size == 64:  # the common size: its loops are unrolled
                _attended(query, keys[oldest : new + 1], values[oldest : new + 1], scores, into, to, 64)
            else:
                _attended(query, keys[oldest : new + 1], values[oldest : new + 1], scores, into, to, size)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_TILE, _ROWS, _TILES = 16, 8, 2
"""Columns of a tile of a product, one register of float32 sums; rows and tiles that are summed up at once."""


@intrinsic
def _tile_product(_, x, packed, following, pairs, out):
    """8 x 32 float32 sums over `pairs` pairs of bfloat16, by the instruction that multiplies and adds two at once.

    Addresses: of x, for each pair of columns those of 8 rows; of two tiles, one after the other; of those whose way
    from memory begins now; of the sums.
    """

    def emit(context, builder, signature, args):
        x, packed, ahead, pairs, out = args
        word, index = ir.IntType(32), ir.IntType(64)
        sums, words = ir.VectorType(ir.FloatType(), _TILE), ir.VectorType(word, _TILE)
        pairs_of = ir.VectorType(_BFloat(), 2 * _TILE)
        kind = ir.FunctionType(sums, [sums, pairs_of, pairs_of])
        multiply_add = get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")

        def address(base, offset, element):
            return builder.inttoptr(builder.add(base, offset), element.as_pointer())

        before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(body)
        builder.position_at_end(body)
        k = builder.phi(index)
        totals = [[builder.phi(sums) for _ in range(_TILES)] for _ in range(_ROWS)]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), word, word, word])
        prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        line, tile_bytes, weights = builder.shl(k, index(6)), builder.shl(pairs, index(6)), []
        for i in range(_TILES):
            place = builder.add(line, builder.mul(index(i), tile_bytes))
            weights.append(builder.bitcast(builder.load(address(packed, place, words), align=4), pairs_of))
            builder.call(prefetch, [address(ahead, place, ir.IntType(8)), word(0), word(2), word(1)])
        found = []
        for m in range(_ROWS):
            pair = builder.load(address(x, builder.add(builder.shl(k, index(5)), index(4 * m)), word), align=4)
            one = builder.insert_element(ir.Constant(words, ir.Undefined), pair, word(0))
            everywhere = builder.bitcast(builder.shuffle_vector(one, one, ir.Constant(words, [0] * _TILE)), pairs_of)
            found.append([builder.call(multiply_add, [totals[m][i], everywhere, weights[i]]) for i in range(_TILES)])
        following = builder.add(k, index(1))
        k.add_incoming(index(0), before)
        k.add_incoming(following, body)
        for m in range(_ROWS):
            for i in range(_TILES):
                totals[m][i].add_incoming(ir.Constant(sums, [0.0] * _TILE), before)
                totals[m][i].add_incoming(found[m][i], body)
        builder.cbranch(builder.icmp_signed("<", following, pairs), body, after)
        builder.position_at_end(after)
        for m in range(_ROWS):
            for i in range(_TILES):
                place = index(4 * _TILE * (m * _TILES + i))
                builder.store(found[m][i], address(out, place, sums), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit


@cfunc(TASK, **OPTIONS)
def packed_tiles(task):
    """A float32 matrix, its width, out (halves).

    A row is 16 rows of the matrix: for each pair of columns, the pair of every row.
    """
    a, first, last = begin(task)
    width = a[2]
    matrix, out = floats(a[1], a[0] * _TILE, width), halves(a[3], a[0] * (width // 2), 2 * _TILE)
    for tile in range(first, last):
        for m in range(_TILE):
            row = matrix[tile * _TILE + m]
            for k in range(width // 2):
                to = out[tile * (width // 2) + k]
                to[2 * m] = narrow(row[2 * k])
                to[2 * m + 1] = narrow(row[2 * k + 1])


@cfunc(TASK, **OPTIONS)
def product(task):
    """Rows of x, width, x (halves), packed, bias (floats, or 0), out (halves), scratch.

    A row is two tiles of the packed weight.
    """
    a, first, last = begin(task)
    num, width, columns = a[1], a[2], _TILES * _TILE
    outputs, parts, pairs = a[0] * columns, (num + _ROWS - 1) // _ROWS, width // 2
    part_bytes, tiles_bytes = pairs * 4 * _ROWS, pairs * 4 * columns
    x, out, bias = carray(words_at(a[3]), (num, pairs)), halves(a[6], num, outputs), floats(a[5], 1, outputs)[0]
    # Each thread lays the few rows of x out for itself, and has room for the sums after them.
    laid_out = a[7] + thread() * (parts * part_bytes + 4 * _ROWS * columns)
    to = carray(words_at(laid_out), (parts, pairs, _ROWS))
    for row in range(num):
        for k in range(pairs):
            to[row // _ROWS, k, row % _ROWS] = x[row, k]
    address = laid_out + parts * part_bytes
    sums = floats(address, _ROWS, columns)
    for tiles in range(first, last):
        for i in range(parts):
            here = a[4] + tiles * tiles_bytes
            ahead = here + tiles_bytes if i == 0 and tiles + 1 < last else here
            _tile_product(laid_out + i * part_bytes, here, ahead, pairs, address)
            for m in range(min(_ROWS, num - i * _ROWS)):
                for j in range(columns):
                    total = sums[m, j] + bias[tiles * columns + j] if a[5] else sums[m, j]
                    out[i * _ROWS + m, tiles * columns + j] = narrow(total)
