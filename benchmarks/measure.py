"""Timing and peak memory: variants are interleaved, inputs rotate, and warm-up calls are not counted."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

SLOW_BUDGET = 6.0
"""Seconds per case for a slow variant: it skips rounds to stay below, but runs at least `FEWEST`."""

FEWEST = 3

SCRATCH_BYTES = 2**30
"""Larger than any GPU's caches."""

READS = 4
"""Of the scratch memory before a timed call: more than a millisecond at 3 TB/s, longer than launching takes."""

Call = Callable[[int], object]
"""One execution on the inputs of that index (modulo the number of inputs)."""


class Variant(NamedTuple):
    """A function to time.

    kind: "copy", "backend", "alternative" or "step"
    bytes: the minimum memory traffic, with every tensor read or written once; 0 if unspecified
    refused: why the result is less accurate than the gate allows; "" if it is accurate
    """

    name: str
    kind: str
    call: Call
    bytes: int = 0
    refused: str = ""


class Timing(NamedTuple):
    seconds: list[float]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@functools.cache
def keep_freed_memory() -> None:
    """Make the C library keep freed memory, as PyTorch's CUDA allocator does.

    Otherwise, depending on what ran before, a call that allocates large tensors may incur page faults that cost several
    times as much as the copy that everything is compared with.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc; constants from malloc.h
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)


def seconds_of(call: Call, turn: int, device: torch.device) -> float:
    """Seconds of one call. On a GPU between two events, after work that keeps it busy until everything is launched."""
    if device.type != "cuda":
        began = time.perf_counter()
        result = call(turn)
        elapsed = time.perf_counter() - began
        del result
        return elapsed
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    occupy(device)
    start.record()
    call(turn)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def occupy(device: torch.device) -> None:
    """Work that keeps the GPU busy while a timed call is launched, and evicts its inputs from the caches.

    It only reads: written lines would be left in the cache, and the timed call would pay for writing them to memory.
    """
    for _ in range(READS):
        _scratch(device).sum()


@functools.cache
def _scratch(device: torch.device) -> torch.Tensor:
    return torch.zeros(SCRATCH_BYTES // 4, device=device)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Peak bytes during one call beyond those in use before it, including its results. None if unknown.

    On a CPU this is the increase of the process's resident memory (Linux: VmHWM after a reset), which includes buffers
    that PyTorch does not know; freed memory is returned to the system first. Accurate to about a page per thread.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call(0)
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    reset = Path("/proc/self/clear_refs")
    if trim is None or not reset.exists():
        return None
    trim(0)
    try:
        reset.write_text("5")
    except OSError:
        return None
    before = status("VmRSS")
    result = call(0)
    peak = status("VmHWM") - before
    del result
    return peak


def status(field: str) -> int:
    """Bytes of `VmRSS` (resident now) or `VmHWM` (peak resident) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def compare(
    benchmark: Any, own: Variant, others: list[Variant], device: torch.device, rounds: int, *, memory: bool = True
) -> dict[str, Timing]:
    """Time `own` with pytest-benchmark and, between its rounds, each of `others`.

    Interleaving exposes all variants to the same noise and to caches filled by others. The order changes every round,
    because a call takes a few percent longer after a slow one. Before the first round, each variant is called once for
    its peak memory (if `memory`) and once to estimate its time.
    """
    variants = [own, *others]
    peaks = {v.name: peak_memory(v.call, device) if memory else None for v in variants}
    every: dict[str, int] = {}
    for variant in variants:
        estimate = seconds_of(variant.call, 0, device)
        affordable = min(rounds, max(FEWEST, int(SLOW_BUDGET / estimate)))
        every[variant.name] = max(1, rounds // affordable)
    seconds: dict[str, list[float]] = {v.name: [] for v in variants}
    turns, number, order = itertools.count(), itertools.count(), random.Random(0)

    def run_others() -> None:
        round_ = next(number)
        for variant in order.sample(others, len(others)):
            if round_ % every[variant.name] == 0:
                seconds[variant.name].append(seconds_of(variant.call, next(turns), device))

    def one_round() -> None:
        seconds[own.name].append(seconds_of(own.call, next(turns), device))

    benchmark.pedantic(one_round, setup=run_others, rounds=rounds)
    return {name: Timing(times, peaks[name]) for name, times in seconds.items()}


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, interleaved so that all variants are exposed to the same noise."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times
