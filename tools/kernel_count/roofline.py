"""Times of the kernels by a model, from their counts: the slowest of issue slots, shared memory and global memory."""

from __future__ import annotations

from typing import NamedTuple

from budgets import OPERATIONS
from sass import Launch

B, K = 2048, 2304
"""The size the times are for: [2048, 128, 2304] features, as the benchmark has it."""


class Device(NamedTuple):
    """clock: Hz under load, assumed; bandwidth: bytes/s, and cache: bytes of L2, from NVIDIA's data sheets; reachable:
    the share of the bandwidth that a copy gets, assumed."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    cache: float
    reachable: float = 0.92


DEVICES = (
    Device("H100", 132, 1.70e9, 3.35e12, 50e6),
    Device("H200", 132, 1.70e9, 4.8e12, 50e6),
    Device("B200", 148, 1.85e9, 8.0e12, 126e6),
)


def times(launch: Launch, positions: int, device: Device, rows: int = B * K) -> dict[str, float]:
    """Microseconds of issue slots, shared memory and global memory for ``rows`` columns of ``positions``."""
    threads = rows * positions / launch.elements
    resident = device.multiprocessors * 32 * launch.warps
    bytes_of_dram = launch.count.from_dram(device.cache / resident)
    warps = threads / 32
    cycles = 1 / device.multiprocessors / device.clock * 1e6
    return {
        "issue": warps * launch.count.issued / 4 * cycles,
        "shared": threads * launch.count.shared / 128 * cycles,
        "memory": threads * bytes_of_dram / (device.reachable * device.bandwidth) * 1e6,
    }


def markdown(results: dict[str, dict[tuple[str, str, int], Launch]]) -> str:
    """The tables of docs/kernels.md."""
    lines = ["| kernel | text | T | instructions | registers | warps |", "| --- | --- | --- | --- | --- | --- |"]
    for backend, found in results.items():
        for (name, text, T), launch in found.items():
            numbers = f"{launch.per_element:.1f} | {launch.registers} | {launch.warps}"
            lines.append(f"| {backend} {name} | {text} | {T} | {numbers} |")
    names = " | ".join(device.name for device in DEVICES)
    lines += ["", f"| kernel, one run | T | {names} |", "| --- | --- |" + " --- |" * len(DEVICES)]
    for backend, found in results.items():
        for (name, text, T), launch in sorted(found.items(), key=lambda item: OPERATIONS.index(item[0][0])):
            if text != "one run":
                continue
            cells = []
            for device in DEVICES:
                by_part = times(launch, T, device, B * K * 128 // T)  # the same number of elements
                cells.append(" / ".join(f"{us:.0f}" for us in by_part.values()))
            lines.append(f"| {backend} {name} | {T} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
