"""The Triton kernels of the scans along T: the cheapest on/off path, the leaky recurrence and its gradient.

docs/mathematics.md, section 8. A program walks one sequence with a block of adjacent features, as in `forward.py`. What
it needs of the walk forward on the way back is in memory of its own, because blocks may overlap. `segment_ends` [B, T]
int32 is the end of each position's segment, negative for a run of excluded positions.
"""

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


@triton.jit
def bounds_at(segment_ends, b, t, T, segmented):
    """Whether t is excluded, begins a segment and ends one, as 0 or 1; `t` may be past the sequence."""
    at = segment_ends + b * T + t
    here = tl.load(at, mask=(segmented > 0) & (t < T), other=0)
    before = tl.load(at - 1, mask=(segmented > 0) & (t > 0) & (t <= T), other=0)
    excluded = here < 0
    begins = (t == 0) | (here != before)
    ends = (t + 1 == T) | (here == t + 1)
    return excluded.to(tl.int32), begins.to(tl.int32), ends.to(tl.int32)


@triton.jit(
    do_not_specialize=["T", "k", "segmented", "z_b", "z_t", "z_k"],
    do_not_specialize_on_alignment=["z", "levels", "segment_ends", "decisions", "on"],
)
def viterbi_path_kernel(
    z,
    levels,
    segment_ends,
    decisions,
    on,
    T,
    k,
    segmented,
    z_b,
    z_t,
    z_k,
    COMPUTE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """on [B, T, k] uint8, 0 or 1. levels: [5, k], of `two_state.path_levels`.

    decisions: [programs, ceil(T / CHUNK), BLOCK_K] int32. A word has two bits for each of CHUNK positions: whether the
        best path to off, and to on, at the next position is on at this one; both are the same at a segment's end.
    """
    b, columns = sequence_and_columns(k, BLOCK_K, VECTOR)
    z_in = column_pointers(z, b, z_b, columns, z_k, VECTOR)
    stay_off = tl.load(levels + columns)
    stay_on = tl.load(levels + k + columns)
    sign = tl.load(levels + 2 * k + columns)
    offset = tl.load(levels + 3 * k + columns)
    start = tl.load(levels + 4 * k + columns)
    low = tl.minimum(stay_off, stay_on)
    high = tl.maximum(stay_off, stay_on)
    words = decisions + tl.program_id(0).to(tl.int64) * tl.cdiv(T, CHUNK) * BLOCK_K + tl.arange(0, BLOCK_K)
    excess = start
    upcoming = load_rows(z_in, z_t, T, columns, CHUNK, True, VECTOR)
    for t in range(0, T, CHUNK):
        arrived = upcoming
        at = row_pointers(z_in, t + CHUNK, z_t, VECTOR)
        upcoming = load_rows(at, z_t, T - t - CHUNK, columns, CHUNK, True, VECTOR)
        word = tl.zeros([BLOCK_K], tl.int32)
        for i in tl.static_range(CHUNK):
            excluded, begins, ends = bounds_at(segment_ends, b, t + i, T, segmented)
            x = arrived[i].to(COMPUTE)
            after = tl.minimum(tl.maximum(excess, low), high) * sign + offset
            excess = tl.where(each(columns, begins) > 0, start, after)
            excess += tl.where(x > 0, -x * x, float("inf"))
            last = each(columns, ends) > 0
            to_off = excess < tl.where(last, 0.0, stay_off)
            to_on = excess < tl.where(last, 0.0, stay_on)
            bits = to_off.to(tl.int32) + 2 * to_on.to(tl.int32)
            word |= tl.where(each(columns, excluded) > 0, 0, bits) << (2 * i)
        tl.store(words + tl.cast(t // CHUNK, tl.int64) * BLOCK_K, word)
    tl.debug_barrier()  # the words are read again
    out = on + b * T * k + columns
    state = tl.zeros([BLOCK_K], tl.int32)
    for chunk in range(tl.cdiv(T, CHUNK) - 1, -1, -1):
        word = tl.load(words + tl.cast(chunk, tl.int64) * BLOCK_K)
        for i in tl.static_range(CHUNK - 1, -1, -1):
            state = (word >> (2 * i + state)) & 1
            to = row_pointers(out, chunk * CHUNK + i, k, VECTOR)
            tl.store(to, state.to(tl.uint8), mask=each(columns, chunk * CHUNK + i) < T)


@triton.jit(
    do_not_specialize=["T", "k", "segmented", "a_b", "a_t", "a_k"],
    do_not_specialize_on_alignment=["a", "decay", "segment_ends", "h"],
)
def leaky_recurrence_kernel(
    a,
    decay,
    segment_ends,
    h,
    T,
    k,
    segmented,
    a_b,
    a_t,
    a_k,
    COMPUTE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """h [B, T, k] from a [B, T, k] and decay [k]."""
    b, columns = sequence_and_columns(k, BLOCK_K, VECTOR)
    a_in = column_pointers(a, b, a_b, columns, a_k, VECTOR)
    out = h + b * T * k + columns
    keep = tl.load(decay + columns)
    take = 1 - keep
    state = tl.zeros([BLOCK_K], COMPUTE)
    upcoming = load_rows(a_in, a_t, T, columns, CHUNK, True, VECTOR)
    for t in range(0, T, CHUNK):
        arrived = upcoming
        at = row_pointers(a_in, t + CHUNK, a_t, VECTOR)
        upcoming = load_rows(at, a_t, T - t - CHUNK, columns, CHUNK, True, VECTOR)
        to = row_pointers(out, t, k, VECTOR)
        for i in tl.static_range(CHUNK):
            excluded, begins, _ = bounds_at(segment_ends, b, t + i, T, segmented)
            before = tl.where(each(columns, begins) > 0, 0.0, state)
            state = keep * before + take * arrived[i].to(COMPUTE)
            state = tl.where(each(columns, excluded) > 0, 0.0, state)
            row = narrow(state, h.dtype.element_ty, ROUNDING)
            tl.store(row_pointers(to, i, k, VECTOR), row, mask=each(columns, t + i) < T)


@triton.jit(
    do_not_specialize=[
        "T", "k", "segmented", "with_decay", "grad_h_b", "grad_h_t", "grad_h_k", "a_b", "a_t", "a_k", "h_b", "h_t",
        "h_k",
    ],
    do_not_specialize_on_alignment=["grad_h", "decay", "a", "h", "segment_ends", "grad_a", "grad_decay"],
)  # fmt: skip
def leaky_recurrence_backward_kernel(
    grad_h,
    decay,
    a,
    h,
    segment_ends,
    grad_a,
    grad_decay,
    T,
    k,
    segmented,
    with_decay,
    grad_h_b,
    grad_h_t,
    grad_h_k,
    a_b,
    a_t,
    a_k,
    h_b,
    h_t,
    h_k,
    BLOCK_T: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """grad_a [B, T, k], and grad_decay [B, k] before the sum over the batch. Walks back in chunks of rows.

    Without `with_decay`, a and h are not read. Sums are taken over BLOCK_T positions, then over those.
    """
    b, columns = sequence_and_columns(k, BLOCK_K, VECTOR)
    grad_in = column_pointers(grad_h, b, grad_h_b, columns, grad_h_k, VECTOR)
    a_in = column_pointers(a, b, a_b, columns, a_k, VECTOR)
    h_in = column_pointers(h, b, h_b, columns, h_k, VECTOR)
    out = grad_a + b * T * k + columns
    keep = tl.load(decay + columns)
    take = 1 - keep
    g = tl.zeros([BLOCK_K], COMPUTE)
    total = tl.zeros([BLOCK_K], COMPUTE)
    for block in range(tl.cdiv(T, BLOCK_T) - 1, -1, -1):
        part = tl.zeros([BLOCK_K], COMPUTE)
        for chunk in range(BLOCK_T // CHUNK - 1, -1, -1):
            t = block * BLOCK_T + chunk * CHUNK
            at = row_pointers(grad_in, t, grad_h_t, VECTOR)
            arrived = load_rows(at, grad_h_t, T - t, columns, CHUNK, True, VECTOR)
            left = with_decay * (T - t)
            now = load_rows(row_pointers(a_in, t, a_t, VECTOR), a_t, left, columns, CHUNK, True, VECTOR)
            for i in tl.static_range(CHUNK - 1, -1, -1):
                excluded, begins, ends = bounds_at(segment_ends, b, t + i, T, segmented)
                after = tl.where(each(columns, ends) > 0, 0.0, g)
                out_of_range = (each(columns, excluded) > 0) | (each(columns, t + i) >= T)
                g = tl.where(out_of_range, 0.0, arrived[i].to(COMPUTE) + keep * after)
                inside = (each(columns, begins) == 0) & (each(columns, left) > i)
                at = row_pointers(h_in, t + i - 1, h_t, VECTOR)
                before = tl.load(at, mask=inside, other=0.0).to(COMPUTE)
                step = tl.where(out_of_range, 0.0, before - now[i].to(COMPUTE))
                part += g * step
                row = narrow(take * g, grad_a.dtype.element_ty, ROUNDING)
                tl.store(row_pointers(out, t + i, k, VECTOR), row, mask=each(columns, t + i) < T)
        total += part
    tl.store(grad_decay + b * k + columns, total)
