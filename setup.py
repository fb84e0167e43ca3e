"""Builds the compiled kernels of tsae_kernels; all metadata is in pyproject.toml.

TSAE_BUILD = cpu | none | cuda forces or skips them; unset, they are built where torch and a C++ compiler are, and else
the package is pure Python, with every function on PyTorch.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from setuptools import setup

OLDEST_TORCH = (2, 11)
WITH_TORCH = "`pip install --no-build-isolation .`, in an environment that has torch >= 2.11, setuptools and ninja"


def reason_not_to_build() -> str:
    """Why there can be no extension here, with what would help; "" if there can be one."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return f"torch is not in the build environment. For the compiled CPU kernels run {WITH_TORCH}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old for the compiled kernels. Run {WITH_TORCH}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler ({compiler}). Install g++ or clang++ or set CXX, then run {WITH_TORCH}"
    return ""


def build_arguments() -> dict[str, Any]:
    choice = os.environ.get("TSAE_BUILD", "")
    if choice not in ("", "cpu", "none", "cuda"):
        sys.exit(f"error: TSAE_BUILD must be cpu, none or cuda (or unset), got {choice!r}")
    if choice == "cuda":
        sys.exit("error: TSAE_BUILD=cuda: the CUDA kernels are not in this version; use TSAE_BUILD=cpu or unset it")
    if choice == "none":
        return {}
    reason = reason_not_to_build()
    if reason and choice == "cpu":
        sys.exit(f"error: TSAE_BUILD=cpu, but {reason}")
    if reason:
        print(f"warning: tsae_kernels without its compiled kernels: {reason}", file=sys.stderr)  # noqa: T201
        return {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    folder = "csrc/cpu"
    extension = CppExtension(
        "tsae_kernels._cpu",
        [f"{folder}/{name}.cpp" for name in ("ops", "baseline", "avx2", "avx512")],
        depends=[f"{folder}/{name}.h" for name in ("kernels", "pack", "tiles")] + ["csrc/recurrence.h"],
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-Wno-psabi",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11
        ],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_arguments())
