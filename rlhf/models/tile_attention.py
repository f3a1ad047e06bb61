"""Attention by the products of `rlhf/models/tiles.py`: of trees, forward and backward, and of decoding.

Keys are columns of tiles, pairs of values their rows; queries and weights are left factors of 8 rows, or of 4.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, cfunc, njit

from rlhf.models.compiled import (
    F32,
    OPTIONS,
    TASK,
    ZERO,
    begin,
    exp,
    floats,
    floats_at,
    halves,
    ints_at,
    narrow,
    numbers_at,
    thread,
    threads,
    wide,
    words_at,
)
from rlhf.models.tiles import FEW, ROWS, TILE, few_rows_product, pairs_product, tile_product


@njit(**OPTIONS)
def _rows_as_columns(source, base, count, to):
    """Rows base .. base + count of words (N, pairs) as columns of tiles (tiles, pairs, 16), zero after the last."""
    tiles, pairs, _ = to.shape
    for r in range(tiles * TILE):
        if r < count:
            row = source[base + r]
            for k in range(pairs):
                to[r // TILE, k, r % TILE] = row[k]
        else:
            for k in range(pairs):
                to[r // TILE, k, r % TILE] = 0


@njit(**OPTIONS)
def _pair(low, high):
    """Two bfloat16 as one word, the first in its lower half."""
    return np.uint32(low) | (np.uint32(high) << np.uint32(16))


@njit(**OPTIONS)
def _pairs_of_rows(source, base, group, jump, count, to):
    """Rows of halves (N, size) as pairs in tiles of words (size / 16, pairs, 16), zero after the last; as above."""
    tiles, pairs, _ = to.shape
    for p in range(pairs):
        r = 2 * p
        low = source[base + min(r, count - 1) // group * jump + min(r, count - 1) % group]
        high = source[base + min(r + 1, count - 1) // group * jump + min(r + 1, count - 1) % group]
        of_low, of_high = np.uint32(0xFFFF) * np.uint32(r < count), np.uint32(0xFFFF) * np.uint32(r + 1 < count)
        for tile in range(tiles):
            out = to[tile, p]
            for i in range(TILE):
                out[i] = _pair(low[tile * TILE + i] & of_low, high[tile * TILE + i] & of_high)


@njit(**OPTIONS)
def _ends_within(ends, start, count, until, closed, opened):
    """Where the subtrees of a tree's keys end, counted from its start, 0 after the last key: (blocks * 32,) in `until`;
    of each 32 keys that are there the least, (blocks,) in `closed`, and the largest in `opened`."""
    for c in range(len(closed)):
        closed[c], opened[c] = count, 0
        for j in range(c * 32, c * 32 + 32):
            until[j] = ends[start + j] - start if j < count else 0
            opened[c] = max(opened[c], until[j])
            if j < count:
                closed[c] = min(closed[c], until[j])


@njit(**OPTIONS)
def _blocks_seen(opened, first, rows, group, which):
    """How many blocks of 32 keys any of `rows` queries sees, and in `which` their numbers: the others are of other
    branches, whole."""
    n = 0
    for c in range((first + rows - 1) // group // 32 + 1):
        if opened[c] > first // group:
            which[n] = c
            n += 1
    return n


@njit(**OPTIONS)
def _over_blocks(left, left_apart, right, right_apart, which, n, out, at_out, at_part):
    """(8, 32) sums over the n blocks of keys in `which`: `left` has a column for each of their keys, `right` the rows
    of all keys. `out` are the floats at `at_out`; those at `at_part` are to work in."""
    part = floats(at_part, ROWS, 32)
    start = 0
    while start < n:
        stop = start + 1
        while stop < n and which[stop] == which[stop - 1] + 1:
            stop += 1
        here, to = right + which[start] * 1024, at_part if start else at_out
        tile_product(left + start * 64, left_apart, here, right_apart, here, here, (stop - start) * 16, to)
        if start:
            for m in range(ROWS):
                for j in range(32):
                    out[m, j] += part[m, j]
        start = stop


@njit(**OPTIONS)
def _masked(scores, until, closed, first, rows, group, c):
    """Hide from 8 queries, of which `rows` count, what they do not see of the 32 keys of block c: (8, 32) floats."""
    if rows == ROWS and c * 32 + 31 <= first // group and (first + rows - 1) // group < closed[c]:
        return
    for m in range(ROWS):
        t = np.int32((first + m) // group if m < rows else -1)
        for j in range(32):
            key = np.int32(c * 32 + j)
            scores[m, j] = scores[m, j] if (key <= t) & (t < until[key]) else F32(-math.inf)


@njit(**OPTIONS)
def _eight_rows(source, base, group, jump, first, count, to):
    """Up to 8 rows of words, one after the other; rows as above."""
    for m in range(count):
        r = first + m
        row = source[base + r // group * jump + r % group]
        for k in range(row.size):
            to[m, k] = row[k]


@njit(**OPTIONS)
def _weighed(scores, seen, m, weights, tops):
    """exp of a query's scores less the largest, as bfloat16 in its row of weights; and that score, and the sum.

    Scores are (blocks, rows, 32) floats. The largest is found column by column in `tops`, (32,) floats to work in, and
    then by halves: one after the other, each comparison would wait for the last.
    """
    for j in range(32):
        tops[j] = scores[0, m, j]
    for c in range(1, seen):
        row = scores[c, m]
        for j in range(32):
            tops[j] = row[j] if row[j] > tops[j] else tops[j]
    half = 16
    while half > 0:
        for j in range(half):
            tops[j] = tops[half + j] if tops[half + j] > tops[j] else tops[j]
        half //= 2
    top, total = tops[0], ZERO
    for c in range(seen):
        row, to = scores[c, m], weights[m, c * 32 : c * 32 + 32]
        for j in range(32):
            weight = ZERO if row[j] == F32(-math.inf) else exp(row[j] - top)
            total += weight
            to[j] = narrow(weight)
    return top, total


@cfunc(TASK, **OPTIONS)
def attended(task):
    """Trees (start, stop), ends of subtrees, tokens, kv heads, group, size, q, k, v, out, normalisers, scratch, words.

    A row is a key head of a tree. q is (kv heads, tokens, group, size), scaled; k and v (kv heads, tokens, size); out
    (tokens, kv heads, group, size); normalisers (kv heads, tokens, group) floats, the log of the sum of a query's
    exponentials; scratch has so many words for each thread.
    """
    a, _, _ = begin(task)
    tokens, kv_heads, group, size, all_q = a[3], a[4], a[5], a[6], a[3] * a[4] * a[5]
    ends, trees = carray(ints_at(a[2]), (tokens,)), carray(ints_at(a[1]), (a[0] // kv_heads, 2))
    q, k, v = (
        carray(words_at(a[7]), (all_q, size // 2)),
        carray(words_at(a[8]), (kv_heads * tokens, size // 2)),
        halves(a[9], kv_heads * tokens, size),
    )
    out, normalisers = halves(a[10], all_q, size), floats(a[11], 1, all_q)[0]
    scratch, totals, tops = a[12] + thread() * a[13] * 4, np.empty(ROWS, F32), np.empty(32, F32)
    for job in range(thread(), a[0], threads()):
        start, stop, h = trees[job // kv_heads, 0], trees[job // kv_heads, 1], job % kv_heads
        count = stop - start
        queries, blocks = count * group, (count + 31) // 32
        of_q, of_k = (h * tokens + start) * group, h * tokens + start
        key_bytes = blocks * 64 * size
        at_values, at_x = scratch + key_bytes, scratch + 2 * key_bytes
        at_weights, at_sums = at_x + size * 16, at_x + size * 16 + blocks * 512
        at_part, at_scores = at_sums + 1024, at_sums + 2048
        at_until = at_scores + blocks * 1024
        _rows_as_columns(k, of_k, count, carray(words_at(scratch), (2 * blocks, size // 2, TILE)))
        _pairs_of_rows(v, of_k, 1, 1, count, carray(words_at(at_values), (size // TILE, blocks * 16, TILE)))
        until, of_blocks = (
            carray(numbers_at(at_until), (blocks * 32,)),
            carray(numbers_at(at_until + blocks * 128), (3, blocks)),
        )
        closed, opened, which = of_blocks[0], of_blocks[1], of_blocks[2]
        _ends_within(ends, start, count, until, closed, opened)
        x, weights = carray(words_at(at_x), (ROWS, size // 2)), halves(at_weights, ROWS, blocks * 32)
        sums, scores = floats(at_sums, ROWS, 32), carray(floats_at(at_scores), (blocks, ROWS, 32))
        for first in range(0, queries, ROWS):
            rows, left = min(ROWS, queries - first), a[7] + (of_q + first) * size * 2
            if rows < ROWS:
                _eight_rows(q, of_q, 1, 1, first, rows, x)
                left = at_x
            seen = _blocks_seen(opened, first, rows, group, which)
            for i in range(seen):
                here = scratch + which[i] * 64 * size
                tile_product(left, 2 * size, here, 32 * size, here, here, size // 2, at_scores + i * 1024)
                _masked(scores[i], until, closed, first, rows, group, which[i])
            for m in range(rows):
                top, total = _weighed(scores, seen, m, weights, tops)
                normalisers[of_q + first + m] = top + F32(math.log(total))
                totals[m] = total
            for c in range(size // 32):
                here = at_values + 2 * c * blocks * 1024
                _over_blocks(at_weights, blocks * 64, here, blocks * 1024, which, seen, sums, at_sums, at_part)
                for m in range(rows):
                    r = first + m
                    to = out[((start + r // group) * kv_heads + h) * group + r % group]
                    for j in range(32):
                        to[c * 32 + j] = narrow(sums[m, j] / totals[m])


@cfunc(TASK, **OPTIONS)
def attended_backward(task):
    """What `attended` has up to the normalisers; gradients of out and q (halves), k and v (floats); scratch, its words.

    As there; the gradients are laid out as what they belong to. A query's weights are computed again.
    """
    a, _, _ = begin(task)
    tokens, kv_heads, group, size, all_q = a[3], a[4], a[5], a[6], a[3] * a[4] * a[5]
    all_k, pairs = kv_heads * tokens, size // 2
    ends, trees = carray(ints_at(a[2]), (tokens,)), carray(ints_at(a[1]), (a[0] // kv_heads, 2))
    q_words, q, k_words, k = (
        carray(words_at(a[7]), (all_q, pairs)),
        halves(a[7], all_q, size),
        carray(words_at(a[8]), (all_k, pairs)),
        halves(a[8], all_k, size),
    )
    v_words, out, normalisers = (
        carray(words_at(a[9]), (all_k, pairs)),
        halves(a[10], all_q, size),
        floats(a[11], 1, all_q)[0],
    )
    grad_words, grad = carray(words_at(a[12]), (all_q, pairs)), halves(a[12], all_q, size)
    grad_q, grad_k, grad_v = halves(a[13], all_q, size), floats(a[14], all_k, size), floats(a[15], all_k, size)
    scratch, offsets = a[16] + thread() * a[17] * 4, np.zeros(ROWS, F32)
    for job in range(thread(), a[0], threads()):
        start, stop, h = trees[job // kv_heads, 0], trees[job // kv_heads, 1], job % kv_heads
        count = stop - start
        queries, blocks = count * group, (count + 31) // 32
        of_q, of_k, of_out = (h * tokens + start) * group, h * tokens + start, (start * kv_heads + h) * group
        half_queries, keys = (queries + 7) // 8 * 4, blocks * 32
        key_bytes, query_bytes = keys * size * 2, half_queries * size * 4
        at_k, at_k_pairs, at_v = scratch, scratch + key_bytes, scratch + 2 * key_bytes
        at_q_pairs, at_grad_pairs = scratch + 3 * key_bytes, scratch + 3 * key_bytes + query_bytes
        at_x = at_grad_pairs + query_bytes
        at_y, at_row = at_x + size * 16, at_x + size * 32
        at_sums, at_others, at_part = at_row + keys * 16, at_row + keys * 16 + 1024, at_row + keys * 16 + 2048
        at_until = at_part + 1024
        at_spans = at_until + blocks * 140
        until, of_blocks = (
            carray(numbers_at(at_until), (blocks * 32,)),
            carray(numbers_at(at_until + blocks * 128), (3, blocks)),
        )
        closed, opened, which = of_blocks[0], of_blocks[1], of_blocks[2]
        _ends_within(ends, start, count, until, closed, opened)
        tiles = 2 * blocks, pairs, TILE
        _rows_as_columns(k_words, of_k, count, carray(words_at(at_k), tiles))
        _rows_as_columns(v_words, of_k, count, carray(words_at(at_v), tiles))
        _pairs_of_rows(k, of_k, 1, 1, count, carray(words_at(at_k_pairs), (size // TILE, keys // 2, TILE)))
        by_query = size // TILE, half_queries, TILE
        _pairs_of_rows(q, of_q, 1, 1, queries, carray(words_at(at_q_pairs), by_query))
        _pairs_of_rows(grad, of_out, group, kv_heads * group, queries, carray(words_at(at_grad_pairs), by_query))
        # Weights and gradients of scores, for the products over queries: 8 keys a left factor, and of the pairs of
        # queries those from the keys themselves to the end of their subtrees.
        spans = carray(numbers_at(at_spans), (keys // ROWS, 3))
        num_pairs = 0
        for i in range(keys // ROWS):
            ends_at = 0
            for j in range(i * ROWS, i * ROWS + ROWS):
                ends_at = max(ends_at, until[j])
            spans[i, 0] = i * ROWS * group // 2
            spans[i, 1] = max(spans[i, 0], (ends_at * group + 7) // 8 * 4)
            spans[i, 2] = num_pairs - spans[i, 0]  # where the pair 0 would lie
            num_pairs += spans[i, 1] - spans[i, 0]
        at_p = at_spans + keys // ROWS * 12
        at_s = at_p + num_pairs * 4 * ROWS
        p, s = carray(words_at(at_p), (num_pairs, ROWS)), carray(words_at(at_s), (num_pairs, ROWS))
        x, y = carray(words_at(at_x), (ROWS, pairs)), carray(words_at(at_y), (ROWS, pairs))
        row = halves(at_row, ROWS, keys)
        sums, others = floats(at_sums, ROWS, 32), floats(at_others, ROWS, 32)
        for first in range(0, queries, ROWS):
            rows = min(ROWS, queries - first)
            left = a[7] + (of_q + first) * size * 2
            if rows < ROWS:
                _eight_rows(q_words, of_q, 1, 1, first, rows, x)
                left = at_x
            _eight_rows(grad_words, of_out, group, kv_heads * group, first, rows, y)
            for m in range(rows):
                place, offset = of_out + (first + m) // group * kv_heads * group + (first + m) % group, ZERO
                for i in range(size):
                    offset += wide(grad[place, i]) * wide(out[place, i])
                offsets[m] = offset
            seen = _blocks_seen(opened, first, rows, group, which)
            for i in range(seen):
                c = which[i]
                here = c * 64 * size
                tile_product(left, 2 * size, at_k + here, 32 * size, at_k + here, at_k + here, pairs, at_sums)
                tile_product(at_y, 2 * size, at_v + here, 32 * size, at_v + here, at_v + here, pairs, at_others)
                _masked(sums, until, closed, first, rows, group, c)
                for m in range(ROWS):
                    normaliser, offset = normalisers[of_q + min(first + m, queries - 1)], offsets[m]
                    for j in range(32):
                        hidden = sums[m, j] == F32(-math.inf)
                        weight = ZERO if hidden else exp(sums[m, j] - normaliser)
                        sums[m, j] = weight
                        others[m, j] = ZERO if hidden else weight * (others[m, j] - offset)
                        row[m, i * 32 + j] = narrow(others[m, j])
                for block in range(4):
                    begins, ends_at, offset_of = spans[c * 4 + block]
                    if begins <= first // 2 < ends_at:
                        for m in range(0, ROWS, 2):
                            of_p, of_s = p[offset_of + (first + m) // 2], s[offset_of + (first + m) // 2]
                            for j in range(ROWS):
                                at = block * ROWS + j
                                of_p[j] = _pair(narrow(sums[m, at]), narrow(sums[m + 1, at]))
                                of_s[j] = _pair(narrow(others[m, at]), narrow(others[m + 1, at]))
            for c in range(size // 32):
                here = at_k_pairs + 2 * c * keys * 32
                _over_blocks(at_row, keys * 2, here, keys * 32, which, seen, sums, at_sums, at_part)
                for m in range(rows):
                    for j in range(32):
                        grad_q[of_q + first + m, c * 32 + j] = narrow(sums[m, j])
        for first in range(0, count, ROWS):
            rows = min(ROWS, count - first)
            begins, ends_at, offset_of = spans[first // ROWS]
            left = (offset_of + begins) * 4 * ROWS
            for c in range(size // 32):
                here = 2 * c * half_queries * 64 + begins * 64
                pairs_product(
                    at_s + left,
                    0,
                    at_q_pairs + here,
                    half_queries * 64,
                    at_q_pairs + here,
                    at_q_pairs + here,
                    ends_at - begins,
                    at_sums,
                )
                pairs_product(
                    at_p + left,
                    0,
                    at_grad_pairs + here,
                    half_queries * 64,
                    at_grad_pairs + here,
                    at_grad_pairs + here,
                    ends_at - begins,
                    at_others,
                )
                for m in range(rows):
                    for j in range(32):
                        grad_k[of_k + first + m, c * 32 + j] = sums[m, j]
                        grad_v[of_k + first + m, c * 32 + j] = others[m, j]


@cfunc(TASK, **OPTIONS)
def cached(task):
    """Prompts (start, stop), samples of each, kv heads, size, tokens, k, v (halves), blocks, keys, values.

    A row is a key head of a sequence; its keys and values come from its prompt's in k and v (kv heads, tokens, size),
    and go to keys (2 blocks, size / 2, 16) and values (size / 16, 16 blocks, 16), as `decoded` has them.
    """
    a, first, last = begin(task)
    num_samples, kv_heads, size, tokens, blocks = a[2], a[3], a[4], a[5], a[8]
    pairs = size // 2
    places = carray(ints_at(a[1]), (a[0] // (num_samples * kv_heads), 2))
    k, v = carray(words_at(a[6]), (kv_heads * tokens, pairs)), halves(a[7], kv_heads * tokens, size)
    keys = carray(words_at(a[9]), (a[0], 2 * blocks, pairs, TILE))
    values = carray(words_at(a[10]), (a[0], size // TILE, blocks * 16, TILE))
    for row in range(first, last):
        start, stop = places[row // kv_heads // num_samples]
        here = row % kv_heads * tokens + start
        _rows_as_columns(k, here, stop - start, keys[row])
        _pairs_of_rows(v, here, 1, 1, stop - start, values[row])


@cfunc(TASK, **OPTIONS)
def decoded(task):
    """Sequences, kv heads, group, size, q, k, v, blocks, keys, values, lengths, window, out, scratch, its words.

    A row is a key head of a sequence. q, k and v are those of one new token of each, as in `attended`; keys and values
    have room for 32 tokens a block, and hold the last of `lengths` tokens from here on; a query sees `window` of them.
    Scratch has so many words for each thread.
    """
    a, first, last = begin(task)
    num, kv_heads, group, size, blocks, window = a[1], a[2], a[3], a[4], a[8], a[12]
    pairs, key_bytes = size // 2, blocks * 64 * size
    q, k, v = (
        carray(words_at(a[5]), (kv_heads * num * group, pairs)),
        carray(words_at(a[6]), (kv_heads * num, pairs)),
        halves(a[7], kv_heads * num, size),
    )
    keys = carray(words_at(a[9]), (a[0], 2 * blocks, pairs, TILE))
    values = halves(a[10], a[0] * (size // TILE) * blocks * 16, 2 * TILE)
    lengths, out = carray(ints_at(a[11]), (num,)), halves(a[13], a[0] * group, size)
    at_x = a[14] + thread() * a[15] * 4
    at_weights, at_sums = at_x + FEW * size * 2, at_x + FEW * size * 2 + FEW * blocks * 64
    at_scores = at_sums + FEW * 128
    x, weights = carray(words_at(at_x), (FEW, pairs)), halves(at_weights, FEW, blocks * 32)
    sums, scores = floats(at_sums, FEW, 32), carray(floats_at(at_scores), (blocks, FEW, 32))
    totals, tops = np.empty(FEW, F32), np.empty(32, F32)
    for row in range(first, last):
        b, h = row // kv_heads, row % kv_heads
        new = lengths[b] - 1
        for i in range(pairs):
            keys[row, new // TILE, i, new % TILE] = k[h * num + b, i]
        for i in range(size):
            values[(row * (size // TILE) + i // TILE) * blocks * 16 + new // 2, i % TILE * 2 + new % 2] = v[
                h * num + b, i
            ]
        oldest = max(0, lengths[b] - window)
        begins, seen = oldest // 32, new // 32 - oldest // 32 + 1
        at_keys, at_values = a[9] + row * key_bytes + begins * 64 * size, a[10] + row * key_bytes + begins * 1024
        for part in range(0, group, FEW):
            rows = min(FEW, group - part)
            for m in range(rows):
                query = q[(h * num + b) * group + part + m]
                for i in range(pairs):
                    x[m, i] = query[i]
            for c in range(seen):
                here, out_of = at_keys + c * 64 * size, at_scores + c * FEW * 128
                few_rows_product(at_x, 2 * size, here, 32 * size, here + 64 * size, here + 96 * size, pairs, out_of)
            for m in range(rows):
                for j in range(oldest % 32):
                    scores[0, m, j] = F32(-math.inf)
                for j in range(new % 32 + 1, 32):
                    scores[seen - 1, m, j] = F32(-math.inf)
                _, totals[m] = _weighed(scores, seen, m, weights, tops)
            for c in range(size // 32):
                here, apart = at_values + 2 * c * blocks * 1024, blocks * 1024
                coming = here + 2 * apart
                few_rows_product(at_weights, blocks * 64, here, apart, coming, coming + apart, seen * 16, at_sums)
                for m in range(rows):
                    to = out[row * group + part + m]
                    for j in range(32):
                        to[c * 32 + j] = narrow(sums[m, j] / totals[m])
