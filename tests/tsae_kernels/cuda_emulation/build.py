"""Compiles csrc/cuda for the host: the sources of the CUDA kernels, run by `emulated_device.h`.

`python tests/tsae_kernels/cuda_emulation/build.py [--sanitize] FILE` writes the library FILE.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SOURCES = ["ops.cpp", *(path.name for path in sorted((ROOT / "csrc/cuda").glob("*.cu")))]


def compiler() -> str | None:
    """The path of g++, required for `_Float16` and the sanitizers' runtime, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(library: Path, sanitize: bool = False, device_header: Path = HERE / "emulated_device.h") -> None:
    """Compile and link `library`. Raises `subprocess.CalledProcessError` with the compiler's output."""
    import torch

    folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    # The kernels' unroll pragmas are for nvcc, and g++ warns of unused branches.
    flags += ["-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f'-DTSAE_DEVICE_HEADER="{device_header}"', '-DTSAE_STREAM_HEADER="emulated_stream.h"', f"-I{HERE}"]
    flags += ["-isystem", str(folder / "include")]
    link = [f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder / 'lib'}"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    flags += ["-O1", "-g", *checks] if sanitize else ["-O2", "-g0"]
    objects = [str(library.with_name(f"{library.stem}-{name}.o")) for name in SOURCES]

    def compile_source(name: str, target: str) -> None:
        command = [compiler() or "g++", *flags, "-x", "c++", "-c", str(ROOT / "csrc/cuda" / name), "-o", target]
        subprocess.run(command, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_source, SOURCES, objects))
    command = [compiler() or "g++", "-shared", *(checks if sanitize else []), *objects, "-o", str(library), *link]
    subprocess.run(command, check=True, capture_output=True, text=True)
    for name in objects:
        Path(name).unlink()


if __name__ == "__main__":
    try:
        build(Path(sys.argv[-1]), "--sanitize" in sys.argv)
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr)
