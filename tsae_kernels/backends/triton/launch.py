"""The Triton backend: availability, and the launches of the kernels in `forward.py` and its siblings.

Triton is imported on first use. Nothing here waits for the device or copies features: segments become device tensors
by a few fixed-shape operations, and every tensor goes to the kernel with the strides it has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from tsae_kernels.arguments import dtype_of_stats
from tsae_kernels.backends.windows import shrink
from tsae_kernels.bands import Bands

INTERPRETER_VARIABLE = "TRITON_INTERPRET"  # Triton's own
WAYS_OUT = f"use CUDA tensors, or set {INTERPRETER_VARIABLE}=1 before Python starts to run on the CPU, slowly"

_CHUNK = 8  # rows taken at a time
_PAIRS = 4  # bands within this reach are summed pair by pair, see kNarrow in csrc/recurrence.h
_REFRESH = 256  # steps after which a window is summed afresh, see csrc/recurrence.h


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of any device."""
    return os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "yes", "on", "y")


def problem() -> str:
    """Why the backend is not available here and what helps, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    if not torch.cuda.is_available() and not interpreting():
        return f"no CUDA device is visible: {WAYS_OUT}"
    return ""


@functools.cache
def _kernels() -> tuple[ModuleType, ModuleType, ModuleType]:
    from tsae_kernels.backends.triton import backward, forward, steps

    return forward, backward, steps


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _block_k(x: Tensor, row_bytes: int) -> int:
    """Features a program: `row_bytes` of a row, but fewer where the device would not be filled."""
    B, _, k = x.shape
    wanted = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    block = max(row_bytes // x.element_size(), 32)
    while block > 32 and B * -(-k // block) < wanted:
        block //= 2
    return block


def _truncates(x: Tensor) -> bool:
    """Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest."""
    return x.dtype == torch.bfloat16 and interpreting()


def _run_ends(segments: Tensor | None) -> Tensor | None:
    """[B, T] int32: the end of the run that each position lies in, negative for an excluded one."""
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
    """Steps between fresh sums, so many that a fresh sum costs at most two rows a step."""
    return max(_REFRESH, 1 << (reach - 1).bit_length())


def forward_bands(bands: Bands, T: int) -> dict[str, tuple[int, ...]]:
    """FIRST, LAST and TRAIL of `forward_kernel`."""
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
    """The band that is all pairs less the others, if that is safe (docs/mathematics.md, section 3), else -1."""
    covered = 0
    for s, (first, last) in enumerate(bands):
        if first != covered + 1:
            break
        if last >= T - 1:
            return s if max(8 * covered, 1) < T else -1
        covered = last
    return -1


def backward_windows(bands: Bands, T: int) -> dict[str, tuple[int, ...]]:
    """REACH, PLUS and MINUS of `backward_kernel`: neighbouring bands share a window."""
    plus: dict[int, int] = {}
    minus: dict[int, int] = {}
    for s, (first, last) in enumerate(bands):
        if first < T:
            plus[min(last, T - 1)] = s
            minus[first - 1] = s
    minus.pop(0, None)  # the window |u - t| <= 0 pulls at nothing
    reaches = tuple(sorted(plus.keys() | minus.keys()))
    return {
        "REACH": reaches,
        "PLUS": tuple(plus.get(reach, -1) for reach in reaches),
        "MINUS": tuple(minus.get(reach, -1) for reach in reaches),
    }


def _forward(
    pre: Tensor,
    bias: Tensor | None,
    activation: str,
    threshold: Tensor | None,
    release: Tensor | None,
    bands: Bands,
    segments: Tensor | None,
    h: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, k = pre.shape
    dtype = dtype_of_stats(pre.dtype)
    differences = pre.new_empty(B, len(bands), k, dtype=dtype)
    total, square = pre.new_empty(B, k, dtype=dtype), pre.new_empty(B, k, dtype=dtype)
    if B == 0:
        return differences, total, square
    per_position = threshold is not None and threshold.dim() == 3
    level = None if threshold is None else threshold.expand(*pre.shape)
    row_bytes = 256 if pre.element_size() == 2 else 512
    if segments is not None:
        row_bytes //= 2  # the ends of runs take registers too: with the whole row sm_90 spills
    block = _block_k(pre, row_bytes)
    refresh = _refresh(max((min(last, T) for _, last in bands), default=1))
    kernels, _, _ = _kernels()
    with _on_device_of(pre):
        kernels.forward_kernel[(B * -(-k // block),)](
            pre,
            bias,
            level,
            release,
            h,
            differences,
            total,
            square,
            _run_ends(segments),
            T,
            k,
            *pre.stride(),
            *_strides(bias, 1),
            *_strides(level, 3),
            0 if release is None else release.expand(k).stride(0),
            **forward_bands(bands, T),
            OUTER=outer_band(bands, T) if segments is None else -1,
            ACTIVATION=activation,
            LEVEL_PER_POSITION=per_position,
            GUARDED=segments is not None or T % _CHUNK != 0,
            EVEN_K=k % block == 0,
            REFRESH=refresh,
            LONG=refresh < T,
            SHRINK=shrink(pre.dtype),
            TRUNCATES=_truncates(pre),
            BLOCK_K=block,
            CHUNK=_CHUNK,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return differences, total, square


def activate_with_stats(
    pre: Tensor,
    bias: Tensor | None,
    activation: str,
    threshold: Tensor | None,
    release: Tensor | None,
    bands: Bands,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [B, T, k] = activation(pre + bias) and its statistics; see `ops.py`."""
    h = torch.empty_like(pre, memory_format=torch.contiguous_format)
    return h, *_forward(pre, bias, activation, threshold, release, bands, segments, h)


