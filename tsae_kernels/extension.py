"""The compiled library of the `cpp` backend: found beside this file, loaded once, or the reason why not."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch

INTERFACE = 1  # must equal the library's: see tsae_interface in csrc/cpu/ops.cpp
REMEDY = "with torch and a C++ compiler run `pip install --no-build-isolation .` (or `make install`) in the source tree"


class Library(NamedTuple):
    """problem: "" if the library is loaded, else why it is not and what to do; then the rest is empty."""

    problem: str
    built_for: str = ""
    instruction_sets: str = ""
    in_use: str = ""


@functools.cache
def load_library() -> Library:
    """Load the library into PyTorch; its operators are then in `torch.ops.tsae_kernels_cpp`."""
    built = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not built:
        return Library(f"not built: {REMEDY}")
    path = built[0]
    try:
        library = ctypes.CDLL(str(path))
        interface = library.tsae_interface()
        if interface != INTERFACE:
            return Library(f"{path.name} was built from other sources (interface {interface}): {REMEDY}")
        torch.ops.load_library(str(path))
    except (OSError, AttributeError) as error:  # another torch or platform
        return Library(f"{path.name} does not load ({error}): {REMEDY}")

    def text(name: str) -> str:
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        return function().decode()

    return Library("", text("tsae_built_for"), text("tsae_instruction_sets"), text("tsae_instruction_set"))
