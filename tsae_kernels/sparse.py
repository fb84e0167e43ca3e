"""Products that skip the zeros of the features, on a CPU, in the compiled library (csrc/cpu/sparse_ops.cpp). The
arithmetic is float32; features and their gradient may be bfloat16, as under autocast.

Not differentiable; `tsae.sae.sparse_linear` makes a training step out of them. The order of every sum is
fixed, whatever the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae_kernels.backends.extension import load_library

__all__ = ["CompressedRows", "compress", "matmul", "sampled_matmul", "sparse_products_available", "transpose"]


class CompressedRows(NamedTuple):
    """The entries of a matrix [N, k] that are not 0 (NaN is not), row after row.

    offsets: [N + 1] int64, where each row begins in the other two
    columns: [entries] int32
    values:  [entries] float32
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor


def sparse_products_available() -> bool:
    """Whether the compiled CPU library is there; every function here needs it."""
    return not load_library().problem


def compress(x: Tensor) -> CompressedRows:
    """x: [N, k] float32 or bfloat16 on the CPU. Raises RuntimeError for anything else."""
    return CompressedRows(*torch.ops.tsae_kernels_cpp.sparse_compress(x.contiguous()))


def transpose(rows: CompressedRows, k: int) -> CompressedRows:
    """rows: of [N, k]; out: of [k, N]. Raises RuntimeError if a column is not less than k."""
    return CompressedRows(*torch.ops.tsae_kernels_cpp.sparse_transpose(*rows, k))


def matmul(rows: CompressedRows, dense: Tensor) -> Tensor:
    """rows: of [N, k]; dense: [k, d] float32; out: [N, d] float32. Raises RuntimeError if shapes do not fit."""
    return torch.ops.tsae_kernels_cpp.sparse_matmul(*rows, dense.contiguous())


def sampled_matmul(rows: CompressedRows, left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``left @ right.T`` at the entries of ``rows`` (whatever their values are), 0 elsewhere.

    rows: of [N, k]; left: [N, d], right: [k, d], float32
    out: [N, k], dense, of ``dtype``: float32 or bfloat16. Raises RuntimeError if shapes do not fit.
    """
    half = dtype == torch.bfloat16
    return torch.ops.tsae_kernels_cpp.sparse_sampled_matmul(*rows, left.contiguous(), right.contiguous(), half)