def temporal_stats(h: Tensor, bands: Bands, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """differences [B, S, k], total [B, k] and square [B, k] of h [B, T, k]; see `ops.py`."""
    return _forward(h, None, "identity", None, None, bands, segments, None)


def activate_with_stats_backward(
    saved: Tensor,
    bias: Tensor | None,
    grad_h: Tensor | None,
    grad_differences: Tensor | None,
    grad_total: Tensor | None,
    grad_square: Tensor | None,
    activation: str,
    bands: Bands,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """grad_pre [B, T, k] and grad_bias [k]; `saved` is h, or for gelu pre; see `ops.py`."""
    B, T, k = saved.shape
    grad_pre = torch.empty_like(saved, memory_format=torch.contiguous_format)
    grad_bias = saved.new_empty(B, k, dtype=dtype_of_stats(saved.dtype))
    if B == 0:
        return grad_pre, grad_bias.sum(0)
    windows = backward_windows(bands if grad_differences is not None else (), T)
    sliding = [reach for reach in windows["REACH"] if reach < T - 1]
    refresh = _refresh(max(sliding, default=1))
    block = _block_k(saved, 128)
    _, kernels, _ = _kernels()
    with _on_device_of(saved):
        kernels.backward_kernel[(B * -(-k // block),)](
            saved,
            bias,
            grad_h,
            grad_differences,
            grad_total,
            grad_square,
            _run_ends(segments),
            grad_pre,
            grad_bias,
            T,
            k,
            *saved.stride(),
            *_strides(bias, 1),
            *_strides(grad_h, 3),
            *_strides(grad_differences, 3),
            *_strides(grad_total, 2),
            *_strides(grad_square, 2),
            S=len(bands),
            **windows,
            COVERS=len(sliding) < len(windows["REACH"]),
            ACTIVATION=activation,
            GUARDED=segments is not None or T % _CHUNK != 0,
            EVEN_K=k % block == 0,
            REFRESH=refresh,
            LONG=refresh < T,
            SHRINK=shrink(saved.dtype),
            TRUNCATES=_truncates(saved),
            BLOCK_K=block,
            CHUNK=_CHUNK,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return grad_pre, grad_bias.sum(0)


def step_energy(h: Tensor, weights: Tensor) -> Tensor:
    """[]: the sum of weights[b, t] * (h[b, t+1, j] - h[b, t, j])^2."""
    B, T, k = h.shape
    dtype = dtype_of_stats(h.dtype)
    block = _block_k(h, 256)
    energy = h.new_empty(B * -(-k // block), dtype=torch.float64)
    if B > 0:
        _, _, kernels = _kernels()
        with _on_device_of(h):
            kernels.step_energy_kernel[(len(energy),)](
                h,
                weights,
                energy,
                T,
                k,
                *h.stride(),
                *weights.stride(),
                BLOCK_K=block,
                CHUNK=_CHUNK,
                BLOCK_T=_REFRESH,
                COMPUTE=_triton_dtype(dtype),
                num_warps=1,
                enable_fp_fusion=True,
            )
    return energy.sum().to(dtype)


def step_energy_backward(h: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """grad_h [B, T, k] for the gradient of the energy, a [] tensor."""
    B, T, k = h.shape
    grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    block = _block_k(h, 256)
    if B > 0:
        _, _, kernels = _kernels()
        with _on_device_of(h):
            kernels.step_energy_backward_kernel[(B * -(-k // block),)](
                h,
                weights,
                grad,
                grad_h,
                T,
                k,
                *h.stride(),
                *weights.stride(),
                BLOCK_K=block,
                CHUNK=_CHUNK,
                COMPUTE=_triton_dtype(dtype_of_stats(h.dtype)),
                TRUNCATES=_truncates(h),
                num_warps=1,
                enable_fp_fusion=True,
            )
    return grad_h


def _triton_dtype(dtype: torch.dtype):
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
