#!/usr/bin/env python3
"""Compiles the CUDA kernels for every architecture, without a GPU and without a CUDA build of torch.

    tools/compile_cuda.py [FOLDER]

Fails on any warning, and on a stack frame or register spill in any kernel except those in MAY_SPILL. Prints each
kernel's registers per architecture, as ptxas reports them. The object files go to FOLDER, by default a temporary one.
Needs nvcc (on the PATH or in CUDA_HOME) and g++; if torch is installed, its headers are used to compile ops.cpp too.
"""
# ruff: noqa: T201

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = CSRC / "cuda"
ARCHITECTURES = ("80", "90a", "100")
# float64 with more than four windows keeps 64 doubles per thread, more than its registers hold.
MAY_SPILL = ("backward_any<double, 16>",)

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    stack: int
    spills: int


def parse(report: str) -> list[Kernel]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    return [
        Kernel(m["name"], m["arch"], int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in _KERNEL.finditer(report)
    ]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def compile_kernels(nvcc: str, source: Path, arch: str, folder: Path) -> list[Kernel]:
    """Compile one source for one architecture, which takes up to half a minute."""
    command = [nvcc, "-std=c++20", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"]
    command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", f"-I{CSRC}"]
    return parse(_run([*command, "-c", str(source), "-o", str(folder / f"{source.stem}_{arch}.o")]))


def compile_operators(folder: Path) -> str:
    """Compile ops.cpp with torch's headers, if torch is installed; returns a line for the report."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return "ops.cpp: not compiled, because torch is not installed"
    include = Path(torch.origin).parent / "include"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DUSE_CUDA"]
    command += ["-Wall", "-Wextra", "-Werror", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC}"]
    command += ["-isystem", str(include)]
    _run([*command, "-c", str(SOURCES / "ops.cpp"), "-o", str(folder / "ops.o")])
    return f"ops.cpp: compiled with the headers in {include}"


def _readable(names: list[str]) -> dict[str, str]:
    """Mangled name -> a short one, such as `forward_multiscale<Half, 2>`."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    for unwanted in (r"\(anonymous namespace\)::|tsae::(cuda::)?", r"\((Mode|Activation)\)|^void |\(\w+\)$"):
        lines = re.sub(unwanted, "", lines, flags=re.MULTILINE)
    return dict(zip(names, lines.splitlines(), strict=True))


def table(kernels: list[Kernel], names: dict[str, str]) -> str:
    """A line per kernel with its registers on each architecture, and its local memory if it uses any."""
    cells: dict[str, dict[str, str]] = {}
    for kernel in kernels:
        local = f" ({kernel.stack} stack, {kernel.spills} spilled)" if kernel.stack or kernel.spills else ""
        cells.setdefault(names[kernel.name], {})[kernel.arch] = f"{kernel.registers}{local}"
    head = f"{'registers':<36}" + "".join(f" {'sm_' + arch:>6}" for arch in ARCHITECTURES)
    rows = [
        f"{name:<36}" + "".join(f" {by_arch.get(arch, ''):>6}" for arch in ARCHITECTURES)
        for name, by_arch in sorted(cells.items())
    ]
    return "\n".join([head, *rows])


def spilling(kernels: list[Kernel], names: dict[str, str]) -> list[str]:
    """The kernels that have a stack frame or spills and are not in MAY_SPILL."""
    return [
        f"{names[kernel.name]} for sm_{kernel.arch}"
        for kernel in kernels
        if (kernel.stack or kernel.spills) and names[kernel.name] not in MAY_SPILL
    ]


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("error: nvcc not found: install the CUDA toolkit (tested with 13.0) or set CUDA_HOME")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(source, arch) for source in sorted(SOURCES.glob("*.cu")) for arch in ARCHITECTURES]
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            operators = pool.submit(compile_operators, folder)
            compiled = list(pool.map(lambda job: compile_kernels(nvcc, job[0], job[1], folder), jobs))
            print(operators.result())
    kernels = [kernel for part in compiled for kernel in part]
    if not kernels:
        sys.exit("error: found no kernel in nvcc's output; its format may have changed")
    names = _readable(sorted({kernel.name for kernel in kernels}))
    print(table(kernels, names))
    bad = spilling(kernels, names)
    if bad:
        sys.exit("error: stack frame or register spills in " + ", ".join(bad))


if __name__ == "__main__":
    main()
