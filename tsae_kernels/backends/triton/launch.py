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
_FARTHEST = 2**29  # no sequence is longer
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


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _block_k(x: Tensor, row_bytes: int) -> int:
    """Features per program: `row_bytes` of a row, or half if there would be too few programs to fill the device."""
    B, _, k = x.shape
    block = max(row_bytes // x.element_size(), 64)
    return block if B * -(-k // block) >= _programs_wanted(x) else block // 2


def _programs_wanted(x: Tensor) -> int:
    return 8 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _grid(x: Tensor, block: int) -> tuple[int]:
    """One program for each sequence and block of features."""
    return (x.shape[0] * -(-x.shape[2] // block),)


def _vector(block: int, *tensors: Tensor | None) -> bool:
    """Whether all tensors [B, T, k] have adjacent features in rows aligned to 16 bytes, and k >= block."""
    for x in tensors:
        if x is None:
            continue
        B, T, k = x.shape
        steps = (x.stride(0) if B > 1 else 0, x.stride(1) if T > 1 else 0, k, x.data_ptr() // x.element_size())
        if k < block or x.stride(2) != 1 or any(step * x.element_size() % 16 for step in steps):
            return False
    return True


def _rounding(x: Tensor) -> str:
    """The constant ROUNDING of the kernels, see `forward.narrow`."""
    if x.element_size() > 2:
        return "cast"
    if interpreting():
        return "bits" if x.dtype == torch.bfloat16 else "cast"
    return "pairs"


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


def forward_bands(bands: Bands, outer: int) -> dict[str, tuple[int, ...]]:
    """The constants FIRST, LAST and TRAIL of `forward_kernel`. They do not depend on T. outer: of `outer_band`"""
    rows = []
    for s, (first, last) in enumerate(_within_reach(bands)):
        if s == outer:
            rows.append((first, 0, 0))
        else:
            rows.append((first, last, -1 if first == last or last <= _PAIRS else last + 1))
    return {name: tuple(row[i] for row in rows) for i, name in enumerate(("FIRST", "LAST", "TRAIL"))}


def _within_reach(bands: Bands) -> Bands:
    """The bands with offsets of at most `_FARTHEST`, so that a position plus an offset is a 32-bit number."""
    return tuple((min(first, _FARTHEST), min(last, _FARTHEST)) for first, last in bands)


def outer_band(bands: Bands, T: int) -> int:
    """The band to compute as all pairs minus the other bands, or -1 if that is not safe.

    docs/mathematics.md, section 3, says when it is.
    """
    covered = 0
    for s, (first, last) in enumerate(bands):
        if first != covered + 1:
            break
        if last >= T - 1:
            return s if max(8 * covered, 2 * _CHUNK) < T else -1  # in fewer rows it saves nothing
        covered = last
    return -1


def backward_windows(bands: Bands) -> dict[str, tuple[int, ...]]:
    """The constants FIRST, REACH, PLUS and MINUS of `backward_kernel`; adjacent bands share a window."""
    bands = _within_reach(bands)
    plus = {last: s for s, (_, last) in enumerate(bands)}
    minus = {first - 1: s for s, (first, _) in enumerate(bands)}
    minus.pop(0, None)  # the window |u - t| <= 0 contributes nothing
    reaches = tuple(sorted(plus.keys() | minus.keys()))
    return {
        "FIRST": tuple(first for first, _ in bands),
        "REACH": reaches,
        "PLUS": tuple(plus.get(reach, -1) for reach in reaches),
        "MINUS": tuple(minus.get(reach, -1) for reach in reaches),
    }


def _constants(x: Tensor, block: int, *tensors: Tensor | None, chunk: int = _CHUNK) -> dict[str, Any]:
    """Constants of all kernels, and the launch option `num_warps`.

    tensors: the others that are walked along T
    chunk: rows at a time; fewer for a kernel that would spill registers or take long to compile
    """
    return {
        "ROUNDING": _rounding(x),
        "BLOCK_K": block,
        "CHUNK": chunk,
        "VECTOR": _vector(block, x, *tensors),
        "num_warps": 1,
        "maxnreg": 255,  # all there are: by itself ptxas spills some for another warp
    }


def _or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """x, or a tensor to pass in its place that the kernel does not read."""
    return stand_in if x is None else x


def _present(*tensors: Tensor | None) -> list[int]:
    return [int(x is not None) for x in tensors]


def _forward(
    pre: Tensor,
    activation: Activation,
    bands: Bands,
    segments: Tensor | None,
    transitions: bool,
    output: str,
    out: Tensor | None,
) -> tuple[Tensor, ...]:
    """The statistics. output: what is written to `out`, see `forward_kernel`"""
    from tsae_kernels.backends.triton.forward import forward_kernel

    B, T, k = pre.shape
    dtype = dtype_of_stats(pre.dtype)
    differences = pre.new_empty(B, len(bands), k, dtype=dtype)
    total, square = pre.new_empty(B, k, dtype=dtype), pre.new_empty(B, k, dtype=dtype)
    counts = pre.new_empty(B, 3, k, dtype=torch.int32) if transitions else None
    stats = (differences, total, square) if counts is None else (differences, total, square, counts)
    if B == 0:
        return stats
    # Small tensors in one dtype, because another one would compile another kernel.
    name, (bias, threshold, release) = activation.name, (x if x is None else x.to(dtype) for x in activation[1:])
    per_position = threshold is not None and threshold.dim() == 3
    threshold_strides = (0,) * 3 if threshold is None else threshold.expand(*pre.shape).stride()
    release_stride = 0 if release is None else release.expand(k).stride(0)
    outer = outer_band(bands, T) if segments is None else -1
    block = _block_k(pre, 128 if output == "mask" else 256)  # with a wider row, the mask spills registers
    reach = max((min(last, T) for s, (_, last) in enumerate(bands) if s != outer), default=1)
    stand_in = total.view(torch.int32)
    with _on_device_of(pre):
        forward_kernel[_grid(pre, block)](
            pre, _or(bias, total), _or(threshold, total), _or(release, total), _or(out, stand_in),
            differences, total, square, _or(counts, stand_in), _or(_segment_ends(segments), stand_in),
            T, k, _refresh(reach), *_present(bias, threshold, release, segments),
            *pre.stride(), *_strides(bias, 1), *threshold_strides, release_stride,
            **forward_bands(bands, outer),
            OUTER=outer,
            ACTIVATION=name,
            OUTPUT=output,
            THRESHOLD_PER_POSITION=per_position,
            SCALE=sum_scale(pre.dtype),
            COUNTED=transitions,
            **_constants(pre, block),
            enable_fp_fusion=False,
        )  # fmt: skip
    return stats


def activate_with_stats(
    pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None, transitions: bool = False
) -> tuple[Tensor, ...]:
    """See `interface.Backend`."""
    h = torch.empty_like(pre, memory_format=torch.contiguous_format)
    return h, *_forward(pre, activation, bands, segments, transitions, "h", h)


def activate_with_mask(
    pre: Tensor, activation: Activation, bands: Bands, segments: Tensor | None, transitions: bool = False
) -> tuple[Tensor, ...]:
    """See `interface.Backend`."""
    B, T, k = pre.shape
    active = pre.new_empty(B, -(-T // 32), k, dtype=torch.int32)
    return active, *_forward(pre, activation, bands, segments, transitions, "mask", active)


def temporal_stats(h: Tensor, bands: Bands, segments: Tensor | None, transitions: bool = False) -> tuple[Tensor, ...]:
    """See `interface.Backend`."""
    return _forward(h, Activation("identity"), bands, segments, transitions, "nothing", None)


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
    windows = backward_windows(bands)
    covers = bool(bands) and windows["REACH"][-1] >= T - 1
    sliding = [min(reach, T) for reach in windows["REACH"][: -1 if covers else None]]
    block = _block_k(saved, 128)
    present = _present(bias, grads.differences, grads.total, grads.square, segments)
    # Each combination of absent gradients would compile a kernel. There are two: for a training step, and for any.
    training = activation.name == "relu" and [x is not None for x in grads] == [True, True, False, False]
    if grads.h is None:
        grads = grads._replace(h=saved.new_zeros(k).expand(saved.shape))
    strides = *saved.stride(), *_strides(bias, 1), *_strides(grads.h, 3), *_strides(grads.differences, 3)
    strides += *_strides(grads.total, 2), *_strides(grads.square, 2)
    stand_ins = grad_pre, grad_bias, grad_bias, grad_bias
    with _on_device_of(saved):
        backward_kernel[_grid(saved, block)](
            saved, _or(bias, grad_bias), *map(_or, grads, stand_ins),
            _or(_segment_ends(segments), grad_bias.view(torch.int32)), grad_pre, grad_bias,
            T, k, _refresh(max(sliding, default=1)), *present, *strides,
            **windows,
            COVERS=covers,
            ACTIVATION=activation.name,
            HAS_SUMS=not training,
            SCALE=sum_scale(saved.dtype),
            **_constants(saved, block, grads.h, chunk=_CHUNK // 2),
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
                BLOCK_T=_REFRESH, COMPUTE=_triton_dtype(dtype), **_constants(h, block), enable_fp_fusion=True,
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
                COMPUTE=_triton_dtype(dtype_of_stats(h.dtype)), **_constants(h, block), enable_fp_fusion=True,
            )  # fmt: skip
    return grad_h


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
