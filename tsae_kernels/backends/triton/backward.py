"""The Triton kernel of the backward pass; `forward.py` describes the design of both.

The gradient at t needs the window sums S_r(t) over |u - t| <= r (docs/mathematics.md, section 2), which reach ahead. A
window that covers its segment needs the sum of all rows first: the segment is then read twice, the second time from the
caches.
"""

# ruff: noqa: RUF005 - Triton has no starred expressions
from __future__ import annotations

import triton
import triton.language as tl

from tsae_kernels.backends.triton.forward import (
    column_pointers,
    each,
    load_column_values,
    load_rows,
    narrow,
    normal_distribution,
    row_pointers,
    sequence_and_columns,
    store_column_values,
    window_count,
)


@triton.jit
def centred(saved, shift, centre, exists, GELU: tl.constexpr, SCALE: tl.constexpr, ROUNDING: tl.constexpr):
    """(h - centre) * SCALE from the saved row, which is h itself or, for gelu, pre. Missing rows are 0.

    Missing rows hold the centre; for gelu `exists` tells which they are.
    """
    if GELU:
        z = saved.to(centre.dtype) + shift
        x = narrow(z * normal_distribution(z), saved.dtype, ROUNDING).to(centre.dtype)
        y = tl.where(exists, (x - centre) * SCALE, 0.0)
    else:
        y = tl.fma(saved.to(centre.dtype), tl.zeros_like(centre) + SCALE, centre * -SCALE)
    return y


@triton.jit
def load_guarded(at, stride, p, n, filler, NUMBER: tl.constexpr, VECTOR: tl.constexpr):
    """NUMBER rows of the saved tensor from position p of a segment of n; `filler` for rows outside [0, n)."""
    rows = ()
    for i in tl.static_range(NUMBER):
        row = each(filler, p + i)
        here = row_pointers(at, i, stride, VECTOR)
        rows = rows + (tl.load(here, mask=(row >= 0) & (row < n), other=filler),)
    return rows


@triton.jit
def centred_chunk(
    rows, p, n, shift, centre, GELU: tl.constexpr, SCALE: tl.constexpr, ROUNDING: tl.constexpr, CHUNK: tl.constexpr
):
    """The CHUNK rows from p, centred; 0 outside the segment [0, n)."""
    out = ()
    for i in tl.static_range(CHUNK):
        exists = (each(centre, p + i) >= 0) & (each(centre, p + i) < n)
        out = out + (centred(rows[i], shift, centre, exists, GELU, SCALE, ROUNDING),)
    return out


