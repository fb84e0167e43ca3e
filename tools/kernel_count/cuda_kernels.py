"""The CUDA kernels' launches, executed one thread each from the machine code that nvcc made of csrc/cuda.

The operators run on small CPU tensors in the emulation of tests/tsae_kernels/cuda_emulation, with a device header that
reports every launch. So the library's own code decides which kernel is launched and with which argument; the memory
that the kernel reads is real.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sass import Launch, Program, programs
from thread import Thread

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EMULATION = ROOT / "tests" / "tsae_kernels" / "cuda_emulation"
ARCHITECTURE = "90a"
FEATURES = 2  # of a thread
PARAMETERS = 0x210  # of a kernel, in constant bank 0 on sm_90

_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64
)


def _output(command: list[str | Path]) -> str:
    result = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"error: {' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def _readable(names: list[str]) -> dict[str, str]:
    """Mangled name -> the name that host and device compilers agree on."""
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {
        name: re.sub(
            r"\(anonymous namespace\)::|tsae::(cuda::)?|\((Mode|Activation|Part)\)|^void |\([\w:]+\)$", "", line
        )
        for name, line in zip(names, lines.splitlines(), strict=True)
    }


class CudaKernels:
    """Counts the instructions of the `cuda` backend's launches.

    Args:
        nvcc, disassembler, dumper: paths of nvcc, nvdisasm and cuobjdump.
        folder: where compiled files go.
    """

    def __init__(self, nvcc: str, disassembler: str, dumper: str, folder: Path) -> None:
        self.programs: dict[str, Program] = {}
        self.resources: dict[str, dict[str, int]] = {}
        jobs = []
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            cubin = folder / f"{source.stem}.cubin"
            command = [nvcc, "-std=c++20", "-O3", f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"]
            command += [f"-I{ROOT / 'csrc'}", "-cubin", str(source), "-o", str(cubin)]
            jobs.append((cubin, subprocess.Popen(command)))
        library = self._emulation(folder)
        for cubin, job in jobs:
            if job.wait() != 0:
                sys.exit(f"error: nvcc failed for {cubin.stem}.cu")
            found = programs(_output([disassembler, "-c", cubin]))
            names = _readable(list(found))
            self.programs |= {names[name]: program for name, program in found.items()}
            usage = _output([dumper, "--dump-resource-usage", cubin])
            for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
                if name in names:
                    self.resources[names[name]] = {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", line)}
        self.library = ctypes.CDLL(str(library))
        symbols = [line.split() for line in _output(["nm", library]).splitlines()]
        addresses = {int(parts[0], 16): parts[2] for parts in symbols if len(parts) == 3 and parts[1] in "tT"}
        names = _readable(list(addresses.values()))
        self.names = {address: names[name] for address, name in addresses.items()}
        self.launched: list[Launch] = []
        self._callback = _CALLBACK(self._record)
        self.library.tsae_record_launches(self._callback)
        self._error: BaseException | None = None

    def _emulation(self, folder: Path) -> Path:
        sys.path.insert(0, str(EMULATION))
        import build

        library = folder / "recording.so"
        build.build(library, device_header=HERE / "recording_device.h")
        import torch

        torch.ops.load_library(str(library))
        return library

    def _record(self, kernel: int, blocks: int, threads: int, shared: int, argument: int, size: int) -> None:
        try:
            name = self.names[kernel]
            constants = {PARAMETERS: ctypes.string_at(argument, size), 0: (threads).to_bytes(4, "little")}
            count = Thread(self.programs[name], constants).run()
            found = self.resources[name]
            self.launched.append(
                Launch(name, threads, shared, found["reg"], found["stack"], FEATURES * self.positions, count)
            )
        except BaseException as error:  # can't cross the C++ code: raised by `counted`
            self._error = self._error or error

    def counted(self, run: Callable[[], object], positions: int) -> list[Launch]:
        """The launches of ``run()``, on features [1, positions, k]. Raises what the executor raises."""
        self.launched, self._error, self.positions = [], None, positions
        run()
        if self._error is not None:
            raise self._error
        return self.launched
