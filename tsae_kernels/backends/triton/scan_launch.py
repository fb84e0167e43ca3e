"""The launches of the Triton kernels in `scans.py`: `triton` for `interface.ScanBackend`. Not run on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae_kernels.backends.triton.launch import (
    _block_k,
    _constants,
    _grid,
    _on_device_of,
    _or,
    _segment_ends,
    _strides,
    _triton_dtype,
)
from tsae_kernels.backends.two_state import path_levels
from tsae_kernels.dtypes import dtype_of_stats

_POSITIONS = 16  # whose decisions fit into a word
_BLOCK_T = 64  # kBlock in csrc/shared/operands.h


def viterbi_path(z: Tensor, transition_cost: Tensor, start_cost: Tensor, segments: Tensor | None) -> Tensor:
    """See `interface.ScanBackend`."""
    from tsae_kernels.backends.triton.scans import viterbi_path_kernel

    _, T, k = z.shape
    dtype = dtype_of_stats(z.dtype)
    levels = path_levels(transition_cost, start_cost, dtype)
    on = z.new_empty(z.shape, dtype=torch.uint8)
    block = _block_k(z, 128)
    grid = _grid(z, block)
    decisions = z.new_empty(*grid, -(-T // _POSITIONS), block, dtype=torch.int32)
    if z.shape[0] > 0:
        with _on_device_of(z):
            viterbi_path_kernel[grid](
                z, levels, _or(_segment_ends(segments), decisions), decisions, on,
                T, k, int(segments is not None), *z.stride(),
                COMPUTE=_triton_dtype(dtype), **_constants(z, block, chunk=_POSITIONS), enable_fp_fusion=True,
            )  # fmt: skip
    return on.view(torch.bool)


def leaky_recurrence(a: Tensor, decay: Tensor, segments: Tensor | None) -> Tensor:
    """See `interface.ScanBackend`."""
    from tsae_kernels.backends.triton.scans import leaky_recurrence_kernel

    _, T, k = a.shape
    dtype = dtype_of_stats(a.dtype)
    decay = decay.to(dtype).contiguous()
    h = torch.empty_like(a, memory_format=torch.contiguous_format)
    block = _block_k(a, 256)
    if a.shape[0] > 0:
        with _on_device_of(a):
            leaky_recurrence_kernel[_grid(a, block)](
                a, decay, _or(_segment_ends(segments), decay.view(torch.int32)), h,
                T, k, int(segments is not None), *a.stride(),
                COMPUTE=_triton_dtype(dtype), **_constants(a, block), enable_fp_fusion=True,
            )  # fmt: skip
    return h


def leaky_recurrence_backward(
    grad_h: Tensor, decay: Tensor, a: Tensor | None, h: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `interface.ScanBackend`."""
    from tsae_kernels.backends.triton.scans import leaky_recurrence_backward_kernel

    B, T, k = grad_h.shape
    dtype = dtype_of_stats(grad_h.dtype)
    decay = decay.to(dtype).contiguous()
    grad_a = torch.empty_like(grad_h, memory_format=torch.contiguous_format)
    grad_decay = grad_h.new_empty(B, k, dtype=dtype)
    block = _block_k(grad_h, 128)
    if B > 0:
        with _on_device_of(grad_h):
            leaky_recurrence_backward_kernel[_grid(grad_h, block)](
                grad_h, decay, _or(a, grad_h), _or(h, grad_h), _or(_segment_ends(segments), decay.view(torch.int32)),
                grad_a, grad_decay,
                T, k, int(segments is not None), int(a is not None),
                *grad_h.stride(), *_strides(a, 3), *_strides(h, 3),
                BLOCK_T=_BLOCK_T,
                COMPUTE=_triton_dtype(dtype), **_constants(grad_h, block, a, h), enable_fp_fusion=True,
            )  # fmt: skip
    return grad_a, grad_decay.sum(0)
