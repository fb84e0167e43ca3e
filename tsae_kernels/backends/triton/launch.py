"""The Triton backend: whether it is available, and the launches of the kernels in this folder.

Triton is imported on first use. Nothing here waits for the device or copies features: segments become device tensors
by a few fixed-shape operations, and every tensor goes to the kernel with the strides it has.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from tsae_kernels.backends.interface import Activation, Gradients
from tsae_kernels.bands import Bands
from tsae_kernels.dtypes import dtype_of_stats, sum_scale

INTERPRETER_VARIABLE = "TRITON_INTERPRET"  # Triton's own
HINT = f"use CUDA tensors, or set {INTERPRETER_VARIABLE}=1 before starting Python to run (slowly) on the CPU"

_CHUNK = 8  # rows loaded at a time
_PAIRS = 4  # bands within this reach are summed pair by pair, see band_block in csrc/shared/recurrence.h
_REFRESH = 256  # steps after which a window is summed afresh, kRefresh in csrc/shared/recurrence.h


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of any device."""
    return os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "yes", "on", "y")


def unavailable_reason() -> str:
    """Why the backend is unavailable here and how to fix that; "" if it is available."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    if not torch.cuda.is_available() and not interpreting():
        return f"no CUDA device is visible: {HINT}"
    return ""


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _block_k(x: Tensor, row_bytes: int) -> int:
    """Features per program: `row_bytes` of a row, or fewer if there would be too few programs to fill the device."""
    B, _, k = x.shape
    wanted = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    block = max(row_bytes // x.element_size(), 32)
    while block > 32 and B * -(-k // block) < wanted:
        block //= 2
    return block


def _grid(x: Tensor, block: int) -> tuple[int]:
    """One program for each sequence and block of features."""
    return (x.shape[0] * -(-x.shape[2] // block),)


def _truncates(x: Tensor) -> bool:
    """Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest."""
    return x.dtype == torch.bfloat16 and interpreting()


def _segment_ends(segments: Tensor | None) -> Tensor | None:
    """[B, T] int32: the end of the segment that each position is in, negative where excluded."""
    if segments is None:
        return None
    T = segments.shape[1]
    last = torch.ones_like(segments, dtype=torch.bool)
    last[:, :-1] = segments[:, 1:] != segments[:, :-1]
    ends = torch.where(last, torch.arange(1, T + 1, device=segments.device), T)
    ends = ends.flip(1).cummin(1).values.flip(1)
    return torch.where(segments >= 0, ends, -ends).int()


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else x.stride()


def _refresh(reach: int) -> int:
    """Steps between fresh sums of a window: enough for a fresh sum to cost at most two rows a step."""
    return max(_REFRESH, 1 << (reach - 1).bit_length())


def forward_bands(bands: Bands, T: int) -> dict[str, tuple[int, ...]]:
    """The constants FIRST, LAST and TRAIL of `forward_kernel`."""
    rows = []
    for first, last in bands:
        last = min(last, T - 1)
        if first > last:
            rows.append((0, 0, -1))
        elif first == last or last <= _PAIRS:
            rows.append((first, last, -1))
        else:
            rows.append((first, last, last + 1 if last + 1 < T else 0))
    return {name: tuple(row[i] for row in rows) for i, name in enumerate(("FIRST", "LAST", "TRAIL"))}


def outer_band(bands: Bands, T: int) -> int:
    """The band to compute as all pairs minus the other bands, or -1 if that is not safe.

    docs/mathematics.md, section 3, says when it is.
    """
    covered = 0
    for s, (first, last) in enumerate(bands):
        if first != covered + 1:
            break
        if last >= T - 1:
            return s if max(8 * covered, 1) < T else -1
        covered = last
    return -1


def backward_windows(bands: Bands, T: int) -> dict[str, tuple[int, ...]]:
    """The constants REACH, PLUS and MINUS of `backward_kernel`; adjacent bands share a window."""
    plus: dict[int, int] = {}
    minus: dict[int, int] = {}
    for s, (first, last) in enumerate(bands):
        if first < T:
            plus[min(last, T - 1)] = s
            minus[first - 1] = s
    minus.pop(0, None)  # the window |u - t| <= 0 contributes nothing
    reaches = tuple(sorted(plus.keys() | minus.keys()))
    return {
        "REACH": reaches,
        "PLUS": tuple(plus.get(reach, -1) for reach in reaches),
        "MINUS": tuple(minus.get(reach, -1) for reach in reaches),
    }


def _constants(x: Tensor, activation: str, segments: Tensor | None, reach: int, block: int) -> dict[str, Any]:
    """Constants of both the forward and the backward kernel, and the launch option `num_warps`.

    reach: of the widest window that slides
    """
    _, T, k = x.shape
    refresh = _refresh(reach)
    return {
        "ACTIVATION": activation,
        "GUARDED": segments is not None or T % _CHUNK != 0,
        "EVEN_K": k % block == 0,
        "REFRESH": refresh,
        "LONG": refresh < T,
        "SCALE": sum_scale(x.dtype),
        "TRUNCATES": _truncates(x),
        "BLOCK_K": block,
        "CHUNK": _CHUNK,
        "num_warps": 1,
    }


def _forward(
    pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None, h: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from tsae_kernels.backends.triton.forward import forward_kernel

    B, T, k = pre.shape
    dtype = dtype_of_stats(pre.dtype)
    differences = pre.new_empty(B, len(bands), k, dtype=dtype)
    total, square = pre.new_empty(B, k, dtype=dtype), pre.new_empty(B, k, dtype=dtype)
    if B == 0:
        return differences, total, square
    name, bias, threshold, release = activation
    per_position = threshold is not None and threshold.dim() == 3
    threshold = None if threshold is None else threshold.expand(*pre.shape)
    row_bytes = 256 if pre.element_size() == 2 else 512
    if segments is not None:
        row_bytes //= 2  # segment ends take registers too: with the full row sm_90 spills
    block = _block_k(pre, row_bytes)
    reach = max((min(last, T) for _, last in bands), default=1)
    inputs = pre, bias, threshold, release
    strides = *pre.stride(), *_strides(bias, 1), *_strides(threshold, 3)
    release_stride = 0 if release is None else release.expand(k).stride(0)
    outputs = h, differences, total, square
    with _on_device_of(pre):
        forward_kernel[_grid(pre, block)](
            *inputs, *outputs, _segment_ends(segments), T, k, *strides, release_stride,
            **forward_bands(bands, T),
            OUTER=outer_band(bands, T) if segments is None else -1,
            THRESHOLD_PER_POSITION=per_position,
            **_constants(pre, name, segments, reach, block),
            enable_fp_fusion=False,
        )  # fmt: skip
    return differences, total, square


def activate_with_stats(
    pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `interface.Backend`."""
    h = torch.empty_like(pre, memory_format=torch.contiguous_format)
    return h, *_forward(pre, activation, bands, segments, h)


