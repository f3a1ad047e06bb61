"""Where compiled kernels run: on torch's own OpenMP threads, one after the other or many in one go.

Threads of a second pool would wait for the cores that torch's spin on, so the runtime that torch brought is called.
Starting its threads, and the Python between two kernels, cost as much as a small kernel does. What runs again and again
on the same tensors is recorded once, and then runs as one call (`recording`).
"""

from __future__ import annotations

import ctypes
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MIN_PARALLEL = 2**15
"""Elements below which a second thread costs more than it brings."""
SYMBOLS = "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"
"""Functions of the runtime that kernels call, under these names behind `rlhf_`."""


@cache
def openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP runtime that torch runs on; None where it runs on another."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    package = str(Path(torch.__file__).parent)
    # Other packages bring their own copies: torch's lies in its folder, or in torch.libs beside it.
    loaded = {line.split(maxsplit=5)[-1] for line in maps if "libgomp" in line}
    own = sorted(path for path in loaded if path.startswith((f"{package}/", f"{package}.libs/")))
    return ctypes.CDLL(own[0]) if own else None


@cache
def kernels() -> ModuleType | None:
    """The compiled kernels; None where they cannot be compiled, or could not run on torch's threads."""
    if openmp() is None:
        return None
    try:
        from llvmlite import binding

        for name in SYMBOLS:  # the linker must know them before it loads what calls them
            binding.add_symbol(f"rlhf_{name}", ctypes.cast(getattr(openmp(), name), ctypes.c_void_p).value)
        from rlhf.models import kernels
    except ImportError:
        return None
    except Exception as error:  # whatever numba and LLVM raise: the same numbers come from torch's operations
        fault = str(error).strip().splitlines()
        warnings.warn(
            f"numba cannot compile the kernels for this processor ({fault[0] if fault else type(error).__name__}); "
            f"training and sampling take some 20 % longer",
            stacklevel=2,
        )
        return None
    return kernels


@cache
def tiles() -> ModuleType | None:
    """The products made of AVX512-BF16's instruction; None where the processor lacks it."""
    if kernels() is None:
        return None
    from llvmlite import binding

    if not binding.get_host_cpu_features().get("avx512bf16", False):
        return None
    from rlhf.models import tiles

    return tiles


def tile_attention() -> ModuleType:
    """The attention made of these products, where there are any."""
    tiles()
    from rlhf.models import tile_attention

    return tile_attention


class Recording:
    """Kernels and what they were given, to run again in one go: on the same tensors, whose contents may be others.

    It holds on to these tensors. Operations of torch's that ran between the kernels are not part of it.
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._words: list[int] = []
        self._task: ctypes.Array | None = None
        self.threads = torch.get_num_threads()

    def add(self, kernel: Any, task: ctypes.Array, arguments: tuple[Tensor | int | float, ...]) -> None:
        """One more kernel at the end."""
        self._kept.append((task, arguments))
        self._words += [kernel.address, ctypes.addressof(task)]
        self._task = (ctypes.c_int64 * (1 + len(self._words)))(len(self._kept), *self._words)

    def __call__(self) -> None:
        """Run them all, each once the one before is done on all threads."""
        if self._task is not None:
            _start(kernels().in_turn, self._task, self.threads)


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)
"""Of this thread: others may sample beside it."""


@contextmanager
def recording() -> Iterator[Recording]:
    """Within it, what `run` runs is also recorded."""
    made = Recording()
    token = _recording.set(made)
    try:
        yield made
    finally:
        _recording.reset(token)


def run(kernel: Any, rows: int, elements: int, *arguments: Tensor | int | float) -> None:
    """Run a kernel over its rows.

    Args:
        kernel: of `kernels()`, `tiles()` or `tile_attention()`.
        elements: how much work it is, which decides whether it runs on more than one thread.
        arguments: as its docstring lists them; tensors are contiguous.
    """
    task = (ctypes.c_int64 * (len(arguments) + 1))(rows, *map(_word, arguments))
    _start(kernel, task, torch.get_num_threads() if elements >= MIN_PARALLEL else 1)
    made = _recording.get()
    if made is not None:
        made.add(kernel, task, arguments)


def _start(kernel: Any, task: ctypes.Array, threads: int) -> None:
    pointer = ctypes.c_void_p
    openmp().GOMP_parallel(pointer(kernel.address), pointer(ctypes.addressof(task)), threads, 0)


def _word(argument: Tensor | int | float) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return argument if isinstance(argument, int) else struct.unpack("<q", struct.pack("<d", argument))[0]
