"""The Triton kernels of the weighted energy of steps along T (TC-SAE's window loss) and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from tsae_kernels.backends.triton.forward import (
    column_pointers,
    each,
    load_rows,
    narrow,
    row_pointers,
    sequence_and_columns,
)


@triton.jit(
    do_not_specialize=["T", "k", "h_b", "h_t", "h_k", "weights_b", "weights_t"],
    do_not_specialize_on_alignment=["h", "weights", "energy"],
)
def step_energy_kernel(
    h,
    weights,
    energy,
    T,
    k,
    h_b,
    h_t,
    h_k,
    weights_b,
    weights_t,
    BLOCK_T: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """energy [programs] float64: sum of weight * step^2 per program. Pairs of zero weight are ignored, even NaN."""
    b, columns = sequence_and_columns(k, BLOCK_K, VECTOR)
    x_in = column_pointers(h, b, h_b, columns, h_k, VECTOR)
    before = tl.load(x_in).to(COMPUTE)
    upcoming = load_rows(row_pointers(x_in, 1, h_t, VECTOR), h_t, T - 1, columns, CHUNK, True, VECTOR)
    total = tl.zeros([BLOCK_K], tl.float64)
    for begin in range(1, T, BLOCK_T):
        part = tl.zeros([BLOCK_K], COMPUTE)
        for t in range(begin, tl.minimum(begin + BLOCK_T, T), CHUNK):
            arrived = upcoming
            at = row_pointers(x_in, t + CHUNK, h_t, VECTOR)
            upcoming = load_rows(at, h_t, T - t - CHUNK, columns, CHUNK, True, VECTOR)
            for i in tl.static_range(CHUNK):
                at = weights + b * weights_b + tl.cast(t - 1 + i, tl.int64) * weights_t
                weight = tl.load(at, mask=t + i < T, other=0.0).to(COMPUTE)
                now = arrived[i].to(COMPUTE)
                step = now - before
                part = part + tl.where(weight != 0, step * step * weight, 0.0)
                before = now
        total = total + part.to(tl.float64)
    # Features of the previous block, and the last feature repeated, count once.
    start = (tl.program_id(0) % tl.cdiv(k, BLOCK_K)) * BLOCK_K
    once = columns >= start
    if not VECTOR:
        once = start + tl.arange(0, BLOCK_K) < k
    tl.store(energy + tl.program_id(0), tl.sum(tl.where(once, total, 0.0), 0))


@triton.jit(
    do_not_specialize=["T", "k", "h_b", "h_t", "h_k", "weights_b", "weights_t"],
    do_not_specialize_on_alignment=["h", "weights", "grad", "grad_h"],
)
def step_energy_backward_kernel(
    h,
    weights,
    grad,
    grad_h,
    T,
    k,
    h_b,
    h_t,
    h_k,
    weights_b,
    weights_t,
    COMPUTE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """grad_h [B, T, k] from grad [], the gradient of the energy. The weight at T - 1 is not read."""
    b, columns = sequence_and_columns(k, BLOCK_K, VECTOR)
    x_in = column_pointers(h, b, h_b, columns, h_k, VECTOR)
    out = grad_h + b * T * k + columns
    scale = tl.load(grad).to(COMPUTE) * 2
    now = tl.load(x_in).to(COMPUTE)
    from_before = tl.zeros([BLOCK_K], COMPUTE)
    upcoming = load_rows(row_pointers(x_in, 1, h_t, VECTOR), h_t, T - 1, columns, CHUNK, True, VECTOR)
    for t in range(0, T, CHUNK):
        arrived = upcoming
        at = row_pointers(x_in, t + 1 + CHUNK, h_t, VECTOR)
        upcoming = load_rows(at, h_t, T - t - 1 - CHUNK, columns, CHUNK, True, VECTOR)
        to = row_pointers(out, t, k, VECTOR)
        for i in tl.static_range(CHUNK):
            at = weights + b * weights_b + tl.cast(t + i, tl.int64) * weights_t
            weight = tl.load(at, mask=t + i + 1 < T, other=0.0).to(COMPUTE)
            after = arrived[i].to(COMPUTE)
            from_after = tl.where(weight != 0, (after - now) * (scale * weight), 0.0)
            gradient = narrow(from_before - from_after, grad_h.dtype.element_ty, ROUNDING)
            tl.store(row_pointers(to, i, k, VECTOR), gradient, mask=each(columns, t + i) < T)
            from_before = from_after
            now = after
