"""The Triton kernel of the backward pass; `forward.py` describes the design of both.

The gradient at t needs the window sums S_r(t) over |u - t| <= r (docs/mathematics.md, section 2), which reach ahead. So
each segment is walked twice: first to sum the rows of the first windows (all rows, for a window that covers the
segment), then to slide the windows. The second walk finds the rows in the caches: a program's tile is 128 bytes wide
(16 KiB at T = 128 and two bytes), so the tiles of all running programs fit in the L2 cache together.
"""

# ruff: noqa: RUF005 - Triton has no starred expressions
from __future__ import annotations

import triton
import triton.language as tl

from tsae_kernels.backends.triton.forward import (
    load_rows,
    mask_if,
    narrow,
    normal_distribution,
    row_pointers,
    sequence_and_columns,
    window_count,
)


@triton.jit
def feature_of(saved, shift, COMPUTE: tl.constexpr, GELU: tl.constexpr, TRUNCATES: tl.constexpr):
    """h from the saved tensor, which is h itself or, for gelu, pre."""
    x = saved.to(COMPUTE)
    if GELU:
        z = x + shift
        x = narrow(z * normal_distribution(z), saved.dtype, TRUNCATES).to(COMPUTE)
    return x


@triton.jit
def centred_rows(
    at,
    stride: tl.constexpr,
    p,
    n,
    inside,
    shift,
    centre,
    OFFSET: tl.constexpr,
    NUMBER: tl.constexpr,
    GELU: tl.constexpr,
    SCALE: tl.constexpr,
    TRUNCATES: tl.constexpr,
):
    """(h - centre) * SCALE at NUMBER positions from p + OFFSET; 0 outside the segment [0, n). `at`: row p."""
    rows = ()
    for i in tl.static_range(OFFSET, OFFSET + NUMBER):
        left = n - p - i
        if OFFSET < 0:
            left = tl.minimum(left, p + i + 1)
        mask = mask_if(inside, left)
        if GELU:
            saved = tl.load(at + i * stride, mask=mask, other=0.0)
            y = tl.where(left > 0, (feature_of(saved, shift, centre.dtype, True, TRUNCATES) - centre) * SCALE, 0.0)
        else:
            saved = tl.load(at + i * stride, mask=mask, other=centre.to(at.dtype.element_ty))
            y = tl.fma(saved.to(centre.dtype), centre * 0 + SCALE, centre * -SCALE)
        rows = rows + (y,)
    return rows


@triton.jit
def centred_sum(
    x,
    begin,
    stride: tl.constexpr,
    first,
    last,
    n,
    inside,
    shift,
    centre,
    NUMBER: tl.constexpr,
    GELU: tl.constexpr,
    SCALE: tl.constexpr,
    TRUNCATES: tl.constexpr,
):
    """The sum of (h - centre) * SCALE over positions [first, last) within the segment [0, n) at row `begin`."""
    total = centre * 0
    last = tl.minimum(last, n)
    for u in range(tl.maximum(first, 0), last, NUMBER):
        at = row_pointers(x, begin + u, stride)
        rows = centred_rows(at, stride, u, last, inside, shift, centre, 0, NUMBER, GELU, SCALE, TRUNCATES)
        for i in tl.static_range(NUMBER):
            total = total + rows[i]
    return total


@triton.jit
def rows_at(
    before,
    current,
    after,
    at,
    stride: tl.constexpr,
    p,
    n,
    inside,
    shift,
    centre,
    OFFSET: tl.constexpr,
    CHUNK: tl.constexpr,
    GELU: tl.constexpr,
    SCALE: tl.constexpr,
    TRUNCATES: tl.constexpr,
):
    """The centred features OFFSET rows after (if negative, before) each row of the chunk at p."""
    out = ()
    for i in tl.static_range(CHUNK):
        if i + OFFSET >= 0 and i + OFFSET < CHUNK:
            out = out + (current[i + OFFSET],)
        elif i + OFFSET >= CHUNK and i + OFFSET < 2 * CHUNK:
            out = out + (after[i + OFFSET - CHUNK],)
        elif i + OFFSET < 0 and i + OFFSET >= -CHUNK:
            out = out + (before[i + OFFSET + CHUNK],)
        else:
            out = out + centred_rows(at, stride, p, n, inside, shift, centre, i + OFFSET, 1, GELU, SCALE, TRUNCATES)
    return out


@triton.jit
def gradient(
    window_term,
    saved,
    grad_h,
    shift,
    of_total,
    of_square,
    excluded,
    COMPUTE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TRUNCATES: tl.constexpr,
):
    """The loss's gradient with respect to pre.

    window_term: the gradient through the differences; of_square: twice the gradient of `square`
    """
    grad = window_term
    x = feature_of(saved, shift, COMPUTE, ACTIVATION == "gelu", TRUNCATES)
    if of_total is not None:
        grad = grad + tl.where(excluded, 0.0, of_total)
    if of_square is not None:
        grad = grad + tl.where(excluded, 0.0, of_square * x)
    if grad_h is not None:
        grad = grad + grad_h.to(COMPUTE)
    if ACTIVATION == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    if ACTIVATION == "gelu":
        z = saved.to(COMPUTE) + shift
        density = tl.exp(z * z * -0.5) * 0.39894228040143267794
        grad = grad * (normal_distribution(z) + z * density)
    return grad


