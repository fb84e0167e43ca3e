"""The compiled libraries of the `cpp` and `cuda` backends: found in the package, loaded once, or why not."""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path
from typing import NamedTuple

import torch

INTERFACE = 3  # must equal the libraries': see tsae_interface in csrc/cpu/ops.cpp and csrc/cuda/ops.cpp
REMEDY = "with torch and a C++ compiler run `pip install --no-build-isolation .` in the source tree"
CUDA_REMEDY = (
    "with a CUDA build of torch and its version of nvcc run `TSAE_BUILD=cuda pip install --no-build-isolation .` "
    "in the source tree"
)


class Library(NamedTuple):
    """problem: "" if the library can be used, else why not and what to do.

    The rest is empty for a library that is not loaded:

    built_for: versions of torch and the compiler
    variants: the instruction sets of the CPU library, the architectures of the CUDA library
    chosen: the instruction set that this processor runs; the version of CUDA
    """

    problem: str
    built_for: str = ""
    variants: str = ""
    chosen: str = ""


@functools.cache
def load_library() -> Library:
    """Load the CPU library into PyTorch; its operators are then in `torch.ops.tsae_kernels_cpp`."""
    return _load("_cpu", REMEDY, "tsae_instruction_sets", "tsae_instruction_set")


@functools.cache
def load_cuda_library() -> Library:
    """The same with the CUDA library and `torch.ops.tsae_kernels_cuda`; it needs a GPU that torch sees, too."""
    if not _find("_cuda"):
        return Library(f"not built: {CUDA_REMEDY}")
    if torch.version.cuda is None:
        return Library(f"built, but torch {torch.__version__} has no CUDA: {CUDA_REMEDY}")
    library = _load("_cuda", CUDA_REMEDY, "tsae_architectures", "tsae_cuda_version")
    if not library.problem and not torch.cuda.is_available():
        return library._replace(
            problem="built, but torch sees no GPU (torch.cuda.is_available() is False): check `nvidia-smi`"
        )
    return library


def _find(name: str) -> list[Path]:
    return sorted(Path(__file__).parents[1].glob(f"{name}*.so"))


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file is shorter than its header says: to load such a file ends the process (SIGBUS)."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian; the loader knows what to do with all others
        return False
    if len(header) < 64:
        return True
    (table,), (entry_bytes, entries) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return table + entry_bytes * entries > path.stat().st_size  # the table of sections, which linkers write last


def _load(name: str, remedy: str, variants: str, chosen: str) -> Library:
    built = _find(name)
    if not built:
        return Library(f"not built: {remedy}")
    path = built[0]
    # Where an old file lies the build may take it for the new one.
    remedy = f"`rm {path}`, then {remedy}"
    try:
        if _is_cut_off(path):
            return Library(f"{path.name} is cut off: {remedy}")
        library = ctypes.CDLL(str(path))
        interface = library.tsae_interface()
        if interface != INTERFACE:
            return Library(f"{path.name} was built from other sources (interface {interface}): {remedy}")
        torch.ops.load_library(str(path))
    except (OSError, AttributeError) as error:  # another torch or platform
        return Library(f"{path.name} does not load ({error}): {remedy}")

    def text(function_name: str) -> str:
        function = getattr(library, function_name)
        function.restype = ctypes.c_char_p
        return function().decode()

    return Library("", text("tsae_built_for"), text(variants), text(chosen))
