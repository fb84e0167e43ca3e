"""The Triton kernel of the forward pass: activation (with the Schmitt trigger) and temporal statistics.

Derivations: docs/mathematics.md, sections 2 to 4 and 7; design and byte counts: docs/kernels.md. `launch.py` imports
this file on first use, so that a machine without a GPU does not need Triton.

One program walks one sequence along T with a block of adjacent features. Rows are loaded `CHUNK` at a time, and those
of the next chunk are requested before the current chunk is processed. The current chunk and the two before it are in
registers; rows further back are read again, from the caches. A chunk away from the ends of its segment needs no masks
and has constant window counts; `EDGE` selects the code of the others. Forward kernels are compiled without contraction
and use `tl.fma` explicitly, so the statistics of h have the same bits whether h was just computed or is read.

Sizes, strides and the presence of optional arguments are run-time values, so that they compile nothing anew. With
`VECTOR`, features are adjacent and rows are aligned to 16 bytes; without it, features have any strides. Row offsets are
64-bit. `segment_ends` [B, T] int32 is the end of each position's segment, negative for a run of excluded positions.
"""

# ruff: noqa: RUF005 - Triton has no starred expressions
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_and_columns(k, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr):
    """This program's sequence b and its features' indices [BLOCK_K].

    The last block contains features of the one before it (VECTOR; k >= BLOCK_K) or the last feature repeatedly, so that
    no column needs a mask: they are computed, and stored with the same value, more than once.
    """
    blocks = tl.cdiv(k, BLOCK_K)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK_K
    if VECTOR:
        columns = tl.minimum(start, k - BLOCK_K) + tl.arange(0, BLOCK_K)
    else:
        columns = tl.minimum(start + tl.arange(0, BLOCK_K), k - 1)
    return b, columns.to(tl.int64)


@triton.jit
def column_pointers(x, b, stride_b, columns, stride_k, VECTOR: tl.constexpr):
    """Pointers to the first row. VECTOR: stride_k is 1."""
    if VECTOR:
        at = x + b * stride_b + columns
    else:
        at = x + b * stride_b + columns * stride_k
    return at


@triton.jit
def row_pointers(at, rows, stride, VECTOR: tl.constexpr):
    """The pointers `at`, moved by a number of rows."""
    at = at + tl.cast(rows, tl.int64) * stride
    if VECTOR:  # the hints belong to the line above: on a function's argument they have no effect
        at = tl.max_contiguous(tl.multiple_of(at, 16), 32)
    return at


@triton.jit
def next_row(at, stride, VECTOR: tl.constexpr):
    at = at + stride
    if VECTOR:
        at = tl.max_contiguous(tl.multiple_of(at, 16), 32)
    return at


@triton.jit
def window_count(p, n, REACH: tl.constexpr):
    """The number of positions u in a segment of length n with |u - p| <= REACH."""
    return tl.minimum(p + REACH, n - 1) - tl.maximum(p - REACH, 0) + 1


@triton.jit
def each(columns, number):
    """The number for each column: conditions on it are made from this.

    Triton's interpreter changes the dtype of a boolean that it broadcasts.
    """
    return columns.to(tl.int32) * 0 + number


@triton.jit
def narrow(x, DTYPE: tl.constexpr, TRUNCATES: tl.constexpr):
    """x in h's dtype, rounded to nearest. TRUNCATES: the cast truncates (to bfloat16, in Triton's interpreter)."""
    if TRUNCATES:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(DTYPE)


@triton.jit
def load_rows(at, stride, left, columns, NUMBER: tl.constexpr, GUARDED: tl.constexpr, VECTOR: tl.constexpr):
    """NUMBER rows starting at the pointers `at`. If GUARDED, only `left` rows exist and the rest is zeros."""
    rows = ()
    for i in tl.static_range(NUMBER):
        if GUARDED:
            rows = rows + (tl.load(at, mask=each(columns, left) > i, other=0.0),)
        else:
            rows = rows + (tl.load(at),)
        at = next_row(at, stride, VECTOR)
    return rows