@triton.jit(do_not_specialize=["T"])
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
    k: tl.constexpr,
    saved_b,
    saved_t: tl.constexpr,
    saved_k,
    bias_k,
    grad_h_b,
    grad_h_t: tl.constexpr,
    grad_h_k,
    differences_b,
    differences_s,
    differences_k,
    total_b,
    total_k,
    square_b,
    square_k,
    S: tl.constexpr,
    REACH: tl.constexpr,
    PLUS: tl.constexpr,
    MINUS: tl.constexpr,
    COVERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GUARDED: tl.constexpr,
    EVEN_K: tl.constexpr,
    REFRESH: tl.constexpr,
    LONG: tl.constexpr,
    SCALE: tl.constexpr,
    TRUNCATES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """grad_pre [B, T, k], and grad_bias [B, k] as sums over T.

    REACH: of each window |u - t| <= reach, ascending
    PLUS, MINUS: a window's weight is the gradient of band PLUS minus that of band MINUS; -1 for none
    COVERS: the last window covers every segment
    The other constants are as in `forward_kernel`.
    """
    R: tl.constexpr = len(REACH)
    SLIDING: tl.constexpr = R - 1 if COVERS else R
    COMPUTE: tl.constexpr = grad_bias.dtype.element_ty
    STORED: tl.constexpr = saved.dtype.element_ty
    GELU: tl.constexpr = ACTIVATION == "gelu"
    b, columns, inside = sequence_and_columns(k, BLOCK_K, EVEN_K)
    zero = tl.zeros([BLOCK_K], COMPUTE)
    x_in = saved + b * saved_b + columns * saved_k
    out = grad_pre + b * T * k + columns

    shift = zero
    if bias is not None:
        shift = tl.load(bias + columns * bias_k, mask=inside, other=0.0).to(COMPUTE)
    of_total = grad_total
    if grad_total is not None:
        of_total = tl.load(grad_total + b * total_b + columns * total_k, mask=inside, other=0.0).to(COMPUTE)
    of_square = grad_square
    if grad_square is not None:
        of_square = tl.load(grad_square + b * square_b + columns * square_k, mask=inside, other=0.0).to(COMPUTE) * 2
    incoming = grad_h
    if grad_h is not None:
        incoming = grad_h + b * grad_h_b + columns * grad_h_k

    # Features whose coefficients are all 0 get no window term (0 times an infinite one would be NaN). A block that has
    # only such features skips the arithmetic.
    masked = tl.full([BLOCK_K], True, tl.int1)
    coefficients = ()
    if grad_differences is not None:
        for s in tl.static_range(S):
            at = grad_differences + b * differences_b + s * differences_s + columns * differences_k
            coefficient = tl.load(at, mask=inside, other=0.0).to(COMPUTE) * 2
            masked = masked & (coefficient == 0)
            coefficients = coefficients + (coefficient,)
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
        end = T
        excluded = False
        if segment_ends is not None:
            end = tl.load(segment_ends + b * T + t)
            excluded = end < 0
            end = tl.abs(end)
        n = end - t
        if R > 0 and any_active:
            # The centre: the mean of the segment's first 8 rows, rounded to h's dtype.
            centre = zero
            first = zero
            opening = load_rows(row_pointers(x_in, t, saved_t), saved_t, n, inside, 8, True)
            for i in tl.static_range(8):
                x = feature_of(opening[i], shift, COMPUTE, GELU, TRUNCATES)
                if i == 0:
                    first = x
                centre = centre + tl.where(i < n, x, first) * 0.125
            centre = narrow(centre, STORED, TRUNCATES).to(COMPUTE)

            covering = zero
            if COVERS:
                covering = centred_sum(x_in, t, saved_t, 0, n, n, inside, shift, centre, 16, GELU, SCALE, TRUNCATES)
            for q in range(0, n, REFRESH):
                # S_r(q - 1), each from the previous one, which it contains
                sums = ()
                sum = zero
                if LONG:
                    sum = centred_sum(x_in, t, saved_t, q - 1, q, n, inside, shift, centre, 1, GELU, SCALE, TRUNCATES)
                for r in tl.static_range(SLIDING):
                    within = REACH[r - 1] if r > 0 else 0
                    sum += centred_sum(
                        x_in, t, saved_t, q + within, q + REACH[r], n, inside, shift, centre, 4, GELU, SCALE, TRUNCATES
                    )
                    if LONG:
                        first_row = q - 1 - REACH[r]
                        last_row = q - 1 - within
                        sum += centred_sum(
                            x_in, t, saved_t, first_row, last_row, n, inside, shift, centre, 4, GELU, SCALE, TRUNCATES
                        )
                    sums = sums + (sum,)

                part_bias = zero
                here = row_pointers(x_in, t + q, saved_t)
                before = centred_rows(here, saved_t, q, n, inside, shift, centre, -CHUNK, CHUNK, GELU, SCALE, TRUNCATES)
                current = centred_rows(here, saved_t, q, n, inside, shift, centre, 0, CHUNK, GELU, SCALE, TRUNCATES)
                grads = ()
                if grad_h is not None:
                    incoming_row = row_pointers(incoming, t + q, grad_h_t)
                    grads = load_rows(incoming_row, grad_h_t, n - q, inside, CHUNK, GUARDED)
                for p in range(q, tl.minimum(q + REFRESH, n), CHUNK):
                    here = row_pointers(x_in, t + p, saved_t)
                    arrived = load_rows(here, saved_t, n - p, inside, CHUNK, GUARDED)
                    grads_now = grads
                    if grad_h is not None:
                        left = n - p - CHUNK
                        incoming_row = row_pointers(incoming, t + p + CHUNK, grad_h_t)
                        grads = load_rows(incoming_row, grad_h_t, left, mask_if(inside, left), CHUNK, GUARDED)
                    after = centred_rows(
                        here, saved_t, p, n, inside, shift, centre, CHUNK, CHUNK, GELU, SCALE, TRUNCATES
                    )
                    window_terms = (zero,) * CHUNK
                    new_sums = ()
                    for r in tl.static_range(R):
                        new_terms = ()
                        if r < SLIDING:
                            sum = sums[r]
                            lead = rows_at(
                                before, current, after, here, saved_t, p, n, inside, shift, centre,
                                REACH[r], CHUNK, GELU, SCALE, TRUNCATES,
                            )  # fmt: skip
                            trail = rows_at(
                                before, current, after, here, saved_t, p, n, inside, shift, centre,
                                -REACH[r] - 1, CHUNK, GELU, SCALE, TRUNCATES,
                            )  # fmt: skip
                            for i in tl.static_range(CHUNK):
                                sum = sum + (lead[i] - trail[i])
                                count = window_count(p + i, n, REACH[r]).to(COMPUTE)
                                new_terms = new_terms + (window_terms[i] + weights[r] * (count * current[i] - sum),)
                            new_sums = new_sums + (sum,)
                        else:
                            count = n.to(COMPUTE)
                            for i in tl.static_range(CHUNK):
                                new_terms = new_terms + (
                                    window_terms[i] + weights[r] * (count * current[i] - covering),
                                )
                        window_terms = new_terms
                    sums = new_sums
                    result = row_pointers(out, t + p, k)
                    for i in tl.static_range(CHUNK):
                        window_term = tl.where(masked | excluded, 0.0, window_terms[i] * (1 / SCALE))
                        of_h = grad_h
                        if grad_h is not None:
                            of_h = grads_now[i]
                        grad = gradient(
                            window_term, arrived[i], of_h, shift, of_total, of_square, excluded, COMPUTE, ACTIVATION,
                            TRUNCATES,
                        )  # fmt: skip
                        valid = inside  # the lines from here on are below, too: as a function they spill on sm_80
                        if GUARDED:
                            valid = mask_if(inside, n - p - i)
                            grad = tl.where(p + i < n, grad, 0.0)
                        tl.store(result + i * k, narrow(grad, STORED, TRUNCATES), mask=valid)
                        part_bias = part_bias + grad
                    before = current
                    current = after
                sum_bias = sum_bias + part_bias
        else:
            part_bias = zero
            upcoming = load_rows(row_pointers(x_in, t, saved_t), saved_t, n, inside, CHUNK, GUARDED)
            grads = ()
            if grad_h is not None:
                grads = load_rows(row_pointers(incoming, t, grad_h_t), grad_h_t, n, inside, CHUNK, GUARDED)
            for p in range(0, n, CHUNK):
                arrived = upcoming
                grads_now = grads
                left = n - p - CHUNK
                mask = mask_if(inside, left)
                upcoming = load_rows(row_pointers(x_in, t + p + CHUNK, saved_t), saved_t, left, mask, CHUNK, GUARDED)
                if grad_h is not None:
                    incoming_row = row_pointers(incoming, t + p + CHUNK, grad_h_t)
                    grads = load_rows(incoming_row, grad_h_t, left, mask, CHUNK, GUARDED)
                result = row_pointers(out, t + p, k)
                for i in tl.static_range(CHUNK):
                    of_h = grad_h
                    if grad_h is not None:
                        of_h = grads_now[i]
                    grad = gradient(
                        zero, arrived[i], of_h, shift, of_total, of_square, excluded, COMPUTE, ACTIVATION, TRUNCATES
                    )
                    valid = inside
                    if GUARDED:
                        valid = mask_if(inside, n - p - i)
                        grad = tl.where(p + i < n, grad, 0.0)
                    tl.store(result + i * k, narrow(grad, STORED, TRUNCATES), mask=valid)
                    part_bias = part_bias + grad
            sum_bias = sum_bias + part_bias
        t = end
    tl.store(grad_bias + b * k + columns, sum_bias, mask=inside)
