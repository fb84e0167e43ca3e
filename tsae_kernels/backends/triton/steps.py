"""The Triton kernels of the weighted energy of steps along T (TC-SAE's window loss) and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from tsae_kernels.backends.triton.forward import load_rows, mask_if, narrow, row_pointers, sequence_and_columns


@triton.jit(do_not_specialize=["T"])
def step_energy_kernel(
    h,
    weights,
    energy,
    T,
    k: tl.constexpr,
    h_b,
    h_t: tl.constexpr,
    h_k,
    weights_b,
    weights_t,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """energy [programs] float64: sum of weight * step^2 per program. Pairs of zero weight are ignored, even NaN."""
    b, columns, inside = sequence_and_columns(k, BLOCK_K, False)
    x_in = h + b * h_b + columns * h_k
    before = tl.load(x_in, mask=inside, other=0.0).to(COMPUTE)
    upcoming = load_rows(x_in + h_t, h_t, T - 1, inside, CHUNK, True)
    total = tl.zeros([BLOCK_K], tl.float64)
    for begin in range(1, T, BLOCK_T):
        part = tl.zeros([BLOCK_K], COMPUTE)
        for t in range(begin, tl.minimum(begin + BLOCK_T, T), CHUNK):
            arrived = upcoming
            upcoming = load_rows(row_pointers(x_in, t + CHUNK, h_t), h_t, T - t - CHUNK, inside, CHUNK, True)
            for i in tl.static_range(CHUNK):
                at = row_pointers(weights + b * weights_b, t - 1 + i, weights_t)
                weight = tl.load(at, mask=t + i < T, other=0.0).to(COMPUTE)
                now = arrived[i].to(COMPUTE)
                step = now - before
                part = part + tl.where(weight != 0, step * step * weight, 0.0)
                before = now
        total = total + part.to(tl.float64)
    tl.store(energy + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["T"])
def step_energy_backward_kernel(
    h,
    weights,
    grad,
    grad_h,
    T,
    k: tl.constexpr,
    h_b,
    h_t: tl.constexpr,
    h_k,
    weights_b,
    weights_t,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
    TRUNCATES: tl.constexpr,
):
    """grad_h [B, T, k] from grad [], the gradient of the energy. The weight at T - 1 is not read."""
    b, columns, inside = sequence_and_columns(k, BLOCK_K, False)
    x_in = h + b * h_b + columns * h_k
    out = grad_h + b * T * k + columns
    scale = tl.load(grad).to(COMPUTE) * 2
    now = tl.load(x_in, mask=inside, other=0.0).to(COMPUTE)
    from_before = tl.zeros([BLOCK_K], COMPUTE)
    upcoming = load_rows(x_in + h_t, h_t, T - 1, inside, CHUNK, True)
    for t in range(0, T, CHUNK):
        arrived = upcoming
        left = T - t - 1 - CHUNK
        upcoming = load_rows(row_pointers(x_in, t + 1 + CHUNK, h_t), h_t, left, inside, CHUNK, True)
        result = row_pointers(out, t, k)
        for i in tl.static_range(CHUNK):
            at = row_pointers(weights + b * weights_b, t + i, weights_t)
            weight = tl.load(at, mask=t + i + 1 < T, other=0.0).to(COMPUTE)
            after = arrived[i].to(COMPUTE)
            from_after = tl.where(weight != 0, (after - now) * (scale * weight), 0.0)
            gradient = narrow(from_before - from_after, grad_h.dtype.element_ty, TRUNCATES)
            tl.store(result + i * k, gradient, mask=mask_if(inside, T - t - i))
            from_before = from_after
            now = after