@triton.jit
def centred_sum(
    x, begin, stride, first, last, n, shift, centre, filler,
    GELU: tl.constexpr, SCALE: tl.constexpr, ROUNDING: tl.constexpr, VECTOR: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """The sum of (h - centre) * SCALE over positions [first, last) within the segment [0, n) at row `begin`."""
    total = tl.zeros_like(centre)
    first = tl.maximum(first, 0)
    last = tl.minimum(last, n)
    whole = first + tl.maximum(last - first, 0) // NUMBER * NUMBER
    for u in range(first, whole, NUMBER):
        at = row_pointers(x, begin + u, stride, VECTOR)
        rows = load_rows(at, stride, n, centre, NUMBER, False, VECTOR)
        part = tl.zeros_like(centre)
        for i in tl.static_range(NUMBER):
            part = part + centred(rows[i], shift, centre, each(centre, 1) > 0, GELU, SCALE, ROUNDING)
        total = total + part
    for u in range(whole, last):
        saved = tl.load(row_pointers(x, begin + u, stride, VECTOR))
        total = total + centred(saved, shift, centre, each(centre, 1) > 0, GELU, SCALE, ROUNDING)
    return total


@triton.jit
def rows_at(
    before, current, after, x, stride, t, p, n, shift, centre, filler,
    OFFSET: tl.constexpr, GELU: tl.constexpr, SCALE: tl.constexpr, ROUNDING: tl.constexpr, CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The centred features OFFSET rows after (if negative, before) each row of the chunk at p."""
    out = ()
    at = row_pointers(x, t + p + OFFSET, stride, VECTOR)
    for i in tl.static_range(CHUNK):
        if i + OFFSET >= 0 and i + OFFSET < CHUNK:
            out = out + (current[i + OFFSET],)
        elif i + OFFSET >= CHUNK and i + OFFSET < 2 * CHUNK:
            out = out + (after[i + OFFSET - CHUNK],)
        elif i + OFFSET < 0 and i + OFFSET >= -CHUNK:
            out = out + (before[i + OFFSET + CHUNK],)
        else:
            here = row_pointers(at, i, stride, VECTOR)
            saved = load_guarded(here, stride, p + i + OFFSET, n, filler, 1, VECTOR)
            out = out + centred_chunk(saved, p + i + OFFSET, n, shift, centre, GELU, SCALE, ROUNDING, 1)
    return out


@triton.jit
def gradient(
    window_term, saved, grad_h, shift, of_total, of_square,
    COMPUTE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SUMS: tl.constexpr,
    ROUNDING: tl.constexpr,
):  # fmt: skip
    """The loss's gradient with respect to pre.

    window_term: the gradient through the differences; of_square: twice the gradient of `square`
    """
    grad = window_term
    grad = grad + grad_h.to(COMPUTE)
    x = saved.to(COMPUTE)
    if ACTIVATION == "gelu":
        z = x + shift
        share = normal_distribution(z)
        x = narrow(z * share, saved.dtype, ROUNDING).to(COMPUTE)
    if HAS_SUMS:
        grad = grad + of_total
        grad = grad + tl.where(of_square == 0, 0.0, of_square * x)  # excluded positions may hold anything
    if ACTIVATION == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    if ACTIVATION == "gelu":
        density = tl.exp(z * z * -0.5) * 0.39894228040143267794
        grad = grad * (share + z * density)
    return grad


@triton.jit
def backward_chunk(
    saved, grads, before, current, after, sums, weights, constant, own, masked, shift, centre, of_total, of_square,
    part_bias, x, stride, t, p, n, filler, grad_pre, k,
    REACH: tl.constexpr, SLIDING: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SUMS: tl.constexpr, SCALE: tl.constexpr,
    ROUNDING: tl.constexpr, CHUNK: tl.constexpr, GUARDED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradient of one chunk at position p of its segment of n. out: the window sums and `part_bias`

    saved, grads: the chunk's rows of the saved tensor and of grad_h
    before, current, after: the centred rows of the previous chunk, this and the next one
    sums: S_r(p - 1) of the windows that slide
    constant: weight * sum of a window that covers the segment; own: its weight * n
    GUARDED: rows may be missing
    """
    COMPUTE: tl.constexpr = centre.dtype
    GELU: tl.constexpr = ACTIVATION == "gelu"
    out = row_pointers(grad_pre, t + p, k, VECTOR)
    window_terms = ()
    for i in tl.static_range(CHUNK):
        window_terms = window_terms + (own * current[i] - constant,)
    new_sums = ()
    for r in tl.static_range(SLIDING):
        sum = sums[r]
        lead = rows_at(
            before, current, after, x, stride, t, p, n, shift, centre, filler,
            REACH[r], GELU, SCALE, ROUNDING, CHUNK, VECTOR,
        )  # fmt: skip
        trail = rows_at(
            before, current, after, x, stride, t, p, n, shift, centre, filler,
            -REACH[r] - 1, GELU, SCALE, ROUNDING, CHUNK, VECTOR,
        )  # fmt: skip
        new_terms = ()
        for i in tl.static_range(CHUNK):
            sum = sum + (lead[i] - trail[i])
            count = window_count(p + i, n, REACH[r]).to(COMPUTE)
            new_terms = new_terms + (window_terms[i] + weights[r] * (count * current[i] - sum),)
        window_terms = new_terms
        new_sums = new_sums + (sum,)
    for i in tl.static_range(CHUNK):
        window_term = tl.where(masked, 0.0, window_terms[i])
        grad = gradient(
            window_term, saved[i], grads[i], shift, of_total, of_square, COMPUTE, ACTIVATION, HAS_SUMS, ROUNDING
        )
        here = row_pointers(out, i, k, VECTOR)
        if GUARDED:
            grad = tl.where(p + i < n, grad, 0.0)
            tl.store(here, narrow(grad, filler.dtype, ROUNDING), mask=each(centre, p + i) < n)
        else:
            tl.store(here, narrow(grad, filler.dtype, ROUNDING))
        part_bias = part_bias + grad
    return new_sums, part_bias


@triton.jit(
    do_not_specialize=[
        "T", "k", "refresh", "has_bias", "has_differences", "has_total", "has_square", "segmented",
        "saved_b", "saved_t", "saved_k", "bias_k", "grad_h_b", "grad_h_t", "grad_h_k", "differences_b",
        "differences_s", "differences_k", "total_b", "total_k", "square_b", "square_k",
    ],
    do_not_specialize_on_alignment=[
        "saved", "bias", "grad_h", "grad_differences", "grad_total", "grad_square", "segment_ends", "grad_pre",
        "grad_bias",
    ],
)  # fmt: skip
def backward_kernel(
    saved,
    bias,
    grad_h,
    grad_differences,
    grad_total,
    grad_square,
    segment_ends,
    grad_pre,
    grad_bias,
    T,
    k,
    refresh,
    has_bias,
    has_differences,
    has_total,
    has_square,
    segmented,
    saved_b,
    saved_t,
    saved_k,
    bias_k,
    grad_h_b,
    grad_h_t,
    grad_h_k,
    differences_b,
    differences_s,
    differences_k,
    total_b,
    total_k,
    square_b,
    square_k,
    FIRST: tl.constexpr,
    REACH: tl.constexpr,
    PLUS: tl.constexpr,
    MINUS: tl.constexpr,
    COVERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    SCALE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """grad_pre [B, T, k], and grad_bias [B, k] as sums over T.

    has_*, segmented: 0 if that pointer is not to be read, and the argument counts as zeros
    FIRST: the first offset of each band
    REACH: of each window |u - t| <= reach, ascending
    PLUS, MINUS: a window's weight is the gradient of band PLUS minus that of band MINUS; -1 for none
    COVERS: the last window covers every segment
    HAS_SUMS: whether there may be a gradient of the total or the square
    The other constants are as in `forward_kernel`.
    """
    S: tl.constexpr = len(FIRST)
    R: tl.constexpr = len(REACH)
    SLIDING: tl.constexpr = R - 1 if COVERS else R
    COMPUTE: tl.constexpr = grad_bias.dtype.element_ty
    STORED: tl.constexpr = saved.dtype.element_ty
    GELU: tl.constexpr = ACTIVATION == "gelu"
    b, columns = sequence_and_columns(k, BLOCK_K, VECTOR)
    zero = tl.zeros([BLOCK_K], COMPUTE)
    x_in = column_pointers(saved, b, saved_b, columns, saved_k, VECTOR)
    out = grad_pre + b * T * k + columns
    incoming = column_pointers(grad_h, b, grad_h_b, columns, grad_h_k, VECTOR)

    shift = zero
    if GELU:
        shift = load_column_values(bias, columns, bias_k, has_bias, 0.0, COMPUTE)
    total_column = zero
    square_column = zero
    if HAS_SUMS:
        total_column = load_column_values(grad_total + b * total_b, columns, total_k, has_total, 0.0, COMPUTE)
        square_column = load_column_values(grad_square + b * square_b, columns, square_k, has_square, 0.0, COMPUTE) * 2

    # Features whose coefficients are all 0 get no window term (0 times an infinite one would be NaN). A block that has
    # only such features skips the arithmetic, as do excluded positions.
    masked = tl.full([BLOCK_K], True, tl.int1)
    coefficients = ()
    for s in tl.static_range(S):
        of_band = grad_differences + b * differences_b + s * differences_s
        present = tl.where(FIRST[s] < T, has_differences, 0)
        coefficient = load_column_values(of_band, columns, differences_k, present, 0.0, COMPUTE) * 2
        masked = masked & (coefficient == 0)
        coefficients = coefficients + (coefficient * (1 / SCALE),)
    weights = ()
    for r in tl.static_range(R):
        weight = zero
        if PLUS[r] >= 0:
            weight = coefficients[PLUS[r]]
        if MINUS[r] >= 0:
            weight = weight - coefficients[MINUS[r]]
        weights = weights + (weight,)
    any_active = tl.max(tl.where(masked, 0, 1), 0) > 0

    sum_bias = zero
    t = 0
    while t < T:
        end = tl.load(segment_ends + b * T + t, mask=segmented != 0, other=T)
        excluded = end < 0
        end = tl.abs(end)
        n = end - t
        of_total = tl.where(excluded, 0.0, total_column)
        of_square = tl.where(excluded, 0.0, square_column)
        begin = row_pointers(x_in, t, saved_t, VECTOR)
        at = row_pointers(incoming, t, grad_h_t, VECTOR)
        grads = load_rows(at, grad_h_t, n, columns, CHUNK, True, VECTOR)
        if any_active & (end > 0) & (excluded == 0):
            # The centre: the mean of the segment's first 8 rows, rounded to h's dtype.
            centre = zero
            first = zero
            opening = load_rows(begin, saved_t, n, columns, 8, True, VECTOR)
            for i in tl.static_range(8):
                x = opening[i].to(COMPUTE)
                if GELU:
                    z = x + shift
                    x = narrow(z * normal_distribution(z), STORED, ROUNDING).to(COMPUTE)
                if i == 0:
                    first = x
                centre = centre + tl.where(i < n, x, first) * 0.125
            filler = narrow(centre, STORED, ROUNDING)
            centre = filler.to(COMPUTE)

            constant = zero
            own = zero
            if COVERS:
                constant = weights[R - 1] * centred_sum(
                    x_in, t, saved_t, 0, n, n, shift, centre, filler, GELU, SCALE, ROUNDING, VECTOR, 2 * CHUNK
                )
                own = weights[R - 1] * n.to(COMPUTE)
            for q in range(0, n, refresh):
                # S_r(q - 1), each from the previous one, which it contains
                sums = ()
                sum = centred_sum(
                    x_in, t, saved_t, q - 1, q, n, shift, centre, filler, GELU, SCALE, ROUNDING, VECTOR, 1
                )
                for r in tl.static_range(SLIDING):
                    within = REACH[r - 1] if r > 0 else 0
                    sum += centred_sum(
                        x_in, t, saved_t, q + within, q + REACH[r], n, shift, centre, filler,
                        GELU, SCALE, ROUNDING, VECTOR, 4,
                    )  # fmt: skip
                    sum += centred_sum(
                        x_in, t, saved_t, q - 1 - REACH[r], q - 1 - within, n, shift, centre, filler,
                        GELU, SCALE, ROUNDING, VECTOR, 4,
                    )  # fmt: skip
                    sums = sums + (sum,)

                part_bias = zero
                at = row_pointers(begin, q - CHUNK, saved_t, VECTOR)
                before = load_guarded(at, saved_t, q - CHUNK, n, filler, CHUNK, VECTOR)
                before = centred_chunk(before, q - CHUNK, n, shift, centre, GELU, SCALE, ROUNDING, CHUNK)
                at = row_pointers(begin, q, saved_t, VECTOR)
                current = load_guarded(at, saved_t, q, n, filler, CHUNK, VECTOR)
                current = centred_chunk(current, q, n, shift, centre, GELU, SCALE, ROUNDING, CHUNK)
                stop = tl.minimum(q + refresh, n)
                whole = stop - (stop - q) % CHUNK
                for p in range(q, whole, CHUNK):
                    at = row_pointers(x_in, t + p, saved_t, VECTOR)
                    saved_now = load_rows(at, saved_t, n, columns, CHUNK, False, VECTOR)
                    grads_now = grads
                    at = row_pointers(incoming, t + p + CHUNK, grad_h_t, VECTOR)
                    grads = load_rows(at, grad_h_t, n - p - CHUNK, columns, CHUNK, True, VECTOR)
                    at = row_pointers(x_in, t + p + CHUNK, saved_t, VECTOR)
                    after = load_guarded(at, saved_t, p + CHUNK, n, filler, CHUNK, VECTOR)
                    after = centred_chunk(after, p + CHUNK, n, shift, centre, GELU, SCALE, ROUNDING, CHUNK)
                    sums, part_bias = backward_chunk(
                        saved_now, grads_now, before, current, after, sums, weights, constant, own, masked, shift,
                        centre, of_total, of_square, part_bias, x_in, saved_t, t, p, n, filler, out, k,
                        REACH, SLIDING, ACTIVATION, HAS_SUMS, SCALE, ROUNDING, CHUNK, False, VECTOR,
                    )  # fmt: skip
                    before = current
                    current = after
                if whole < stop:
                    at = row_pointers(x_in, t + whole, saved_t, VECTOR)
                    saved_now = load_rows(at, saved_t, n - whole, columns, CHUNK, True, VECTOR)
                    sums, part_bias = backward_chunk(
                        saved_now, grads, before, current, (zero,) * CHUNK, sums, weights, constant, own, masked, shift,
                        centre, of_total, of_square, part_bias, x_in, saved_t, t, whole, n, filler, out, k,
                        REACH, SLIDING, ACTIVATION, HAS_SUMS, SCALE, ROUNDING, CHUNK, True, VECTOR,
                    )  # fmt: skip
                sum_bias = sum_bias + part_bias
        else:
            part_bias = zero
            upcoming = load_rows(begin, saved_t, n, columns, CHUNK, True, VECTOR)
            for p in range(0, n, CHUNK):
                arrived = upcoming
                grads_now = grads
                left = n - p - CHUNK
                at = row_pointers(x_in, t + p + CHUNK, saved_t, VECTOR)
                upcoming = load_rows(at, saved_t, left, columns, CHUNK, True, VECTOR)
                at = row_pointers(incoming, t + p + CHUNK, grad_h_t, VECTOR)
                grads = load_rows(at, grad_h_t, left, columns, CHUNK, True, VECTOR)
                to = row_pointers(out, t + p, k, VECTOR)
                for i in tl.static_range(CHUNK):
                    grad = gradient(
                        zero, arrived[i], grads_now[i], shift, of_total, of_square, COMPUTE, ACTIVATION, HAS_SUMS,
                        ROUNDING,
                    )  # fmt: skip
                    grad = tl.where(p + i < n, grad, 0.0)
                    here = row_pointers(to, i, k, VECTOR)
                    tl.store(here, narrow(grad, STORED, ROUNDING), mask=each(columns, p + i) < n)
                    part_bias = part_bias + grad
            sum_bias = sum_bias + part_bias
        t = end
    store_column_values(grad_bias, b, k, columns, sum_bias, VECTOR)