def temporal_stats(h: Tensor, bands: Bands, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `interface.Backend`."""
    return _forward(h, Activation("identity"), bands, segments, None)


def activate_with_stats_backward(
    saved: Tensor,
    grads: Gradients,
    activation: Activation,
    bands: Bands,
    segments: Tensor | None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `interface.Backend`."""
    from tsae_kernels.backends.triton.backward import backward_kernel

    B, T, k = saved.shape
    grad_pre = torch.empty_like(saved, memory_format=torch.contiguous_format)
    grad_bias = saved.new_empty(B, k, dtype=dtype_of_stats(saved.dtype))
    if B == 0:
        return grad_pre, grad_bias.sum(0)
    bias = activation.bias
    windows = backward_windows(bands if grads.differences is not None else (), T)
    sliding = [reach for reach in windows["REACH"] if reach < T - 1]
    block = _block_k(saved, 128)
    strides = *saved.stride(), *_strides(bias, 1), *_strides(grads.h, 3), *_strides(grads.differences, 3)
    strides += *_strides(grads.total, 2), *_strides(grads.square, 2)
    with _on_device_of(saved):
        backward_kernel[_grid(saved, block)](
            saved, bias, *grads, _segment_ends(segments), grad_pre, grad_bias, T, k, *strides,
            S=len(bands),
            **windows,
            COVERS=len(sliding) < len(windows["REACH"]),
            **_constants(saved, activation.name, segments, max(sliding, default=1), block),
            enable_fp_fusion=True,
        )  # fmt: skip
    return grad_pre, grad_bias.sum(0)


def step_energy(h: Tensor, weights: Tensor) -> Tensor:
    """See `interface.Backend`."""
    from tsae_kernels.backends.triton.steps import step_energy_kernel

    B, T, k = h.shape
    dtype = dtype_of_stats(h.dtype)
    block = _block_k(h, 256)
    grid = _grid(h, block)
    energy = h.new_empty(grid, dtype=torch.float64)
    if B > 0:
        with _on_device_of(h):
            step_energy_kernel[grid](
                h, weights, energy, T, k, *h.stride(), *weights.stride(),
                BLOCK_K=block, CHUNK=_CHUNK, BLOCK_T=_REFRESH, COMPUTE=_triton_dtype(dtype),
                num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
    return energy.sum().to(dtype)


def step_energy_backward(h: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """See `interface.Backend`."""
    from tsae_kernels.backends.triton.steps import step_energy_backward_kernel

    B, T, k = h.shape
    grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    block = _block_k(h, 256)
    if B > 0:
        with _on_device_of(h):
            step_energy_backward_kernel[_grid(h, block)](
                h, weights, grad, grad_h, T, k, *h.stride(), *weights.stride(),
                BLOCK_K=block, CHUNK=_CHUNK, COMPUTE=_triton_dtype(dtype_of_stats(h.dtype)), TRUNCATES=_truncates(h),
                num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
    return grad_h


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
