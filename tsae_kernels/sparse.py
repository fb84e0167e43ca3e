"""Sparse matrix products on a CPU, in the compiled library (csrc/cpu/sparse_ops.cpp), for features that are mostly 0.

The arithmetic is float32; features and their gradient may be bfloat16, as under autocast. The order of every sum is
fixed, whatever the number of threads. Not differentiable: `tsae.sae.sparse_linear` adds the autograd formula.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae_kernels.backends.extension import load_library


class CompressedRows(NamedTuple):
    """A matrix [N, k] in compressed sparse row (CSR) format, with its nonzero entries (NaN included) row by row.

    offsets: [N + 1] int64, where each row begins in `columns` and `values`
    columns: [entries] int32
    values:  [entries] float32
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor


def sparse_products_available() -> bool:
    """Whether the compiled CPU library is available. Every other function here needs it."""
    return not load_library().error


def compress(x: Tensor) -> CompressedRows:
    """x: [N, k] float32 or bfloat16 on the CPU. Raises RuntimeError for any other tensor."""
    return CompressedRows(*torch.ops.tsae_kernels_cpp.sparse_compress(x.contiguous()))


def transpose(rows: CompressedRows, k: int) -> CompressedRows:
    """rows: of [N, k]; out: of [k, N]. Raises RuntimeError if a column index is k or more."""
    return CompressedRows(*torch.ops.tsae_kernels_cpp.sparse_transpose(*rows, k))


def matmul(rows: CompressedRows, dense: Tensor) -> Tensor:
    """rows: of [N, k]; dense: [k, d] float32; out: [N, d] float32. Raises RuntimeError if the shapes do not match."""
    out: Tensor = torch.ops.tsae_kernels_cpp.sparse_matmul(*rows, dense.contiguous())
    return out


def sampled_matmul(rows: CompressedRows, left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``left @ right.T`` at the nonzero positions of ``rows``, 0 elsewhere.

    rows: of [N, k]; left: [N, d], right: [k, d], float32
    out: [N, k], dense, of ``dtype``: float32 or bfloat16. Raises RuntimeError if the shapes do not match.
    """
    half = dtype == torch.bfloat16
    out: Tensor = torch.ops.tsae_kernels_cpp.sparse_sampled_matmul(*rows, left.contiguous(), right.contiguous(), half)
    return out