@triton.jit
def load_column_values(x, columns, stride_k, present, other, COMPUTE: tl.constexpr):
    """One number per column, or `other` if the argument is not present."""
    return tl.load(x + columns * stride_k, mask=each(columns, present) > 0, other=other).to(COMPUTE)


@triton.jit
def normal_distribution(z):
    """Phi(z): gelu(z) = z Phi(z)."""
    return 0.5 * (1 + tl.erf(z * 0.70710678118654752440))


@triton.jit
def activate(z, threshold, release, off, ACTIVATION: tl.constexpr):
    """The activation of z, and which features are off (Schmitt trigger: docs/mathematics.md, section 7).

    release: infinite at excluded positions, where no state carries over. With <=, NaN stays on and visible.
    """
    if ACTIVATION == "gelu":
        z = z * normal_distribution(z)
    if ACTIVATION == "relu" or ACTIVATION == "schmitt":
        below = z <= threshold
        if ACTIVATION == "schmitt":
            below = below & ((z <= release) | off)
        off = below
        z = tl.where(off, 0.0, z)
    return z, off


@triton.jit
def not_negative(x):
    """max(x, 0), but NaN stays NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def threshold_at(threshold, row, stride, mask, zero):
    """The threshold of a position, for each column."""
    at = threshold + tl.cast(row, tl.int64) * stride
    return not_negative(tl.load(at, mask=mask, other=0.0).to(zero.dtype)) + zero


@triton.jit
def past_rows(
    current, before, earlier, source, word, row, p, columns, centre, shift,
    OFFSET: tl.constexpr, OUTPUT: tl.constexpr, TRUNCATES: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The features OFFSET rows before each row of the chunk at p; the centre for rows before the segment.

    source: the pointers, the row stride, and what else `read_again` needs
    row: p's position in the sequence
    """
    out = ()
    at = row_pointers(source[0], row - OFFSET, source[1], VECTOR)
    for i in tl.static_range(CHUNK):
        if i >= OFFSET:
            out = out + (current[i - OFFSET],)
        elif CHUNK + i >= OFFSET:
            out = out + (before[CHUNK + i - OFFSET],)
        elif 2 * CHUNK + i >= OFFSET:
            out = out + (earlier[2 * CHUNK + i - OFFSET],)
        else:
            exists = each(columns, p + i - OFFSET) >= 0
            out = out + (read_again(at, source, word, row, row + i - OFFSET, exists, centre, shift, OUTPUT, TRUNCATES),)
        at = next_row(at, source[1], VECTOR)
    return out


@triton.jit
def read_again(at, source, word, now, row, exists, centre, shift, OUTPUT: tl.constexpr, TRUNCATES: tl.constexpr):
    """The feature of an earlier row, which `at` points to; the centre where it does not exist.

    For OUTPUT "mask" h is not in memory: it is pre where the row's bit of `active` is set. The bits of the word that
    position `now` is in are in the register `word`.
    """
    x = tl.load(at, mask=exists, other=centre.to(at.dtype.element_ty)).to(centre.dtype)
    if OUTPUT == "mask":
        k = source[3]
        unfinished = (row >> 5) == (now >> 5)
        words = source[2] + tl.cast(row >> 5, tl.int64) * k
        bits = tl.load(words, mask=exists & (each(exists, row >> 5) < (now >> 5)), other=0)
        bits = tl.where(unfinished, word, bits)
        x = narrow(x + shift, at.dtype.element_ty, TRUNCATES).to(centre.dtype)
        x = tl.where(((bits >> (row & 31)) & 1) != 0, x, 0.0)
        x = tl.where(exists, x, centre)
    return x


