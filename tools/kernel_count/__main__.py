#!/usr/bin/env python3
"""Instructions per element of the GPU kernels, from their machine code, without a GPU.

    python tools/kernel_count [--backend cuda | triton] [--table FILE]

Compiles the kernels for sm_90a (CUDA) and sm_90 (Triton), executes one thread of every case on its disassembly (see
thread.py) and prints the instructions that a thread issues per element, its registers, and the warps resident on a
multiprocessor. Fails where a tuned kernel exceeds its budget (budgets.py) or has a stack frame. --table writes the
Markdown table of docs/kernels.md, with times by a model: the instructions at four a cycle and multiprocessor, shared
memory at 128 bytes a cycle, and global memory at its bandwidth. Counted and calculated, not measured.

Needs nvcc, g++ and Triton, whose wheel has nvdisasm and cuobjdump.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from budgets import budget
from counting import count
from roofline import markdown
from sass import Launch


def exceeded(backend: str, found: dict[tuple[str, str, int], Launch]) -> list[str]:
    """A sentence for each budget that is not kept."""
    out = []
    for (operation, text, T), launch in found.items():
        case = f"{backend} {operation} ({text}, T = {T})"
        limit = budget(backend, operation, text, T)
        if launch.stack:
            out.append(f"{case} has a stack frame of {launch.stack} bytes")
        if limit is not None and launch.per_element > limit:
            out.append(f"{case} issues {launch.per_element:.2f} instructions per element, over {limit:.2f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cuda", "triton"), action="append", help="default: both")
    parser.add_argument("--table", type=Path, help="write the Markdown table to this file")
    arguments = parser.parse_args()
    results = {}
    names = arguments.backend or ["cuda", "triton"]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, found in zip(names, pool.map(count, names), strict=True):
            results[name] = found
            report(name, found)
    if arguments.table:
        arguments.table.write_text(markdown(results))
    failures = [sentence for name, found in results.items() for sentence in exceeded(name, found)]
    if failures:
        sys.exit("error: over budget\n" + "\n".join(failures))


def report(backend: str, found: dict[tuple[str, str, int], Launch]) -> None:
    """Print a line per case."""
    print(f"{backend:<21}{'text':<9}{'T':>4}{'instructions':>14}{'registers':>11}{'warps':>7}  kernel")
    for (name, text, T), launch in found.items():
        numbers = f"{launch.per_element:>9.2f}{launch.registers:>11}{launch.warps:>7}"
        print(f"  {name:<19}{text:<9}{T:>4}{numbers}  {launch.kernel}", flush=True)


if __name__ == "__main__":
    main()
