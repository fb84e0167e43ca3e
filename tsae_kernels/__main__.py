"""`python -m tsae_kernels`: the table of backends."""
# ruff: noqa: T201

import torch

from tsae_kernels import available_backends
from tsae_kernels.backends import BACKEND_VARIABLE, choose_backend
from tsae_kernels.extension import load_cuda_library, load_library


def main() -> None:
    print(f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}")
    for name, state in available_backends().items():
        print(f"  {name:<10} {state}")
    library = load_library()
    if not library.problem:
        print(f"cpp: built for {library.built_for}, with {library.variants}; this processor runs {library.chosen}")
    library = load_cuda_library()
    if not library.problem:
        print(f"cuda: built for {library.built_for}, CUDA {library.chosen}, with {library.variants}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        chosen = choose_backend(None, torch.device(device))
        print(f"default on {device}: {chosen} (set {BACKEND_VARIABLE} or backend= to change it)")


if __name__ == "__main__":
    main()
