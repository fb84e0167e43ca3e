#!/usr/bin/env python3
"""Compiles the Triton kernels for the given compute capabilities, with the launchers' arguments, without a GPU.

    tools/compile_triton.py [CAPABILITY ...]    default: 80 90 100

Prints one JSON line per kernel and capability. Fails if a kernel spills registers, or loads bfloat16 features one by
one. TSAE_KEEP_ASSEMBLY=FOLDER keeps the PTX and SASS in FOLDER. Needs Triton and tsae_kernels.
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not compiled

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tools import sparse_launches
from tsae_kernels import MULTISCALE
from tsae_kernels.backends.interface import Activation, Gradients
from tsae_kernels.backends.triton import launch, scan_launch

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


# Types, constants, divisibility by 16, and options.
Specialization = tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any], dict[str, Any]]


class Recorder:
    """Replaces a kernel and records the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def specialization(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Specialization:
    """What Triton's launcher compiles a kernel for: types, constants, divisibility by 16, and options."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
        value = values[name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            if specialized and not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if specialized and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def source_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel as Triton's launcher specializes it for the arguments, and the options."""
    *kinds, options = specialization(kernel, args, kwargs)
    return ASTSource(kernel, *kinds), options


def resources(cubin: bytes, name: str) -> dict[str, int]:
    """Registers of the kernel in a cubin, and its bytes of stack, local (spills) and shared memory."""
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
def launches() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Variant name -> kernel and arguments, for [2048, 128, 2304] features on the meta device."""
    recorders = {}
    for module_name in ("forward", "backward", "steps", "scans", *sparse_launches.MODULES):
        module = importlib.import_module(f"tsae_kernels.backends.triton.{module_name}")
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            recorders[name] = Recorder(getattr(module, name))
            setattr(module, name, recorders[name])
    out = {}

    def record(label: str, function: Callable[..., Any], *arguments: Any) -> None:
        function(*arguments)
        for recorder in recorders.values():
            for number, (args, kwargs) in enumerate(recorder.launches):
                name = f"{label}-{recorder.kernel.__name__}-{number}" if label.startswith("sparse") else label
                out[name] = recorder.kernel, args, kwargs
            recorder.launches.clear()

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B, T, k, S = 2048, 128, 2304, len(MULTISCALE)
    bias, one = empty(k), empty()
    shared, sums = empty(1, S, k).expand(B, S, k), bias.expand(B, k)
    forwards = {
        "relu": Activation("relu", bias),
        "schmitt": Activation("relu", bias, one, one),
        "gelu": Activation("gelu", bias),
    }
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        x, weights = empty(B, T, k, dtype=dtype), empty(B, T)
        for ids, suffix in ((None, ""), (empty(B, T, dtype=torch.int64), "-segments")):
            for name, activation in forwards.items():
                record(f"{name}-{short}{suffix}", launch.activate_with_stats, x, activation, MULTISCALE, ids)
            record(f"stats-{short}{suffix}", launch.temporal_stats, x, MULTISCALE, ids)
            record(f"mask-{short}{suffix}", launch.activate_with_mask, x, forwards["schmitt"], MULTISCALE, ids)
        # With transition counts, what `rate` trains with.
        record(f"counted-{short}", launch.activate_with_stats, x, forwards["schmitt"], MULTISCALE, None, True)
        record(f"counted-mask-{short}", launch.activate_with_mask, x, forwards["schmitt"], MULTISCALE, None, True)
        longer = empty(B // 4, 4 * T, k, dtype=dtype)  # segments compile no backward kernel, a longer sequence does
        for rows, suffix in ((x, ""), (longer, "-long")):
            of = shared[: rows.shape[0]]
            backwards = {
                "relu": (Gradients(rows, of, None, None), Activation("relu")),
                "gelu": (Gradients(rows, of, None, None), Activation("gelu", bias)),
                "stats": (Gradients(None, of, sums[: rows.shape[0]], sums[: rows.shape[0]]), Activation("identity")),
            }
            for name, arguments in backwards.items():
                label = f"{name}-backward-{short}{suffix}"
                record(label, launch.activate_with_stats_backward, rows, *arguments, MULTISCALE, None)
        record(f"steps-{short}", launch.step_energy, x, weights)
        record(f"steps-backward-{short}", launch.step_energy_backward, x, weights, one)
        record(f"path-{short}", scan_launch.viterbi_path, x, empty(2, 2, k), empty(2, k), None)
        record(f"leaky-{short}", scan_launch.leaky_recurrence, x, bias, None)
        record(f"leaky-backward-{short}", scan_launch.leaky_recurrence_backward, x, bias, x, x, None)
    sparse_launches.record_sparse(record, empty)
    return out


def compiled(label: str, capability: int) -> dict[str, Any]:
    """One kernel's registers, bytes of stack and local memory, and number of 16-bit loads."""
    folder = os.environ.get("TSAE_KEEP_ASSEMBLY")
    kernel, args, kwargs = launches()[label]
    source, options = source_of(kernel, args, kwargs)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    name = f"{label}-sm{capability}"
    ptx = made.asm["ptx"]
    if folder:
        Path(folder, f"{name}.ptx").write_text(ptx)
    # Lists are read entry by entry; rows must not be.
    single = 0 if label.startswith("sparse") else len(re.findall(r"ld\.global\S*\.[bu]16", ptx))
    return {"kernel": label, "capability": capability, **resources(made.asm["cubin"], name), "single_loads": single}


KNOWN_STACK = {("counted-bf16", 80): 32}
"""Bytes of registers that are known to spill; not measured what they cost."""


def defect(kernel: dict[str, Any]) -> str:
    """Why a compiled kernel fails the check, or ""."""
    if kernel["stack"] > KNOWN_STACK.get((kernel["kernel"], kernel["capability"]), 0) or kernel["local"]:
        return "spills registers"
    if kernel["single_loads"]:
        return "loads features one by one"
    return ""


def main(capabilities: list[int]) -> int:
    found = 0
    jobs = [(label, capability) for label in launches() for capability in capabilities]
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor() as pool:
        os.environ["TRITON_CACHE_DIR"] = cache
        for kernel in pool.map(compiled, *zip(*jobs, strict=True)):
            print(json.dumps(kernel), flush=True)
            if defect(kernel):
                found += 1
                print(f"{kernel['kernel']} {defect(kernel)} on sm_{kernel['capability']}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]] or [80, 90, 100]))
