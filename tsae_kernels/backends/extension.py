"""Loads the compiled libraries of the `cpp` and `cuda` backends, or says why they cannot be loaded."""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path
from typing import NamedTuple

import torch

INTERFACE = 7  # must equal tsae_interface in csrc/cpu/ops.cpp and csrc/cuda/ops.cpp
REMEDY = "with torch and a C++ compiler run `pip install --no-build-isolation .` in the source tree"
CUDA_REMEDY = (
    "with a CUDA build of torch and its version of nvcc run `TSAE_BUILD=cuda pip install --no-build-isolation .` "
    "in the source tree"
)


class Library(NamedTuple):
    """A compiled library, or why it cannot be used.

    error: "" if the library is loaded, else the reason and the command that fixes it; the other fields are then empty
    built_for: versions of torch and the compiler
    targets: instruction sets (CPU) or GPU architectures (CUDA) that it was compiled for
    selected: the instruction set used on this processor; for CUDA, the CUDA version
    """

    error: str
    built_for: str = ""
    targets: str = ""
    selected: str = ""


@functools.cache
def load_library() -> Library:
    """Load the CPU library, which registers its operators as `torch.ops.tsae_kernels_cpp`."""
    return _load("_cpu", REMEDY, "tsae_instruction_sets", "tsae_instruction_set")


@functools.cache
def load_cuda_library() -> Library:
    """Load the CUDA library, which registers `torch.ops.tsae_kernels_cuda` and needs a GPU that torch sees."""
    if not _find("_cuda"):
        return Library(f"not built: {CUDA_REMEDY}")
    if torch.version.cuda is None:
        return Library(f"built, but torch {torch.__version__} has no CUDA: {CUDA_REMEDY}")
    library = _load("_cuda", CUDA_REMEDY, "tsae_architectures", "tsae_cuda_version")
    if not library.error and not torch.cuda.is_available():
        return library._replace(
            error="built, but torch sees no GPU (torch.cuda.is_available() is False): check `nvidia-smi`"
        )
    return library


def _find(name: str) -> list[Path]:
    return sorted(Path(__file__).parents[1].glob(f"{name}*.so"))


def _is_truncated(path: Path) -> bool:
    """Whether an ELF file is shorter than its header says. Loading such a file kills the process (SIGBUS)."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":  # not 64-bit little-endian ELF: the loader reports an error
        return False
    if len(header) < 64:
        return True
    (table,), (entry_bytes, entries) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    end: int = table + entry_bytes * entries  # linkers write the section table last
    return end > path.stat().st_size


def _load(name: str, remedy: str, targets: str, selected: str) -> Library:
    built = _find(name)
    if not built:
        return Library(f"not built: {remedy}")
    path = built[0]
    # The build may mistake an old file for the new one, so remove it first.
    remedy = f"`rm {path}`, then {remedy}"
    try:
        if _is_truncated(path):
            return Library(f"{path.name} is truncated: {remedy}")
        library = ctypes.CDLL(str(path))
        interface = library.tsae_interface()
        if interface != INTERFACE:
            return Library(
                f"{path.name} was built from another version of the sources (interface {interface}): {remedy}"
            )
        torch.ops.load_library(str(path))
    except (OSError, AttributeError) as error:  # built for another torch or platform
        return Library(f"{path.name} does not load ({error}): {remedy}")

    def text(function_name: str) -> str:
        function = getattr(library, function_name)
        function.restype = ctypes.c_char_p
        value: bytes = function()
        return value.decode()

    return Library("", text("tsae_built_for"), text(targets), text(selected))
