"""Matrix products in tiles, by the instruction of AVX512-BF16 that multiplies pairs of bfloat16 and adds them up.

For products that oneDNN's blocks do not suit: a few rows beside weights that come from memory, and attention
(`rlhf/models/tile_attention.py`). Import it only where the processor has the instruction (`fused.multiplies`). A tile
holds 16 columns: for each pair of rows of the right factor (each pair of inputs of a weight), the pair of every column.
"""

from __future__ import annotations

from llvmlite import ir
from numba import carray, cfunc, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from rlhf.models.compiled import OPTIONS, TASK, begin, floats, halves, narrow, thread, words_at


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


TILE, ROWS, TILES = 16, 8, 2
"""Columns of a tile of a product, one register of float32 sums; rows and tiles that are summed up at once."""
FEW = 4
"""Rows of the smaller product, for the query heads of one key head."""


def _product_of(rows: int, *, in_pairs: bool = False):
    """The intrinsic `tile_product` for so many rows of the left factor; `in_pairs`: laid out as [pair][row]."""

    def emit(context, builder, signature, args):
        x, x_apart, packed, apart, *coming, pairs, out = args
        word, index = ir.IntType(32), ir.IntType(64)
        sums, words = ir.VectorType(ir.FloatType(), TILE), ir.VectorType(word, TILE)
        pairs_of = ir.VectorType(_BFloat(), 2 * TILE)
        kind = ir.FunctionType(sums, [sums, pairs_of, pairs_of])
        multiply_add = get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")

        def address(base, offset, element):
            return builder.inttoptr(builder.add(base, offset), element.as_pointer())

        before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(body)
        builder.position_at_end(body)
        k = builder.phi(index)
        totals = [[builder.phi(sums) for _ in range(TILES)] for _ in range(rows)]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), word, word, word])
        prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        line, weights = builder.shl(k, index(6)), []
        for i in range(TILES):
            place = builder.add(line, builder.mul(index(i), apart))
            weights.append(builder.bitcast(builder.load(address(packed, place, words), align=4), pairs_of))
            builder.call(prefetch, [address(coming[i], line, ir.IntType(8)), word(0), word(2), word(1)])
        found = []
        for m in range(rows):
            if in_pairs:
                place = builder.add(builder.mul(k, index(4 * rows)), index(4 * m))
            else:
                place = builder.add(builder.mul(x_apart, index(m)), builder.shl(k, index(2)))
            pair = builder.load(address(x, place, word), align=4)
            one = builder.insert_element(ir.Constant(words, ir.Undefined), pair, word(0))
            everywhere = builder.bitcast(builder.shuffle_vector(one, one, ir.Constant(words, [0] * TILE)), pairs_of)
            found.append([builder.call(multiply_add, [totals[m][i], everywhere, weights[i]]) for i in range(TILES)])
        following = builder.add(k, index(1))
        k.add_incoming(index(0), before)
        k.add_incoming(following, body)
        for m in range(rows):
            for i in range(TILES):
                totals[m][i].add_incoming(ir.Constant(sums, [0.0] * TILE), before)
                totals[m][i].add_incoming(found[m][i], body)
        builder.cbranch(builder.icmp_signed("<", following, pairs), body, after)
        builder.position_at_end(after)
        for m in range(rows):
            for i in range(TILES):
                place = index(4 * TILE * (m * TILES + i))
                builder.store(found[m][i], address(out, place, sums), align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile_product(_, x, x_apart, packed, apart, coming, also_coming, pairs, out):
        """rows x 32 float32 sums over `pairs` pairs of bfloat16, by the instruction that multiplies and adds two.

        Args:
            x: address of the left factor; x_apart: bytes from a row to the next, unless it is in pairs.
            packed: address of the first of two tiles; apart: bytes from it to the second.
            coming, also_coming: addresses of two tiles whose way from memory begins now.
            out: address of the sums.
        """
        return types.void(*[types.int64] * 8), emit

    return tile_product


tile_product, few_rows_product, pairs_product = _product_of(ROWS), _product_of(FEW), _product_of(ROWS, in_pairs=True)


@cfunc(TASK, **OPTIONS)
def packed_tiles(task):
    """A float32 matrix, its width, out (halves).

    A row is 16 rows of the matrix: for each pair of columns, the pair of every row.
    """
    a, first, last = begin(task)
    width = a[2]
    matrix, out = floats(a[1], a[0] * TILE, width), halves(a[3], a[0] * (width // 2), 2 * TILE)
    for tile in range(first, last):
        for m in range(TILE):
            row = matrix[tile * TILE + m]
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
    num, width, columns = a[1], a[2], TILES * TILE
    outputs, parts, pairs = a[0] * columns, (num + ROWS - 1) // ROWS, width // 2
    tile_bytes = pairs * 4 * TILE
    x, out, bias = carray(words_at(a[3]), (num, pairs)), halves(a[6], num, outputs), floats(a[5], 1, outputs)[0]
    # Each thread has room for the sums, and for the last rows of x where they are fewer than 8.
    address = a[7] + thread() * 4 * ROWS * (columns + pairs)
    sums, last_rows = floats(address, ROWS, columns), carray(words_at(address + 4 * ROWS * columns), (ROWS, pairs))
    for m in range(num % ROWS):
        last_rows[m] = x[num - num % ROWS + m]
    for tiles in range(first, last):
        for i in range(parts):
            left = a[3] + i * ROWS * width * 2 if (i + 1) * ROWS <= num else address + 4 * ROWS * columns
            here = a[4] + tiles * 2 * tile_bytes
            # The next tiles come while these are at work: one with the first part, one with the last.
            coming = here + 2 * tile_bytes if tiles + 1 < last and i == 0 else here
            also_coming = here + 3 * tile_bytes if tiles + 1 < last and i + 1 == parts else here
            tile_product(left, width * 2, here, tile_bytes, coming, also_coming, pairs, address)
            for m in range(min(ROWS, num - i * ROWS)):
                for j in range(columns):
                    total = sums[m, j] + bias[tiles * columns + j] if a[5] else sums[m, j]
                    out[i * ROWS + m, tiles * columns + j] = narrow(total)
