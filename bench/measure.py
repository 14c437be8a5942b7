"""Seconds of calls that take turns, the device's ceilings among them, and their extra memory."""

from __future__ import annotations

import ctypes
import platform
import random
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .calls import Call, use_isa
from .device import CEILINGS, synchronize

SAMPLE_S = 2e-3  # calls shorter than this are timed several at once
CALLS = 160  # that are timed of one kind at most
# Of every call. CPUs that are shared change within seconds, GPUs with their temperature.
TURNS = {"cpu": 16, "cuda": 4}

Key = TypeVar("Key")  # what is timed


class Timer(Protocol):
    """Something that can be timed."""

    def seconds(self, number: int) -> float:
        """Seconds of so many calls."""

    def cold(self, budget_s: float) -> list[float]:
        """Seconds of calls on a GPU, each with an empty L2, for about so long."""


class LocalTimer:
    """A call in this process."""

    def __init__(
        self, call: Call, *, isa: str | None = None, threads: int = 0, device: str = "cpu"
    ) -> None:
        self.call, self.isa, self.threads, self.device = call, isa, threads, device

    def seconds(self, number: int) -> float:
        """Seconds of so many calls, until the device has done them.

        Short calls follow one that is not timed: they are wanted with the caches and the threads
        as they leave them, not as whatever ran in between did.
        """
        threads = torch.get_num_threads()
        use_isa(self.isa)
        torch.set_num_threads(self.threads or threads)
        try:
            if number > 1:
                self.call()
            synchronize(self.device)
            start = perf_counter()
            for _ in range(number):
                self.call()
            synchronize(self.device)
            return perf_counter() - start
        finally:
            torch.set_num_threads(threads)

    def cold(self, budget_s: float) -> list[float]:
        """Seconds of calls on a GPU, each with an empty L2, by the GPU's own clock."""
        from triton.testing import do_bench

        return [1e-3 * ms for ms in do_bench(self.call, rep=1e3 * budget_s, return_mode="all")]


def sample(timers: Mapping[Key, Timer], budget_s: float, device: str) -> dict[Key, list[float]]:
    """Seconds per call, many of each, which take turns as their device needs it."""
    return turns_of_calls(timers, budget_s) if device == "cpu" else cold_turns(timers, budget_s)


def cold_turns(timers: Mapping[Key, Timer], budget_s: float) -> dict[Key, list[float]]:
    """Seconds per call on a GPU, in turns of many calls with an empty L2."""
    samples: dict[Key, list[float]] = {name: [] for name in timers}
    for _ in range(TURNS["cuda"]):
        for name, timer in timers.items():
            samples[name] += timer.cold(budget_s / TURNS["cuda"])
    return samples


def turns_of_calls(timers: Mapping[Key, Timer], budget_s: float) -> dict[Key, list[float]]:
    """Seconds per call, a median of each turn; turns of a call at least share out ``budget_s``.

    So the samples of slow and of fast calls are of the same time, whatever the machine does then,
    and a turn counts for one, however many calls it had: of fast calls a busy machine does fewer.
    Every turn has another order: what runs behind the copy of memory would always find the caches
    full of that.
    """
    number: dict[Key, int] = {}
    for name, timer in timers.items():
        timer.seconds(1)  # pages and caches are touched
        number[name] = max(1, ceil(SAMPLE_S / timer.seconds(1)))
    samples: dict[Key, list[float]] = {name: [] for name in timers}
    spent, calls = dict.fromkeys(timers, 0.0), dict.fromkeys(timers, 0)
    shuffled = random.Random(0)
    for turn in range(1, TURNS["cpu"] + 1):
        share = turn / TURNS["cpu"]
        for name in shuffled.sample(list(timers), len(timers)):
            timed = []
            while not timed or (spent[name] < share * budget_s and calls[name] < share * CALLS):
                seconds = timers[name].seconds(number[name])
                timed.append(seconds / number[name])
                spent[name] += seconds
                calls[name] += 1
            samples[name].append(median(timed))
    return samples


def keep_freed_memory() -> None:
    """Leaves what tensors free with the process, where the C library can do that.

    glibc would hand large blocks back to the system, and every call would begin with a page fault
    for each 4 kB of its results: up to half of the time of a kernel that mostly moves memory. It
    holds for all implementations; a server's allocator does the same.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def mm_timer(device: str, dtype: str = "float32", threads: int = 0) -> Timer:
    """torch.mm of two square matrices."""
    size = CEILINGS[device].mm_size
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return LocalTimer(lambda: (torch.mm(a, b, out=out),), threads=threads, device=device)


def copy_timer(device: str, threads: int = 0) -> Timer:
    """A copy of memory."""
    source = torch.ones(CEILINGS[device].copy_bytes, dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    return LocalTimer(lambda: (out.copy_(source),), threads=threads, device=device)


def extra_bytes(call: Call, device: str) -> int | None:
    """Peak memory of one call beyond what it returns; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        size = _size(call())
        return torch.cuda.max_memory_allocated() - before - size
    clear = Path("/proc/self/clear_refs")
    if platform.libc_ver()[0] != "glibc" or not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would hide what this one takes
    clear.write_text("5")  # the high-water mark starts over
    before = _status("VmRSS")
    size = _size(call())
    return max(0, _status("VmHWM") - before - size)


def _size(outputs: tuple[Tensor, ...]) -> int:
    return sum(x.nbytes for x in outputs)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
