"""The Triton kernel of `tsae_kernels.row_adam`: one program for each row. Bound by memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tsae_kernels.backends.triton.forward import narrow
from tsae_kernels.backends.triton.launch import _on_device_of, interpreting

_BLOCK = 4096  # columns held in registers at a time


@triton.jit
def row_adam_kernel(
    weight,
    exp_avg,
    exp_avg_sq,
    rows,
    fired,
    share,
    shadow,
    scalars,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    D: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A step of Adam on one row. `scalars`: lr / bias correction, root of the second one, weight kept, clip, go."""
    row = tl.program_id(0).to(tl.int64)
    width = tl.load(scalars + 4).to(tl.int32) * D  # columns to update, all or none
    read = tl.load(fired + row).to(tl.int32) * width  # columns of the gradient to read
    step_size = tl.load(scalars)
    root = tl.load(scalars + 1)
    keep = tl.load(scalars + 2)
    clip = tl.load(scalars + 3)
    s = 0.0
    if HAS_SHARE:
        s = tl.load(share + row)
    length = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        at = row * D + column
        w = tl.load(weight + at, mask=inside, other=0.0)
        m = tl.load(exp_avg + at, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        g = tl.load(rows + at, mask=column < read, other=0.0)
        if HAS_SHARE:
            g -= s * w
        g *= clip
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * (g * g)
        w = w * keep - step_size * m / (tl.sqrt(v) / root + eps)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        length += tl.where(inside, w * w, 0.0)
        if D > BLOCK or not UNIT_NORM:
            tl.store(weight + at, w, mask=inside)
        if HAS_SHADOW and not UNIT_NORM:
            tl.store(shadow + at, narrow(w, tl.bfloat16, ROUNDING), mask=inside)
    if UNIT_NORM:
        norm = tl.maximum(tl.sqrt(tl.sum(length, 0)), 1e-12)
        if D > BLOCK:
            tl.debug_barrier()  # the row is read again below
        for start in tl.static_range(0, D, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            at = row * D + column
            if D > BLOCK:
                w = tl.load(weight + at, mask=inside, other=0.0)
            w /= norm
            tl.store(weight + at, w, mask=inside)
            if HAS_SHADOW:
                tl.store(shadow + at, narrow(w, tl.bfloat16, ROUNDING), mask=inside)


def _block(D: int) -> int:
    return min(1 << max(D - 1, 0).bit_length(), _BLOCK)


def launch_row_adam(
    weight: Tensor,
    moments: tuple[Tensor, ...],
    rows: Tensor,
    fired: Tensor,
    share: Tensor | None,
    shadow: Tensor | None,
    scalars: Tensor,
    betas: tuple[float, float],
    eps: float,
    unit_norm: bool,
) -> None:
    """Updates ``weight``, ``moments`` and ``shadow``. ``scalars``: [5] float32, see `row_adam_kernel`."""
    k, D = weight.shape
    first, second = betas
    with _on_device_of(weight):
        row_adam_kernel[(k,)](
            weight, *moments, rows, fired, share, shadow, scalars, first, 1.0 - first, second, 1.0 - second, eps,
            D=D,
            HAS_SHARE=share is not None,
            HAS_SHADOW=shadow is not None,
            UNIT_NORM=unit_norm,
            ROUNDING="bits" if interpreting() else "cast",
            BLOCK=_block(D),
            num_warps=_warps(D),
        )  # fmt: skip


def _warps(D: int) -> int:
    return 8 if _block(D) >= 2048 else 4
