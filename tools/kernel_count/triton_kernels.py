"""The Triton kernels' launches, compiled as Triton's launcher would and executed one thread each."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sass import Launch, programs
from thread import Thread

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not compiled
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget

from tools.compile_triton import Recorder, source_of

PARAMETERS = 0x210


class TritonKernels:
    """Counts the instructions of the `triton` backend's launches, like `cuda_kernels.CudaKernels`."""

    def __init__(self, disassembler: str, dumper: str) -> None:
        self.disassembler, self.dumper = disassembler, dumper
        self.recorders: dict[str, Recorder] = {}
        for module_name in ("forward", "backward"):
            module = importlib.import_module(f"tsae_kernels.backends.triton.{module_name}")
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                self.recorders[name] = Recorder(getattr(module, name))
                setattr(module, name, self.recorders[name])

    def counted(self, run: Callable[[], object], positions: int) -> list[Launch]:
        """The launches that ``run()`` would make, on features [1, positions, k]."""
        run()
        out = []
        for name, recorder in self.recorders.items():
            for args, kwargs in recorder.launches:
                out.append(self._count(name, recorder.kernel, args, kwargs, positions))
            recorder.launches.clear()
        return out

    def _count(self, name: str, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], positions: int) -> Launch:
        source, options = source_of(kernel, args, kwargs)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constants = {PARAMETERS: _packed(values, source.signature), 0: (32).to_bytes(4, "little")}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            text = _output([self.disassembler, "-c", file.name])
            usage = _output([self.dumper, "--dump-resource-usage", file.name])
        (program,) = programs(text).values()
        found = {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", usage)}
        threads = 32 * made.metadata.num_warps
        elements = positions * values["BLOCK_K"] // threads
        count = Thread(program, constants).run()
        return Launch(name, threads, made.metadata.shared, found["reg"], found["stack"], elements, count)


def _packed(values: dict[str, Any], signature: dict[str, str]) -> bytes:
    """The kernel's parameters as the driver lays them out, with Triton's two scratch pointers at the end."""
    out = bytearray()
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        size = 8 if kind.startswith("*") or kind == "i64" else 4
        out += bytes(-len(out) % size)
        value = values[name]
        out += (value.data_ptr() if isinstance(value, torch.Tensor) else int(value)).to_bytes(size, "little")
    return bytes(out + bytes(-len(out) % 8) + bytes(16))


def _output(command: list[Any]) -> str:
    result = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"error: {' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout
