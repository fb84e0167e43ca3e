"""The Triton kernel of the forward pass: activation (with the Schmitt trigger) and temporal statistics.

Derivations: docs/mathematics.md, sections 2 to 4 and 7; design and byte counts: docs/kernels.md. `launch.py` imports
this file on first use, so that a machine without a GPU does not need Triton.

One program walks one sequence along T with a block of adjacent features. Rows are loaded `CHUNK` at a time, and those
of the next chunk are requested before the current chunk is processed. Rows that a window needs from the previous chunk
(and, in the backward pass, from the next) are in registers; rows further away are read again, from the caches. Forward
kernels are compiled without contraction and use `tl.fma` explicitly, so the statistics of h have the same bits whether
h was just computed or is read.

`segment_ends` [B, T] int32 is the end of each position's segment, negative for a run of excluded positions. Features
have any strides; row offsets are 64-bit.
"""

# ruff: noqa: RUF005 - Triton has no starred expressions
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_and_columns(k: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """This program's sequence b, its features' indices, and which of them exist. EVEN_K: all do."""
    blocks = tl.cdiv(k, BLOCK_K)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    columns = ((tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    if EVEN_K:
        inside = tl.full([BLOCK_K], True, tl.int1)
    else:
        inside = columns < k
    return b, columns, inside


@triton.jit
def window_count(p, n, REACH: tl.constexpr):
    """The number of positions u in a segment of length n with |u - p| <= REACH."""
    return tl.minimum(p + REACH, n - 1) - tl.maximum(p - REACH, 0) + 1


@triton.jit
def mask_if(inside, left):
    """The mask `inside` if the number `left` is positive, else all False.

    The number is broadcast, not the condition: Triton's interpreter changes the dtype of a boolean that it broadcasts.
    """
    return inside & (inside.to(tl.int32) * 0 + left > 0)


@triton.jit
def narrow(x, DTYPE: tl.constexpr, TRUNCATES: tl.constexpr):
    """x in h's dtype, rounded to nearest. TRUNCATES: the cast truncates (to bfloat16, in Triton's interpreter)."""
    if TRUNCATES:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(DTYPE)


@triton.jit
def row_pointers(x, row, stride):
    """Pointers to a row. The rows after it are at constant offsets, so loading them costs no arithmetic."""
    return x + tl.cast(row, tl.int64) * stride


@triton.jit
def load_rows(at, stride: tl.constexpr, left, inside, NUMBER: tl.constexpr, GUARDED: tl.constexpr):
    """NUMBER rows starting at the pointers `at`. If GUARDED, only `left` rows exist and the rest is zeros."""
    rows = ()
    for i in tl.static_range(NUMBER):
        mask = inside
        if GUARDED:
            mask = mask_if(inside, left - i)
        rows = rows + (tl.load(at + i * stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def normal_distribution(z):
    """Phi(z): gelu(z) = z Phi(z)."""
    return 0.5 * (1 + tl.erf(z * 0.70710678118654752440))


@triton.jit
def activate(z, threshold, release, off, stateless, ACTIVATION: tl.constexpr):
    """The activation of z, and which features are off (Schmitt trigger: docs/mathematics.md, section 7).

    stateless: no state carries over from the previous position. With <=, NaN stays on and visible.
    """
    if ACTIVATION == "gelu":
        z = z * normal_distribution(z)
    if ACTIVATION == "relu":
        below = z <= threshold
        if release is not None:
            below = below & ((z <= release) | off | stateless)
        off = below
        z = tl.where(off, 0.0, z)
    return z, off


@triton.jit
def not_negative(x):
    """max(x, 0), but NaN stays NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def past_rows(current, before, at, stride: tl.constexpr, p, inside, centre, OFFSET: tl.constexpr, CHUNK: tl.constexpr):
    """The features OFFSET rows before each row of the chunk at p; the centre for rows before the segment."""
    out = ()
    for i in tl.static_range(CHUNK):
        if i >= OFFSET:
            out = out + (current[i - OFFSET],)
        elif CHUNK + i >= OFFSET:
            out = out + (before[CHUNK + i - OFFSET],)
        else:
            mask = mask_if(inside, p + i - OFFSET + 1)
            other = centre.to(at.dtype.element_ty)
            out = out + (tl.load(at + (i - OFFSET) * stride, mask=mask, other=other).to(centre.dtype),)
    return out


@triton.jit
def pair_energy(
    energy,
    current,
    before,
    at,
    stride: tl.constexpr,
    p,
    n,
    inside,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CHUNK: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """`energy` plus the squared differences of the chunk's rows at each offset of the band."""
    crossing = energy * 0  # pairs with a row of the previous chunk
    for offset in tl.static_range(FIRST, LAST + 1):
        past = past_rows(current, before, at, stride, p, inside, crossing, offset, CHUNK)
        for i in tl.static_range(CHUNK):
            step = current[i] - past[i]
            if GUARDED:
                step = tl.where(p + i < n, step, 0.0)
            if i >= offset:
                energy = tl.fma(step, step, energy)
            elif CHUNK + i >= offset:
                crossing = tl.fma(step, step, crossing)
            else:
                step = tl.where(p + i >= offset, step, 0.0)
                energy = tl.fma(step, step, energy)
    return energy + tl.where(p > 0, crossing, 0.0)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    pre,
    bias,
    threshold,
    release,
    h,
    differences,
    total,
    square,
    segment_ends,
    T,
    k: tl.constexpr,
    pre_b,
    pre_t: tl.constexpr,
    pre_k,
    bias_k,
    threshold_b,
    threshold_t,
    threshold_k,
    release_k,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    TRAIL: tl.constexpr,
    OUTER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    THRESHOLD_PER_POSITION: tl.constexpr,
    GUARDED: tl.constexpr,
    EVEN_K: tl.constexpr,
    REFRESH: tl.constexpr,
    LONG: tl.constexpr,
    SCALE: tl.constexpr,
    TRUNCATES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """h = activation(pre + bias) and its statistics; without `h`, the statistics of pre.

    FIRST, LAST: the bands' offsets; FIRST is 0 for a band without pairs in T positions
    TRAIL: the offset at which a row leaves each band's window, 0 for never, -1 for a band that is summed pair by pair
    OUTER: the band that is computed as all pairs minus the others, or -1
    GUARDED: a chunk may extend past the end of a segment
    REFRESH: the number of steps after which a window is summed afresh, to stop rounding errors from accumulating
    LONG: T > REFRESH
    """
    S: tl.constexpr = len(FIRST)
    COMPUTE: tl.constexpr = total.dtype.element_ty
    STORED: tl.constexpr = pre.dtype.element_ty
    b, columns, inside = sequence_and_columns(k, BLOCK_K, EVEN_K)
    zero = tl.zeros([BLOCK_K], COMPUTE)
    x_in = pre + b * pre_b + columns * pre_k
    rows = x_in  # features to read again
    stride: tl.constexpr = pre_t if h is None else k
    if h is not None:
        rows = h + b * T * k + columns

    shift = zero
    if bias is not None:
        shift = tl.load(bias + columns * bias_k, mask=inside, other=0.0).to(COMPUTE)
    on_threshold = zero
    if threshold is not None and not THRESHOLD_PER_POSITION:
        on_threshold = not_negative(tl.load(threshold + columns * threshold_k, mask=inside, other=0.0).to(COMPUTE))
    off_threshold = release
    if release is not None:
        off_threshold = not_negative(tl.load(release + columns * release_k, mask=inside, other=0.0).to(COMPUTE))

    sum_x = zero  # times SCALE, so that no partial sum overflows before the result
    sum_xx = zero
    energies = (zero,) * S
    sum_y = zero
    sum_yy = zero
    t = 0
    while t < T:
        end = T
        excluded = False
        if segment_ends is not None:
            end = tl.load(segment_ends + b * T + t)
            excluded = end < 0
            end = tl.abs(end)
        n = end - t

        # The centre: the mean of the segment's first 8 rows, rounded to h's dtype (docs/mathematics.md, section 4).
        centre = zero
        off = tl.full([BLOCK_K], True, tl.int1)
        first = zero
        begin = row_pointers(x_in, t, pre_t)
        opening = load_rows(begin, pre_t, n, inside, 8, True)
        for i in tl.static_range(8):
            z = opening[i].to(COMPUTE)
            if bias is not None:
                z = z + shift
            if THRESHOLD_PER_POSITION:
                at = row_pointers(threshold + b * threshold_b, t + i, threshold_t)
                on_threshold = not_negative(tl.load(at, mask=i < n, other=0.0).to(COMPUTE)) + zero
            z, off = activate(z, on_threshold, off_threshold, off, excluded, ACTIVATION)
            x = narrow(z, STORED, TRUNCATES).to(COMPUTE)
            if i == 0:
                first = x
            centre = tl.fma(tl.where(i < n, x, first), zero + 0.125, centre)
        centre = narrow(centre, STORED, TRUNCATES).to(COMPUTE)

        off = tl.full([BLOCK_K], True, tl.int1)
        before = (centre,) * CHUNK
        upcoming = load_rows(begin, pre_t, n, inside, CHUNK, GUARDED)
        for q in range(0, n, REFRESH):
            part_x = zero
            part_xx = zero
            part_y = zero
            part_yy = zero
            parts = (zero,) * S
            windows = ()  # F, the sum of y over [p - last, p - first]
            for s in tl.static_range(S):
                window = zero
                if LONG and TRAIL[s] >= 0 and s != OUTER:
                    for u in range(tl.maximum(q - 1 - LAST[s], 0), q - FIRST[s]):
                        x = tl.load(row_pointers(rows, t + u, stride), mask=inside, other=0.0).to(COMPUTE)
                        window = window + (x - centre)
                windows = windows + (window,)

            for p in range(q, tl.minimum(q + REFRESH, n), CHUNK):
                arrived = upcoming
                left = n - p - CHUNK
                upcoming = load_rows(
                    row_pointers(x_in, t + p + CHUNK, pre_t), pre_t, left, mask_if(inside, left), CHUNK, GUARDED
                )
                here = row_pointers(rows, t + p, stride)
                current = ()
                chunk_x = zero  # per-chunk sums: the rounding error of n terms grows with CHUNK + n / CHUNK
                chunk_xx = zero
                chunk_y = zero
                chunk_yy = zero
                for i in tl.static_range(CHUNK):
                    z = arrived[i].to(COMPUTE)
                    if bias is not None:
                        z = z + shift
                    valid = inside
                    if GUARDED:
                        valid = mask_if(inside, n - p - i)
                    if THRESHOLD_PER_POSITION:
                        at = row_pointers(threshold + b * threshold_b, t + p + i, threshold_t)
                        mask = True
                        if GUARDED:
                            mask = p + i < n
                        on_threshold = not_negative(tl.load(at, mask=mask, other=0.0).to(COMPUTE)) + zero
                    z, off = activate(z, on_threshold, off_threshold, off, excluded, ACTIVATION)
                    stored = narrow(z, STORED, TRUNCATES)
                    if h is not None:
                        tl.store(here + i * stride, stored, mask=valid)
                    x = stored.to(COMPUTE)
                    counted = x
                    if GUARDED:
                        counted = tl.where(p + i < n, x, 0.0)
                        x = tl.where(p + i < n, x, centre)
                    chunk_x = tl.fma(counted, zero + SCALE, chunk_x)
                    chunk_xx = tl.fma(counted, counted, chunk_xx)
                    if OUTER >= 0:
                        y = x - centre
                        chunk_y = chunk_y + y
                        chunk_yy = tl.fma(y, y, chunk_yy)
                    current = current + (x,)
                part_x = part_x + chunk_x
                part_xx = part_xx + chunk_xx
                part_y = part_y + chunk_y
                part_yy = part_yy + chunk_yy

                new_parts = ()
                new_windows = ()
                trail = current  # of the previous band
                for s in tl.static_range(S):
                    part = parts[s]
                    window = windows[s]
                    if FIRST[s] > 0 and s != OUTER:
                        if TRAIL[s] < 0:
                            part = pair_energy(
                                part, current, before, here, stride, p, n, inside, FIRST[s], LAST[s], CHUNK, GUARDED
                            )
                        else:
                            # -D/2 = sum of y (F - degree y / 2)
                            if s > 0 and TRAIL[s - 1] == FIRST[s]:
                                lead = trail
                            else:
                                lead = past_rows(current, before, here, stride, p, inside, centre, FIRST[s], CHUNK)
                            trail = (centre,) * CHUNK
                            if TRAIL[s] > 0:
                                trail = past_rows(current, before, here, stride, p, inside, centre, TRAIL[s], CHUNK)
                            for i in tl.static_range(CHUNK):
                                window = window + (lead[i] - trail[i])
                                degree = window_count(p + i, n, LAST[s]) - window_count(p + i, n, FIRST[s] - 1)
                                y = current[i] - centre
                                pull = tl.fma(y, zero - degree.to(COMPUTE) * 0.5, window)
                                part = tl.fma(y, pull, part)
                    new_parts = new_parts + (part,)
                    new_windows = new_windows + (window,)
                parts = new_parts
                windows = new_windows
                before = current
                if h is not None:
                    tl.debug_barrier()  # rows may be read by other threads than wrote them

            sums = ()
            for s in tl.static_range(S):
                sums = sums + (energies[s] + tl.where(excluded, 0.0, parts[s]),)
            energies = sums
            sum_x = sum_x + tl.where(excluded, 0.0, part_x)
            sum_xx = sum_xx + tl.where(excluded, 0.0, part_xx)
            sum_y = sum_y + part_y
            sum_yy = sum_yy + part_yy
        t = end

    if OUTER >= 0:
        rest = tl.fma(sum_yy, zero + T.to(COMPUTE), -sum_y * sum_y)
    for s in tl.static_range(S):
        energy = energies[s]
        if TRAIL[s] >= 0:
            energy = energy * -2
        if s == OUTER:
            energy = rest
        elif OUTER >= 0:
            rest = rest - energy
        # Rounding can make a sum of squares negative, and overflowing squares can give inf - inf = NaN. Unless a
        # feature is NaN (then sum_xx is too), the true value is then infinite.
        energy = tl.where(energy <= 0, 0.0, energy)
        energy = tl.where((energy != energy) & (sum_xx == sum_xx), float("inf"), energy)
        tl.store(differences + (b * S + s) * k + columns, energy, mask=inside)
    tl.store(total + b * k + columns, sum_x * (1 / SCALE), mask=inside)
    tl.store(square + b * k + columns, sum_xx, mask=inside)
