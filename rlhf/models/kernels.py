"""What lies between the matrix products of a decoder layer and after its head, one pass over memory each, and what
decoding is made of.

Compiled for the processor by numba and kept beside this file (or in numba's cache folder), so made once for a machine.
How tasks are given is told in `rlhf/models/compiled.py`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, cfunc, njit

from rlhf.models.compiled import (
    F32,
    ONE,
    OPTIONS,
    TASK,
    ZERO,
    as_double,
    barrier,
    begin,
    call,
    exp,
    floats,
    halves,
    ints_at,
    narrow,
    thread,
    threads,
    wide,
)


@cfunc(TASK, **OPTIONS)
def in_turn(task):
    """So many kernels: the address of each and that of its task."""
    count = carray(task, (1,))[0]
    a = carray(task, (1 + 2 * count,))
    for i in range(count):
        call(a[1 + 2 * i], a[2 + 2 * i])
        barrier()


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
def added(task):
    """x, y (halves), width, out."""
    a, first, last = begin(task)
    width = a[3]
    x, y, out = floats(a[1], a[0], width), halves(a[2], a[0], width), floats(a[4], a[0], width)
    for t in range(first, last):
        for i in range(width):
            out[t, i] = x[t, i] + wide(y[t, i])


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


SUMMED = 512
"""Exponentials that are summed in float32 before they join a float64 sum."""


@cfunc(TASK, **OPTIONS)
def logps(task):
    """logits (halves), targets, width, scale; log-probabilities, normalisers, entropies.

    A row's logits are `scale` times its numbers.
    """
    a, first, last = begin(task)
    width, scale = a[3], F32(as_double(a[4]))
    logits, targets = halves(a[1], a[0], width), carray(ints_at(a[2]), (a[0],))
    out, normalisers, entropies = floats(a[5], 1, a[0])[0], floats(a[6], 1, a[0])[0], floats(a[7], 1, a[0])[0]
    for t in range(first, last):
        row = logits[t]
        largest = np.int16(-(2**15))
        for i in range(width):  # bfloat16 ordered as integers: many comparisons at once, and NaN is largest
            bits = np.int16(row[i])
            largest = max(largest, np.int16(bits ^ np.int16(np.int16(bits >> 15) & np.int16(0x7FFF))))
        bits = np.uint16(largest ^ np.int16(np.int16(largest >> 15) & np.int16(0x7FFF)))
        top, total, weighted = wide(bits) * scale, 0.0, 0.0
        for start in range(0, width, SUMMED):
            few, part, weighted_part = row[start : start + SUMMED], ZERO, ZERO
            for i in range(len(few)):
                x = wide(few[i]) * scale - top
                weight = exp(x)
                part += weight
                weighted_part += weight * x
            total += part
            weighted += weighted_part
        normaliser = top + F32(math.log(total))
        normalisers[t] = normaliser
        out[t] = wide(row[targets[t]]) * scale - normaliser
        entropies[t] = F32(math.log(total) - weighted / total)


@cfunc(TASK, **OPTIONS)
def logps_backward(task):
    """What `logps` has up to the scale; normalisers, entropies; the gradients of log-probabilities and entropies.

    The gradient of the numbers takes their place.
    """
    a, first, last = begin(task)
    width, scale = a[3], F32(as_double(a[4]))
    logits, targets = halves(a[1], a[0], width), carray(ints_at(a[2]), (a[0],))
    normalisers, entropies = floats(a[5], 1, a[0])[0], floats(a[6], 1, a[0])[0]
    grads, entropy_grads = floats(a[7], 1, a[0])[0], floats(a[8], 1, a[0])[0]
    for t in range(first, last):
        row, normaliser, grad, of_entropy = logits[t], normalisers[t], grads[t], entropy_grads[t]
        target, entropy = targets[t], entropies[t]
        logp = wide(row[target]) * scale - normaliser
        of_target = grad - exp(logp) * (grad + of_entropy * (logp + entropy))
        if of_entropy == ZERO:
            for i in range(width):
                row[i] = narrow(exp(wide(row[i]) * scale - normaliser) * (-grad * scale))
        else:
            for i in range(width):
                x = wide(row[i]) * scale - normaliser
                # dH/dlogit = -p (log p + H)
                row[i] = narrow(exp(x) * (-grad - of_entropy * (x + entropy)) * scale)
        row[target] = narrow(of_target * scale)


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
