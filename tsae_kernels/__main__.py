"""`python -m tsae_kernels` lists the backends and what is available."""
# ruff: noqa: T201

import os
import sys
from importlib.metadata import version

import torch

from tsae_kernels import available_backends
from tsae_kernels.backends.extension import load_cuda_library, load_library
from tsae_kernels.backends.registry import BACKEND_VARIABLE, OK, choose_backend
from tsae_kernels.backends.triton import launch


def main() -> None:
    """Print every backend's state, what the compiled libraries were built for, and the default backends."""
    print(f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}")
    for name, state in available_backends().items():
        print(f"  {name:<10} {state}")
    library = load_library()
    if library.built_for:
        print(f"cpp: built for {library.built_for}, with {library.targets}; this processor runs {library.selected}")
    library = load_cuda_library()
    if library.built_for:
        print(f"cuda: built for {library.built_for}, CUDA {library.selected}, with {library.targets}")
    if available_backends()["triton"] == OK:
        where = "in its interpreter" if launch.interpreting() else "compiles for the GPU on first use"
        print(f"triton: version {version('triton')}, {where}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        try:
            chosen = choose_backend(None, torch.device(device))
        except (RuntimeError, ValueError) as error:  # TSAE_BACKEND names a backend that cannot run
            print(f"default on {device}: none. {error}")
        else:
            print(f"default on {device}: {chosen} (set {BACKEND_VARIABLE} or backend= to change it)")


def run() -> None:
    """`main` for the command line: what nobody reads, or stdout's encoding lacks, is no error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails to flush it at the end


if __name__ == "__main__":
    run()
