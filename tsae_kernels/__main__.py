"""`python -m tsae_kernels`: the table of backends."""
# ruff: noqa: T201

from importlib.metadata import version

import torch

from tsae_kernels import available_backends
from tsae_kernels.backends.extension import load_cuda_library, load_library
from tsae_kernels.backends.registry import BACKEND_VARIABLE, OK, choose_backend
from tsae_kernels.backends.triton import launch


def main() -> None:
    """Print what is available, what it was built for, what helps, and what runs by default."""
    print(f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}")
    for name, state in available_backends().items():
        print(f"  {name:<10} {state}")
    library = load_library()
    if library.built_for:
        print(f"cpp: built for {library.built_for}, with {library.variants}; this processor runs {library.chosen}")
    library = load_cuda_library()
    if library.built_for:
        print(f"cuda: built for {library.built_for}, CUDA {library.chosen}, with {library.variants}")
    if available_backends()["triton"] == OK:
        where = "in its interpreter" if launch.interpreting() else "compiles for the GPU on first use"
        print(f"triton: version {version('triton')}, {where}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        try:
            chosen = choose_backend(None, torch.device(device))
        except (RuntimeError, ValueError) as error:  # what the variable asks for cannot run
            print(f"default on {device}: none. {error}")
        else:
            print(f"default on {device}: {chosen} (set {BACKEND_VARIABLE} or backend= to change it)")


if __name__ == "__main__":
    main()
