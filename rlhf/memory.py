"""How much memory there is, and how much a piece of work takes at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LivePeak(TorchDispatchMode):
    """While it is active: the bytes of all tensors that were made under it and still live, and their largest sum.

    What an operation needs only inside itself is not seen.

    Attributes:
        live, peak: bytes; `peak` since the start, or since the last `lap`.

    >>> with LivePeak() as used:
    ...     x = torch.zeros(1000) + torch.ones(1000)
    >>> used.live, used.peak
    (4000, 12000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def lap(self) -> int:
        """The peak since the last lap, or since the start; the next one begins."""
        found, self.peak = self.peak, self.live
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for given in tree_iter((args, kwargs)):
            self._see(given, new=False)
        out = func(*args, **kwargs)
        for made in tree_iter(out):
            self._see(made, new=True)
        return out

    def _see(self, value: object, *, new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0  # what came from outside was there before

        def gone(_: weakref.ref) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def peaks_of(device: torch.device) -> Iterator[Callable[[], int]]:
    """Within it, work is watched; each call of the function that it gives returns the bytes at the peak since the last
    call (or the start), beside what was there at the start: the allocator's on CUDA, else those of `LivePeak`.
    """
    if device.type != "cuda":
        with LivePeak() as used:
            yield used.lap
        return
    before = torch.cuda.memory_allocated(device)

    def lap() -> int:
        found = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        return found

    torch.cuda.reset_peak_memory_stats(device)
    yield lap


def held_memory(device: torch.device) -> int | None:
    """Bytes that this process holds: of the device's memory, or of the machine's; None where it can't be told."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return _of_file("/proc/self/status", "VmRSS")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free beside those held, within a container's limit; None where it can't be told."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    available = _of_file("/proc/meminfo", "MemAvailable")
    if available is None:
        return None
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            bound = int((Path("/sys/fs/cgroup") / limit).read_text()) - int((Path("/sys/fs/cgroup") / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        available = min(available, bound)
    return max(0, available)


def _of_file(path: str, name: str) -> int | None:
    """A line `name:  1234 kB` of a file of Linux, in bytes."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
