"""What the kernels of `rlhf/models/kernels.py` are written with: tasks, arrays at addresses, bfloat16, exp.

A kernel takes the address of a task, 64-bit integers: the number of rows, then the arguments that its docstring lists
and `rlhf/models/runtime.py` gives (addresses, sizes, the bits of a float64); it does its thread's share of the rows.
bfloat16 tensors are arrays of their bits (uint16); sums and exponentials are float32.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core.types import ExternalFunction
from numba.extending import intrinsic

TASK = types.void(types.CPointer(types.int64))
# Sums may be reordered; NaN and infinity are honoured, since what is not finite must be seen to be so.
OPTIONS = {"cache": True, "fastmath": {"reassoc", "contract", "arcp", "nsz", "afn"}, "error_model": "numpy"}
ARGUMENTS = 24
F32, ONE, HALF, ZERO = np.float32, np.float32(1), np.float32(0.5), np.float32(0)

thread = ExternalFunction("rlhf_omp_get_thread_num", types.int32())
threads = ExternalFunction("rlhf_omp_get_num_threads", types.int32())
barrier = ExternalFunction("rlhf_GOMP_barrier", types.void())


@intrinsic
def call(_, kernel, task):
    """Call the kernel at an address with the task at another."""

    def emit(context, builder, signature, args):
        word = ir.IntType(64).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [word])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [builder.inttoptr(args[1], word)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


def bitcast(source, target, llvm):
    @intrinsic
    def cast(_, value):
        return target(source), lambda context, builder, signature, args: builder.bitcast(args[0], llvm)

    return cast


def address_of(element):
    @intrinsic
    def pointer(_, address):
        def emit(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(types.CPointer(element)))

        return types.CPointer(element)(types.int64), emit

    return pointer


as_float = bitcast(types.uint32, types.float32, ir.FloatType())
as_bits = bitcast(types.float32, types.uint32, ir.IntType(32))
as_double = bitcast(types.int64, types.float64, ir.DoubleType())
floats_at, halves_at = address_of(types.float32), address_of(types.uint16)
words_at, numbers_at, ints_at = address_of(types.uint32), address_of(types.int32), address_of(types.int64)


@njit(**OPTIONS)
def floats(address, rows, columns):
    return carray(floats_at(address), (rows, columns))


@njit(**OPTIONS)
def halves(address, rows, columns):
    return carray(halves_at(address), (rows, columns))


@njit(**OPTIONS)
def begin(task):
    """The arguments, and the first and last row of this thread."""
    arguments = carray(task, (ARGUMENTS,))
    rows, mine, all_threads = arguments[0], thread(), threads()
    return arguments, rows * mine // all_threads, rows * (mine + 1) // all_threads


@njit(**OPTIONS)
def wide(half):
    return as_float(np.uint32(half) << np.uint32(16))


@njit(**OPTIONS)
def narrow(x):
    """The nearest bfloat16, ties to even."""
    bits = as_bits(x)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(**OPTIONS)
def exp(x):
    """exp to two units in the last place; arguments are kept within -87 and 88, NaN stays NaN.

    exp(x) = 2^n exp(r) with r = x - n ln 2, |r| <= ln(2) / 2, and exp(r) by its Taylor polynomial of degree 7.
    """
    x = F32(-87) if x < F32(-87) else x
    x = F32(88) if x > F32(88) else x
    n = np.floor(x * F32(1 / math.log(2)) + HALF)
    r = x - n * F32(0.693359375)  # ln 2 in two parts, the first exact in few bits
    r = r - n * F32(math.log(2) - 0.693359375)
    p = F32(1 / 5040)
    p = p * r + F32(1 / 720)
    p = p * r + F32(1 / 120)
    p = p * r + F32(1 / 24)
    p = p * r + F32(1 / 6)
    p = p * r + HALF
    p = p * r * r + r + ONE
    return p * as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
