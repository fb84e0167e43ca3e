"""Timing and memory: variants take turns, inputs rotate, first calls do not count."""

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
"""Seconds that one slow variant may take in one case; it then sits out some rounds, but has at least `FEWEST`."""

FEWEST = 3

Call = Callable[[int], object]
"""One execution on the inputs of that number (modulo how many there are)."""


class Variant(NamedTuple):
    """What is timed.

    kind: "copy", "backend", "alternative" or "step"
    bytes: what an implementation that touches memory once must read and write, 0 if not stated
    """

    name: str
    kind: str
    call: Call
    bytes: int = 0


class Timing(NamedTuple):
    seconds: list[float]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep what is freed, as PyTorch's CUDA allocator does.

    Otherwise a call that allocates large tensors may or may not pay for page faults, which cost several times as much
    as the copy that everything is compared with, depending on what ran before it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc; the constants are those of malloc.h
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)


def seconds_of(call: Call, turn: int, device: torch.device) -> float:
    """Of one call. On a GPU between two events, behind work that keeps it busy until everything is launched."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = call(turn)
        elapsed = time.perf_counter() - start
        del result
        return elapsed
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _gpu_scratch(device).zero_()
    start.record()
    call(turn)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _gpu_scratch(device: torch.device) -> torch.Tensor:
    return torch.empty(2**30, dtype=torch.uint8, device=device)  # also empties the caches


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes in use at the peak of one call beyond those before it; its results count. None where unknown.

    On a CPU it is the rise of the process's resident memory (Linux: VmHWM after resetting it), so that buffers behind
    PyTorch's back count too; memory that was freed before is given back first. Good to about a page per thread.
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
    before = _status("VmRSS")
    result = call(0)
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def compare(
    benchmark: Any, own: Variant, others: list[Variant], device: torch.device, rounds: int, *, memory: bool = True
) -> dict[str, Timing]:
    """Time `own` with pytest-benchmark, and between its rounds every one of `others` in turn.

    So a noisy neighbour hits all alike, and no variant finds the caches as it left them. Their order is another one in
    every round, as a call takes a few percent longer after a slow one. Each is called for its memory (if asked for) and
    once more before the first round.
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

    def the_others() -> None:
        round_ = next(number)
        for variant in order.sample(others, len(others)):
            if round_ % every[variant.name] == 0:
                seconds[variant.name].append(seconds_of(variant.call, next(turns), device))

    def one_round() -> None:
        seconds[own.name].append(seconds_of(own.call, next(turns), device))

    benchmark.pedantic(one_round, setup=the_others, rounds=rounds)
    return {name: Timing(times, peaks[name]) for name, times in seconds.items()}


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the variants taking turns, so that a noisy neighbour hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times
