"""Builds the compiled kernels of tsae_kernels; all metadata is in pyproject.toml.

TSAE_BUILD = cuda | cpu | none forces or skips them: `cuda` builds the kernels for GPUs and for CPUs, `cpu` those for
CPUs alone. Unset, whatever torch and the compilers here allow is built, and if that is nothing the package is pure
Python, with every function on PyTorch. Nothing is downloaded. TORCH_CUDA_ARCH_LIST chooses the GPU architectures.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

OLDEST_TORCH = (2, 11)
ARCHITECTURES = "8.0;9.0a;10.0"  # A100; H100, H200; B200
WITH_TORCH = "`pip install --no-build-isolation .`, in an environment that has torch >= 2.11, setuptools and ninja"
FLAGS = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI of torch 2.11
CXX_FLAGS = ["-g0", "-fvisibility=hidden", "-Wno-psabi"]


def headers(*folders: str) -> list[str]:
    """Every header in these folders of csrc/: the build is repeated when one of them changes, also without ninja."""
    return sorted(str(path) for folder in folders for path in Path("csrc", folder).glob("*.*h"))


def reason_not_to_build() -> str:
    """Why there can be no extension here, with what would help; "" if there can be one."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return f"torch is not in the build environment. For the compiled kernels run {WITH_TORCH}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old for the compiled kernels. Run {WITH_TORCH}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler ({compiler}). Install g++ or clang++ or set CXX, then run {WITH_TORCH}"
    return ""


def reason_not_to_build_for_gpus() -> str:
    """The same for the CUDA kernels, where the others can be built. Whether a GPU is visible does not matter."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA, which the library cannot be linked with. "
            "Install a CUDA build of torch; `make cuda-compile` compiles the kernels without one"
        )
    if CUDA_HOME is None or not os.path.exists(os.path.join(CUDA_HOME, "bin", "nvcc")):
        return (
            f"there is no nvcc. Install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME, then run {WITH_TORCH}"
        )
    return ""


def extensions(for_gpus: bool) -> list[Any]:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    folder = "csrc/cpu"
    built = [
        CppExtension(
            "tsae_kernels._cpu",
            [f"{folder}/{name}.cpp" for name in ("ops", "sparse_ops", "baseline", "avx2", "avx512")],
            depends=headers("cpu", "shared"),
            extra_compile_args=FLAGS + CXX_FLAGS,
            py_limited_api=True,
        )
    ]
    if for_gpus:
        # torch's own default is what GPUs it sees, and it fails where it sees none.
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        folder = "csrc/cuda"
        built.append(
            CUDAExtension(
                "tsae_kernels._cuda",
                [f"{folder}/ops.cpp"] + [f"{folder}/{name}.cu" for name in ("forward", "backward", "steps", "runs")],
                depends=headers("cuda", "shared"),
                extra_compile_args={
                    "cxx": [*FLAGS, *CXX_FLAGS, "-DUSE_CUDA"],
                    "nvcc": [*FLAGS, "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA"],
                },
                py_limited_api=True,
            )
        )
    return built


def build_arguments() -> dict[str, Any]:
    choice = os.environ.get("TSAE_BUILD", "")
    if choice not in ("", "cpu", "none", "cuda"):
        sys.exit(f"error: TSAE_BUILD must be cuda, cpu or none (or unset), got {choice!r}")
    if choice == "none":
        return {}
    reason = reason_not_to_build()
    reason_for_gpus = "" if reason or choice == "cpu" else reason_not_to_build_for_gpus()
    if (reason and choice) or (reason_for_gpus and choice == "cuda"):
        sys.exit(f"error: TSAE_BUILD={choice}, but {reason or reason_for_gpus}")
    if reason:
        print(f"warning: tsae_kernels without its compiled kernels: {reason}", file=sys.stderr)  # noqa: T201
        return {}
    for_gpus = choice != "cpu" and not reason_for_gpus
    if choice == "" and not for_gpus:
        print(f"note: tsae_kernels without its CUDA kernels: {reason_for_gpus}", file=sys.stderr)  # noqa: T201

    from torch.utils.cpp_extension import BuildExtension

    return {
        "ext_modules": extensions(for_gpus),
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_arguments())