@triton.jit
def pair_energy(
    energy, current, before, earlier, source, word, row, p, n, columns, shift,
    FIRST: tl.constexpr, LAST: tl.constexpr, OUTPUT: tl.constexpr, TRUNCATES: tl.constexpr, CHUNK: tl.constexpr,
    EDGE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`energy` plus the squared differences of the chunk's rows at each offset of the band."""
    for offset in tl.static_range(FIRST, LAST + 1):
        past = past_rows(
            current, before, earlier, source, word, row, p, columns, energy * 0, shift,
            offset, OUTPUT, TRUNCATES, CHUNK, VECTOR,
        )  # fmt: skip
        for i in tl.static_range(CHUNK):
            step = current[i] - past[i]
            if i < offset and (EDGE or offset > CHUNK):
                step = tl.where(p + i >= offset, step, 0.0)
            if EDGE:
                step = tl.where(p + i < n, step, 0.0)
            energy = tl.fma(step, step, energy)
    return energy


@triton.jit
def forward_chunk(
    arrived, before, earlier, off, word, windows, parts, sums,
    source, h, k, words, threshold, threshold_t, on_threshold, off_threshold, shift, centre, columns, t, p, n,
    FIRST: tl.constexpr, LAST: tl.constexpr, TRAIL: tl.constexpr, OUTER: tl.constexpr, FAR: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, THRESHOLD_PER_POSITION: tl.constexpr, NEAR: tl.constexpr,
    SCALE: tl.constexpr, STORED: tl.constexpr, TRUNCATES: tl.constexpr, CHUNK: tl.constexpr, EDGE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """One chunk at position p of a segment of n that begins at t; see `forward_kernel`.

    EDGE: rows may be missing and windows may be cut; else they are as described by `uncut`.
    """
    S: tl.constexpr = len(FIRST)
    row = t + p
    out = row_pointers(h, row, k, VECTOR)
    zero = centre * 0
    current = ()
    bits = each(columns, 0)
    chunk_x = zero  # per-chunk sums: the rounding error of n terms grows with CHUNK + n / CHUNK
    chunk_xx = zero
    chunk_y = zero
    chunk_yy = zero
    for i in tl.static_range(CHUNK):
        z = arrived[i].to(zero.dtype)
        if OUTPUT != "nothing":
            z = z + shift
        if THRESHOLD_PER_POSITION:
            on_threshold = threshold_at(threshold, row + i, threshold_t, p + i < n, zero)
        z, off = activate(z, on_threshold, off_threshold, off, ACTIVATION)
        stored = narrow(z, STORED, TRUNCATES)
        if OUTPUT == "h":
            if EDGE:
                tl.store(out, stored, mask=each(columns, p + i) < n)
            else:
                tl.store(out, stored)
            out = next_row(out, k, VECTOR)
        x = stored.to(zero.dtype)
        counted = x
        if EDGE:
            counted = tl.where(p + i < n, x, 0.0)
            x = tl.where(p + i < n, x, centre)
        if OUTPUT == "mask":
            bits = bits | tl.where(counted != 0, 1 << i, 0)
        chunk_x = tl.fma(counted, zero + SCALE, chunk_x)
        chunk_xx = tl.fma(counted, counted, chunk_xx)
        if OUTER >= 0:
            y = x - centre
            chunk_y = chunk_y + y
            chunk_yy = tl.fma(y, y, chunk_yy)
        current = current + (x,)
    sums = (sums[0] + chunk_x, sums[1] + chunk_xx, sums[2] + chunk_y, sums[3] + chunk_yy)

    new_parts = ()
    new_windows = ()
    trail = current  # of the previous band
    for s in tl.static_range(S):
        part = parts[s]
        window = windows[s]
        if s != OUTER and TRAIL[s] < 0:
            part = pair_energy(
                part, current, before, earlier, source, word, row, p, n, columns, shift,
                FIRST[s], LAST[s], OUTPUT, TRUNCATES, CHUNK, EDGE, VECTOR,
            )  # fmt: skip
        if s != OUTER and TRAIL[s] > 0:
            # -D/2 = sum of y (F - degree y / 2)
            lead = trail
            if s == 0 or TRAIL[s - 1] != FIRST[s]:
                lead = past_rows(
                    current, before, earlier, source, word, row, p, columns, centre, shift,
                    FIRST[s], OUTPUT, TRUNCATES, CHUNK, VECTOR,
                )  # fmt: skip
            trail = past_rows(
                current, before, earlier, source, word, row, p, columns, centre, shift,
                TRAIL[s], OUTPUT, TRUNCATES, CHUNK, VECTOR,
            )  # fmt: skip
            share = half_degree(p, n, FIRST[s], LAST[s], NEAR, EDGE).to(zero.dtype)
            change = half_degree(p + 1, n, FIRST[s], LAST[s], NEAR, EDGE).to(zero.dtype) - share
            for i in tl.static_range(CHUNK):
                window = window + (lead[i] - trail[i])
                if EDGE:
                    share = half_degree(p + i, n, FIRST[s], LAST[s], NEAR, EDGE).to(zero.dtype)
                y = current[i] - centre
                pull = tl.fma(y, zero - share, window)
                part = tl.fma(y, pull, part)
                if LAST[s] > NEAR:
                    share = share + change
        new_parts = new_parts + (part,)
        new_windows = new_windows + (window,)
    if OUTPUT == "mask":
        shifted = row & 31
        word = word | (bits << shifted)
        if shifted + tl.minimum(CHUNK, n - p) >= 32:
            tl.store(words + tl.cast(row >> 5, tl.int64) * k, word)
            word = bits >> ((32 - shifted) & 31)
    if OUTPUT != "nothing" and FAR:
        tl.debug_barrier()  # rows may be read by other threads than wrote them
    return current, off, word, new_windows, new_parts, sums


@triton.jit
def half_degree(p, n, FIRST: tl.constexpr, LAST: tl.constexpr, NEAR: tl.constexpr, EDGE: tl.constexpr):
    """Half the number of positions u in a segment of length n with FIRST <= |u - p| <= LAST. float32

    Unless EDGE, windows up to NEAR are not cut.
    """
    if EDGE or LAST > NEAR:
        degree = window_count(p, n, LAST)
        if EDGE or FIRST - 1 > NEAR:
            degree -= window_count(p, n, FIRST - 1)
        else:
            degree -= 2 * FIRST - 1
        half = degree.to(tl.float32) * 0.5
    else:
        half = tl.cast(LAST - FIRST + 1, tl.float32)
    return half


@triton.jit
def uncut(p, n, AHEAD: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, NEAR: tl.constexpr, CHUNK: tl.constexpr):
    """Whether windows up to NEAR are whole at all rows of the chunk at p, and the others' counts change steadily.

    Also, AHEAD rows after the chunk are within the segment.
    """
    inside = (p > NEAR) & (p + CHUNK + AHEAD <= n)
    for s in tl.static_range(len(LAST)):
        if LAST[s] > NEAR:
            inside = inside & (p != bend(LAST[s], n, CHUNK)) & (p != bend(n - 1 - LAST[s], n, CHUNK))
        if FIRST[s] - 1 > NEAR:
            inside = inside & (p != bend(FIRST[s] - 1, n, CHUNK)) & (p != bend(n - FIRST[s], n, CHUNK))
    return inside


@triton.jit
def end_of_uncut(
    p, stop, n, AHEAD: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, NEAR: tl.constexpr, CHUNK: tl.constexpr
):
    """The end of the chunks from p on that are `uncut`, if the one at p is."""
    end = tl.minimum(stop, n - AHEAD - CHUNK + 1)
    for s in tl.static_range(len(LAST)):
        if LAST[s] > NEAR:
            end = before_bend(end, p, LAST[s], n, CHUNK)
            end = before_bend(end, p, n - 1 - LAST[s], n, CHUNK)
        if FIRST[s] - 1 > NEAR:
            end = before_bend(end, p, FIRST[s] - 1, n, CHUNK)
            end = before_bend(end, p, n - FIRST[s], n, CHUNK)
    return end


@triton.jit
def bend(at, n, CHUNK: tl.constexpr):
    """The chunk within which a count changes its slope, at position `at`; n if that is between two chunks."""
    within = (at & (CHUNK - 1)) != 0
    return tl.where((at >= 0) & within & ((at & (CHUNK - 1)) != CHUNK - 1), at // CHUNK * CHUNK, n)


@triton.jit
def before_bend(end, p, at, n, CHUNK: tl.constexpr):
    chunk = bend(at, n, CHUNK)
    return tl.where(chunk > p, tl.minimum(end, chunk), end)


@triton.jit(
    do_not_specialize=[
        "T", "k", "refresh", "has_bias", "has_threshold", "segmented",
        "pre_b", "pre_t", "pre_k", "bias_k", "threshold_b", "threshold_t", "threshold_k", "release_k",
    ],
    do_not_specialize_on_alignment=[
        "pre", "bias", "threshold", "release", "output", "differences", "total", "square", "segment_ends",
    ],
)  # fmt: skip
def forward_kernel(
    pre,
    bias,
    threshold,
    release,
    output,
    differences,
    total,
    square,
    segment_ends,
    T,
    k,
    refresh,
    has_bias,
    has_threshold,
    segmented,
    pre_b,
    pre_t,
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
    FAR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr,
    THRESHOLD_PER_POSITION: tl.constexpr,
    SCALE: tl.constexpr,
    TRUNCATES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """h = activation(pre + bias) and its statistics.

    output: by OUTPUT, "h" [B, T, k], the "mask" of active features [B, ceil(T / 32), k] int32 (bit i of word w is
        position 32 w + i), or "nothing"
    refresh: the number of steps after which a window is summed afresh, to stop rounding errors from accumulating
    has_bias, has_threshold, segmented: 0 if that pointer is not to be read
    FIRST, LAST: the bands' offsets
    TRAIL: the offset at which a row leaves each band's window, or -1 for a band that is summed pair by pair
    OUTER: the band that is computed as all pairs minus the others, or -1; its LAST is 0
    FAR: a band reaches rows that are no longer in registers
    ACTIVATION: "schmitt" is relu with a release
    """
    S: tl.constexpr = len(FIRST)
    COMPUTE: tl.constexpr = total.dtype.element_ty
    STORED: tl.constexpr = pre.dtype.element_ty
    NEAR: tl.constexpr = 15
    b, columns = sequence_and_columns(k, BLOCK_K, VECTOR)
    zero = tl.zeros([BLOCK_K], COMPUTE)
    x_in = column_pointers(pre, b, pre_b, columns, pre_k, VECTOR)
    words = segment_ends + columns  # where the mask goes
    if OUTPUT == "h":
        out = output + b * T * k + columns
        source = (out, k)  # features to read again
    elif OUTPUT == "mask":
        out = x_in
        words = output + b * tl.cdiv(T, 32) * k + columns
        source = (x_in, pre_t, words, k)
    else:
        out = x_in
        source = (x_in, pre_t)

    shift = zero
    if OUTPUT != "nothing":
        shift = load_column_values(bias, columns, bias_k, has_bias, -0.0, COMPUTE)  # x + -0 is x, also for x = -0
    on_threshold = zero
    if (ACTIVATION == "relu" or ACTIVATION == "schmitt") and not THRESHOLD_PER_POSITION:
        on_threshold = not_negative(load_column_values(threshold, columns, threshold_k, has_threshold, 0.0, COMPUTE))
    level = zero
    if ACTIVATION == "schmitt":
        level = not_negative(load_column_values(release, columns, release_k, 1, 0.0, COMPUTE))
    thresholds = threshold + b * threshold_b

    sum_x = zero  # times SCALE, so that no partial sum overflows before the result
    sum_xx = zero
    energies = (zero,) * S
    sum_y = zero
    sum_yy = zero
    word = each(columns, 0)
    t = 0
    while t < T:
        end = tl.load(segment_ends + b * T + t, mask=segmented != 0, other=T)
        excluded = end < 0
        end = tl.abs(end)
        n = end - t
        off_threshold = level
        if ACTIVATION == "schmitt":
            off_threshold = tl.where(excluded, float("inf"), level)

        # The centre: the mean of the segment's first 8 rows, rounded to h's dtype (docs/mathematics.md, section 4).
        centre = zero
        off = tl.full([BLOCK_K], True, tl.int1)
        first = zero
        upcoming = load_rows(row_pointers(x_in, t, pre_t, VECTOR), pre_t, n, columns, CHUNK, True, VECTOR)
        for i in tl.static_range(8):
            z = upcoming[i].to(COMPUTE)
            if OUTPUT != "nothing":
                z = z + shift
            if THRESHOLD_PER_POSITION:
                on_threshold = threshold_at(thresholds, t + i, threshold_t, i < n, zero)
            z, off = activate(z, on_threshold, off_threshold, off, ACTIVATION)
            x = narrow(z, STORED, TRUNCATES).to(COMPUTE)
            if i == 0:
                first = x
            centre = tl.fma(tl.where(i < n, x, first), zero + 0.125, centre)
        centre = narrow(centre, STORED, TRUNCATES).to(COMPUTE)

        off = tl.full([BLOCK_K], True, tl.int1)
        before = (centre,) * CHUNK
        earlier = (centre,) * CHUNK
        for q in range(0, n, refresh):
            sums = (zero, zero, zero, zero)
            parts = (zero,) * S
            windows = ()  # F, the sum of y over [p - last, p - first]
            if OUTPUT != "nothing":
                tl.debug_barrier()
            for s in tl.static_range(S):
                window = zero
                if TRAIL[s] >= 0 and s != OUTER:
                    for u in range(tl.maximum(q - 1 - LAST[s], 0), q - FIRST[s]):
                        at = row_pointers(source[0], t + u, source[1], VECTOR)
                        exists = each(columns, 1) > 0
                        x = read_again(at, source, word, t + q, t + u, exists, centre, shift, OUTPUT, TRUNCATES)
                        window = window + (x - centre)
                windows = windows + (window,)

            p = q
            stop = tl.minimum(q + refresh, n)
            while p < stop:
                while (p < stop) & (uncut(p, n, NEAR, FIRST, LAST, NEAR, CHUNK) == 0):
                    arrived = upcoming
                    at = row_pointers(x_in, t + p + CHUNK, pre_t, VECTOR)
                    upcoming = load_rows(at, pre_t, n - p - CHUNK, columns, CHUNK, True, VECTOR)
                    current, off, word, windows, parts, sums = forward_chunk(
                        arrived, before, earlier, off, word, windows, parts, sums,
                        source, out, k, words, thresholds, threshold_t, on_threshold, off_threshold, shift, centre,
                        columns, t, p, n, FIRST, LAST, TRAIL, OUTER, FAR, ACTIVATION, OUTPUT, THRESHOLD_PER_POSITION,
                        NEAR, SCALE, STORED, TRUNCATES, CHUNK, True, VECTOR,
                    )  # fmt: skip
                    earlier = before
                    before = current
                    p += CHUNK
                end_inside = end_of_uncut(p, stop, n, NEAR, FIRST, LAST, NEAR, CHUNK)
                for inside in tl.range(p, end_inside, CHUNK, loop_unroll_factor=UNROLL):
                    arrived = upcoming
                    at = row_pointers(x_in, t + inside + CHUNK, pre_t, VECTOR)
                    upcoming = load_rows(at, pre_t, n, columns, CHUNK, False, VECTOR)
                    current, off, word, windows, parts, sums = forward_chunk(
                        arrived, before, earlier, off, word, windows, parts, sums,
                        source, out, k, words, thresholds, threshold_t, on_threshold, off_threshold, shift, centre,
                        columns, t, inside, n, FIRST, LAST, TRAIL, OUTER, FAR, ACTIVATION, OUTPUT,
                        THRESHOLD_PER_POSITION, NEAR, SCALE, STORED, TRUNCATES, CHUNK, False, VECTOR,
                    )  # fmt: skip
                    earlier = before
                    before = current
                p += tl.maximum(end_inside - p + CHUNK - 1, 0) // CHUNK * CHUNK

            new_energies = ()
            for s in tl.static_range(S):
                new_energies = new_energies + (energies[s] + tl.where(excluded, 0.0, parts[s]),)
            energies = new_energies
            sum_x = sum_x + tl.where(excluded, 0.0, sums[0])
            sum_xx = sum_xx + tl.where(excluded, 0.0, sums[1])
            sum_y = sum_y + sums[2]
            sum_yy = sum_yy + sums[3]
        t = end

    if OUTPUT == "mask":
        tl.store(words + tl.cast(T >> 5, tl.int64) * k, word, mask=each(columns, T & 31) != 0)
    rest = zero
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
        tl.store(differences + (b * S + s) * k + columns, energy)
    tl.store(total + b * k + columns, sum_x * (1 / SCALE))
    tl.store(square + b * k + columns, sum_xx)
