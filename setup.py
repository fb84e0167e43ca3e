"""Builds the compiled kernels of tsae_kernels. All metadata is in pyproject.toml.

TSAE_BUILD selects what to build: `cpu` the CPU kernels, `cuda` both the CUDA and the CPU kernels, `none` nothing. If it
is unset, the build includes what the installed torch and compilers allow. Without any kernels the package is pure
Python and computes everything in PyTorch. Nothing is downloaded. TORCH_CUDA_ARCH_LIST selects the GPU architectures.
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
    """Every header in these folders of csrc/. A change to any of them triggers a rebuild, even without ninja."""
    return sorted(str(path) for folder in folders for path in Path("csrc", folder).glob("*.*h"))


def why_no_cpu_build() -> str:
    """Why the compiled kernels cannot be built here and how to fix that; "" if they can."""
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


def why_no_cuda_build() -> str:
    """Why the CUDA kernels cannot be built here, if the CPU kernels can. A visible GPU is not required."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA, and the library must be linked with one. "
            "Install a CUDA build of torch. (`make cuda-compile` only checks that the kernels compile.)"
        )
    if CUDA_HOME is None or not os.path.exists(os.path.join(CUDA_HOME, "bin", "nvcc")):
        return (
            f"there is no nvcc. Install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME, then run {WITH_TORCH}"
        )
    return ""


def extensions(with_cuda: bool) -> list[Any]:
    """The CPU extension and, if requested, the CUDA extension."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    built = [
        CppExtension(
            "tsae_kernels._cpu",
            [f"csrc/cpu/{name}.cpp" for name in ("ops", "sparse_ops", "baseline", "avx2", "avx512")],
            depends=headers("cpu", "shared"),
            extra_compile_args=FLAGS + CXX_FLAGS,
            py_limited_api=True,
        )
    ]
    if with_cuda:
        # By default torch builds for the visible GPUs, and fails if there are none.
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        built.append(
            CUDAExtension(
                "tsae_kernels._cuda",
                ["csrc/cuda/ops.cpp", *sorted(map(str, Path("csrc/cuda").glob("*.cu")))],
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
    """The arguments of `setup` for the kernels that are requested and can be built."""
    choice = os.environ.get("TSAE_BUILD", "")
    if choice not in ("", "cpu", "none", "cuda"):
        sys.exit(f"error: TSAE_BUILD must be cuda, cpu or none (or unset), got {choice!r}")
    if choice == "none":
        return {}
    reason = why_no_cpu_build()
    reason_no_cuda = "" if reason or choice == "cpu" else why_no_cuda_build()
    if (reason and choice) or (reason_no_cuda and choice == "cuda"):
        sys.exit(f"error: TSAE_BUILD={choice}, but {reason or reason_no_cuda}")
    if reason:
        print(f"warning: building tsae_kernels without compiled kernels: {reason}", file=sys.stderr)  # noqa: T201
        return {}
    with_cuda = choice != "cpu" and not reason_no_cuda
    if choice == "" and not with_cuda:
        print(f"note: building tsae_kernels without CUDA kernels: {reason_no_cuda}", file=sys.stderr)  # noqa: T201

    from torch.utils.cpp_extension import BuildExtension

    return {
        "ext_modules": extensions(with_cuda),
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_arguments())
