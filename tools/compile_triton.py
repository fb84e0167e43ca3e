#!/usr/bin/env python3
"""Compiles the Triton kernels for GPUs that are not there, as the launchers would launch them.

    tools/compile_triton.py [CAPABILITY ...]    default: 80 90 100

Prints one JSON line per kernel and capability. Fails if a kernel spills a register, or if one reads bfloat16 features
singly. With the variable TSAE_KEEP_ASSEMBLY=FOLDER the PTX and SASS are kept there. Needs Triton and tsae_kernels.
"""
# ruff: noqa: T201

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tsae_kernels import MULTISCALE
from tsae_kernels.backends.triton import launch

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}


class Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def source_of(kernel: Any, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """What Triton's own launcher makes of these arguments: constants, types, divisibility by 16."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and name != "T"):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and name != "T":
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def resources(cubin: bytes, name: str) -> dict[str, int]:
    """Registers, and bytes of stack and local memory (spills), of the kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        folder = os.environ.get("TSAE_KEEP_ASSEMBLY")
        if folder:
            sass = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True)
            Path(folder, f"{name}.sass").write_text(sass.stdout)
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", out.stdout))
    return {key.lower(): int(value) for key, value in found.items()}


@functools.cache
def launches() -> dict[str, tuple[Any, tuple, dict]]:
    """Each variant's name -> kernel and arguments, of [2048, 128, 2304] features that take no memory."""
    modules = {}
    for name in ("forward", "backward", "steps"):
        modules[name] = importlib.import_module(f"tsae_kernels.backends.triton.{name}")
    recorders = {}
    for module in modules.values():
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            recorders[name] = Recorder(getattr(module, name))
            setattr(module, name, recorders[name])
    out = {}

    def record(label: str, call) -> None:
        call()
        for recorder in recorders.values():
            for args, kwargs in recorder.launches:
                out[label] = recorder.kernel, args, kwargs
            recorder.launches.clear()

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, T, k, S = 2048, 128, 2304, len(MULTISCALE)
    bias, one = empty(k), empty(())
    shared = empty(1, S, k).expand(B, S, k)
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        x = empty(B, T, k, dtype=dtype)
        for ids, suffix in ((None, ""), (empty(B, T, dtype=torch.int64), "-segments")):
            calls = {
                "relu": lambda x=x, ids=ids: launch.activate_with_stats(x, bias, "relu", None, None, MULTISCALE, ids),
                "schmitt": lambda x=x, ids=ids: launch.activate_with_stats(x, bias, "relu", one, one, MULTISCALE, ids),
                "gelu": lambda x=x, ids=ids: launch.activate_with_stats(x, bias, "gelu", None, None, MULTISCALE, ids),
                "stats": lambda x=x, ids=ids: launch.temporal_stats(x, MULTISCALE, ids),
                "relu-backward": lambda x=x, ids=ids: launch.activate_with_stats_backward(
                    x, None, x, shared, None, None, "relu", MULTISCALE, ids
                ),
                "gelu-backward": lambda x=x, ids=ids: launch.activate_with_stats_backward(
                    x, bias, x, shared, None, None, "gelu", MULTISCALE, ids
                ),
                "stats-backward": lambda x=x, ids=ids: launch.activate_with_stats_backward(
                    x, None, None, shared, bias.expand(B, k), bias.expand(B, k), "identity", MULTISCALE, ids
                ),
            }
            for name, call in calls.items():
                record(f"{name}-{short}{suffix}", call)
        weights = empty(B, T)
        record(f"steps-{short}", lambda x=x, weights=weights: launch.step_energy(x, weights))
        record(
            f"steps-backward-{short}",
            lambda x=x, weights=weights: launch.step_energy_backward(x, weights, one),
        )
    return out


def compiled(label: str, capability: int) -> dict[str, Any]:
    """What one kernel takes of a GPU: registers, bytes of stack and local memory, loads of single bfloat16 features."""
    folder = os.environ.get("TSAE_KEEP_ASSEMBLY")
    kernel, args, kwargs = launches()[label]
    source, options = source_of(kernel, args, kwargs)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    name = f"{label}-sm{capability}"
    ptx = made.asm["ptx"]
    if folder:
        Path(folder, f"{name}.ptx").write_text(ptx)
    single = len(re.findall(r"ld\.global\S*\.[bu]16", ptx))
    return {"kernel": label, "capability": capability, **resources(made.asm["cubin"], name), "single_loads": single}


def problem(kernel: dict[str, Any]) -> str:
    """What is wrong with a compiled kernel, or ""."""
    if kernel["stack"] or kernel["local"]:
        return "spills registers"
    if kernel["single_loads"]:
        return "reads features singly"
    return ""


def main(capabilities: list[int]) -> int:
    found = 0
    jobs = [(label, capability) for label in launches() for capability in capabilities]
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor() as pool:
        os.environ["TRITON_CACHE_DIR"] = cache
        for kernel in pool.map(compiled, *zip(*jobs, strict=True)):
            print(json.dumps(kernel), flush=True)
            if problem(kernel):
                found += 1
                print(f"{kernel['kernel']} {problem(kernel)} on sm_{kernel['capability']}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]] or [80, 90, 100]))
