"""The Triton kernel of the forward pass: activation (with the Schmitt trigger) and temporal statistics.

Derivations: docs/mathematics.md, sections 2 to 4 and 7; design and byte counts: docs/kernels.md. `launch.py` imports
this file on first use, so that a machine without a GPU does not need Triton.

One program walks one sequence along T with a block of adjacent features. Rows are loaded `CHUNK` at a time, and those
of the next chunk are requested before the current chunk is processed. The current chunk and the two before it are in
registers; rows further back are read again, from the caches. A chunk away from the ends of its segment needs no masks
and has constant window counts; `CUT` and `GUARDED` select the code of the others. Forward kernels are compiled without
contraction and use `tl.fma` explicitly, so the statistics of h have the same bits whether h was just computed or read.

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
    """Pointers to the row after that at `at`."""
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
def narrow(x, DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """x in h's dtype, rounded to nearest.

    ROUNDING: "cast"; "pairs", for 16 bits, by an instruction that takes two numbers (the compiler uses one for each
        number if the result is also widened again); "bits" in Triton's interpreter, whose cast to bfloat16 truncates
    """
    if ROUNDING == "pairs":
        if DTYPE.is_bf16():
            out = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2)
        else:
            out = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, True, 2)
    else:
        if ROUNDING == "bits":
            bits = x.to(tl.uint32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
            x = tl.where(x == x, rounded, x)
        out = x.to(DTYPE)
    return out


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
def store_column_values(x, row, k, columns, values, VECTOR: tl.constexpr):
    """Row `row` of x [rows, k], contiguous."""
    at = x + row * k + columns
    if VECTOR:
        at = tl.max_contiguous(tl.multiple_of(at, 16), 32)
    tl.store(at, values)


@triton.jit
def normal_distribution(z):
    """Phi(z): gelu(z) = z Phi(z)."""
    return 0.5 * (1 + tl.erf(z * 0.70710678118654752440))


@triton.jit
def activate(z, threshold, release, off, ACTIVATION: tl.constexpr):
    """The activation of z, and which features are off (Schmitt trigger: docs/mathematics.md, section 7).

    With <=, NaN stays on and visible.
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
    OFFSET: tl.constexpr, OUTPUT: tl.constexpr, ROUNDING: tl.constexpr, CHUNK: tl.constexpr, CUT: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The features OFFSET rows before each row of the chunk at p; the centre for rows before the segment.

    source: the pointers, the row stride, and what else `read_again` needs
    row: p's position in the sequence
    CUT: some rows may exist and others not, see `bend`
    """
    if OFFSET <= 2 * CHUNK:
        out = ()
        for i in tl.static_range(CHUNK):
            if i >= OFFSET:
                out = out + (current[i - OFFSET],)
            elif CHUNK + i >= OFFSET:
                out = out + (before[CHUNK + i - OFFSET],)
            else:
                out = out + (earlier[2 * CHUNK + i - OFFSET],)
    else:
        out = (centre,) * CHUNK
        if p + CHUNK > OFFSET:
            out = ()
            at = row_pointers(source[0], row - OFFSET, source[1], VECTOR)
            for i in tl.static_range(CHUNK):
                then = row + i - OFFSET
                exists = each(columns, p + i) >= OFFSET
                x = read_again(at, source, word, row, then, exists, centre, shift, OUTPUT, ROUNDING, CUT, VECTOR)
                out = out + (x,)
                at = next_row(at, source[1], VECTOR)
    return out


@triton.jit
def read_again(
    at, source, word, now, row, exists, centre, shift,
    OUTPUT: tl.constexpr, ROUNDING: tl.constexpr, GUARDED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The feature of an earlier row, which `at` points to; if GUARDED, the centre where it does not exist.

    For OUTPUT "mask" h is not in memory: it is pre where the row's bit of `active` is set. The bits of the word that
    position `now` is in are in the register `word`.
    """
    if GUARDED:
        x = tl.load(at, mask=exists, other=centre.to(at.dtype.element_ty)).to(centre.dtype)
    else:
        x = tl.load(at).to(centre.dtype)
    if OUTPUT == "mask":
        k = source[3]
        unfinished = (row >> 5) == (now >> 5)
        words = row_pointers(source[2], row >> 5, k, VECTOR)
        bits = tl.load(words, mask=exists & (each(exists, row >> 5) < (now >> 5)), other=0)
        bits = tl.where(unfinished, word, bits)
        x = narrow(x + shift, at.dtype.element_ty, ROUNDING).to(centre.dtype)
        x = tl.where(((bits >> (row & 31)) & 1) != 0, x, 0.0)
        if GUARDED:
            x = tl.where(exists, x, centre)
    return x


@triton.jit
def pair_energy(
    energy, current, before, earlier, source, word, row, p, n, columns, shift,
    FIRST: tl.constexpr, LAST: tl.constexpr, OUTPUT: tl.constexpr, ROUNDING: tl.constexpr, CHUNK: tl.constexpr,
    CUT: tl.constexpr, GUARDED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`energy` plus the squared differences of the chunk's rows at each offset of the band."""
    for offset in tl.static_range(FIRST, LAST + 1):
        past = past_rows(
            current, before, earlier, source, word, row, p, columns, energy * 0, shift,
            offset, OUTPUT, ROUNDING, CHUNK, True, VECTOR,
        )  # fmt: skip
        for i in tl.static_range(CHUNK):
            step = current[i] - past[i]
            if i < offset and (CUT or offset > CHUNK):
                step = tl.where(p + i >= offset, step, 0.0)
            if GUARDED:
                step = tl.where(p + i < n, step, 0.0)
            energy = tl.fma(step, step, energy)
    return energy


@triton.jit
def forward_chunk(
    arrived, before, earlier, off, word, windows, parts, sums,
    source, h, k, words, threshold, threshold_t, on_threshold, release_level, shift, centre, columns, t, p, n,
    FIRST: tl.constexpr, LAST: tl.constexpr, TRAIL: tl.constexpr, OUTER: tl.constexpr, FAR: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, THRESHOLD_PER_POSITION: tl.constexpr, NEAR: tl.constexpr,
    SCALE: tl.constexpr, STORED: tl.constexpr, ROUNDING: tl.constexpr, CHUNK: tl.constexpr, CUT: tl.constexpr,
    GUARDED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One chunk at position p of a segment of n that begins at t; see `forward_kernel`.

    CUT: windows may be cut; else they are as described by `uncut`
    GUARDED: rows may be missing
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
        z, off = activate(z, on_threshold, release_level, off, ACTIVATION)
        stored = arrived[i] if OUTPUT == "nothing" else narrow(z, STORED, ROUNDING)
        if OUTPUT == "h":
            if GUARDED:
                tl.store(out, stored, mask=each(columns, p + i) < n)
            else:
                tl.store(out, stored)
            out = next_row(out, k, VECTOR)
        x = stored.to(zero.dtype)
        counted = x
        if GUARDED:
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
                FIRST[s], LAST[s], OUTPUT, ROUNDING, CHUNK, CUT, GUARDED, VECTOR,
            )  # fmt: skip
        if s != OUTER and TRAIL[s] > 0:
            # -D/2 = sum of y (F - degree y / 2)
            lead = trail
            if s == 0 or TRAIL[s - 1] != FIRST[s]:
                lead = past_rows(
                    current, before, earlier, source, word, row, p, columns, centre, shift,
                    FIRST[s], OUTPUT, ROUNDING, CHUNK, True, VECTOR,
                )  # fmt: skip
            trail = past_rows(
                current, before, earlier, source, word, row, p, columns, centre, shift,
                TRAIL[s], OUTPUT, ROUNDING, CHUNK, CUT, VECTOR,
            )  # fmt: skip
            share = half_degree(p, n, FIRST[s], LAST[s], NEAR, CUT).to(zero.dtype)
            change = half_degree(p + 1, n, FIRST[s], LAST[s], NEAR, CUT).to(zero.dtype) - share
            for i in tl.static_range(CHUNK):
                window = window + (lead[i] - trail[i])
                if CUT:
                    share = half_degree(p + i, n, FIRST[s], LAST[s], NEAR, CUT).to(zero.dtype)
                y = current[i] - centre
                pull = tl.fma(y, zero - share, window)
                part = tl.fma(y, pull, part)
                if LAST[s] > NEAR:
                    share = share + change
        new_parts = new_parts + (part,)
        new_windows = new_windows + (window,)
    if OUTPUT == "mask":
        word = add_bits(word, bits, words, row, n - p, k, CHUNK, VECTOR)
    if OUTPUT != "nothing" and FAR:
        tl.debug_barrier()  # rows may be read by other threads than wrote them
    return current, off, word, new_windows, new_parts, sums


@triton.jit
def add_bits(word, bits, words, row, left, k, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    """The word of the mask that is being filled, after a chunk's bits; it is stored when it is full."""
    shifted = row & 31
    word = word | (bits << shifted)
    if shifted + tl.minimum(CHUNK, left) >= 32:
        tl.store(row_pointers(words, row >> 5, k, VECTOR), word)
        word = bits >> ((32 - shifted) & 31)
    return word


@triton.jit
def excluded_chunk(
    at, stride, word, h, k, words, threshold, threshold_t, on_threshold, shift, columns, row, left,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, THRESHOLD_PER_POSITION: tl.constexpr, STORED: tl.constexpr,
    ROUNDING: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One chunk of excluded positions, `left` of which exist: activated without state, and in no statistic."""
    rows = load_rows(at, stride, left, columns, CHUNK, True, VECTOR)
    out = row_pointers(h, row, k, VECTOR)
    bits = each(columns, 0)
    off = each(columns, 1) > 0
    for i in tl.static_range(CHUNK):
        if THRESHOLD_PER_POSITION:
            on_threshold = threshold_at(threshold, row + i, threshold_t, i < left, shift * 0)
        z = rows[i].to(shift.dtype) + shift
        z, off = activate(z, on_threshold, on_threshold, off, "relu" if ACTIVATION == "schmitt" else ACTIVATION)
        stored = narrow(z, STORED, ROUNDING)
        if OUTPUT == "h":
            tl.store(out, stored, mask=each(columns, i) < left)
            out = next_row(out, k, VECTOR)
        else:
            on = (stored.to(shift.dtype) != 0) & (each(columns, i) < left)
            bits = bits | tl.where(on, 1 << i, 0)
    if OUTPUT == "mask":
        word = add_bits(word, bits, words, row, left, k, CHUNK, VECTOR)
    return word


@triton.jit
def half_degree(p, n, FIRST: tl.constexpr, LAST: tl.constexpr, NEAR: tl.constexpr, CUT: tl.constexpr):
    """Half the number of positions u in a segment of length n with FIRST <= |u - p| <= LAST. float32

    Unless CUT, windows up to NEAR are not cut.
    """
    if CUT or LAST > NEAR:
        degree = window_count(p, n, LAST)
        if CUT or FIRST - 1 > NEAR:
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
    """The chunk in which a count changes its slope after position `at`; n if that is between two chunks.

    In other chunks, of the rows that enter or leave a window there are all or none.
    """
    return tl.where((at >= 0) & ((at & (CHUNK - 1)) != CHUNK - 1), at // CHUNK * CHUNK, n)


@triton.jit
def before_bend(end, p, at, n, CHUNK: tl.constexpr):
    """`end`, or the start of the chunk that `bend` gives, if that is after p and earlier."""
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
    ROUNDING: tl.constexpr,
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
    release_level = zero
    if ACTIVATION == "schmitt":
        release_level = not_negative(load_column_values(release, columns, release_k, 1, 0.0, COMPUTE))
    thresholds = threshold + b * threshold_b

    sums = (zero, zero, zero, zero)  # of x * SCALE, so that no partial sum overflows before the result, xx, y, yy
    parts = (zero,) * S
    word = each(columns, 0)
    t = 0
    while t < T:
        end = tl.load(segment_ends + b * T + t, mask=segmented != 0, other=T)
        excluded = end < 0
        end = tl.abs(end)
        n = end - t
        if excluded:
            if OUTPUT != "nothing":
                for p in range(0, n, CHUNK):
                    at = row_pointers(x_in, t + p, pre_t, VECTOR)
                    word = excluded_chunk(
                        at, pre_t, word, out, k, words, thresholds, threshold_t, on_threshold, shift, columns,
                        t + p, n - p, ACTIVATION, OUTPUT, THRESHOLD_PER_POSITION, STORED, ROUNDING, CHUNK, VECTOR,
                    )  # fmt: skip
        else:
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
                z, off = activate(z, on_threshold, release_level, off, ACTIVATION)
                x = narrow(z, STORED, ROUNDING).to(COMPUTE)
                if i == 0:
                    first = x
                centre = tl.fma(tl.where(i < n, x, first), zero + 0.125, centre)
            centre = narrow(centre, STORED, ROUNDING).to(COMPUTE)

            off = tl.full([BLOCK_K], True, tl.int1)
            before = (centre,) * CHUNK
            earlier = (centre,) * CHUNK
            for q in range(0, n, refresh):
                windows = ()  # F, the sum of y over [p - last, p - first]
                if OUTPUT != "nothing":
                    tl.debug_barrier()
                for s in tl.static_range(S):
                    window = zero
                    if TRAIL[s] >= 0 and s != OUTER:
                        for u in range(tl.maximum(q - 1 - LAST[s], 0), q - FIRST[s]):
                            at = row_pointers(source[0], t + u, source[1], VECTOR)
                            exists = each(columns, 1) > 0
                            x = read_again(
                                at, source, word, t + q, t + u, exists, centre, shift, OUTPUT, ROUNDING, False, VECTOR
                            )
                            window = window + (x - centre)
                    windows = windows + (window,)

                p = q
                stop = tl.minimum(q + refresh, n)
                while p < stop:
                    while (p < stop) & (uncut(p, n, NEAR, FIRST, LAST, NEAR, CHUNK) == 0):
                        arrived = upcoming
                        at = row_pointers(x_in, t + p + CHUNK, pre_t, VECTOR)
                        upcoming = load_rows(at, pre_t, n - p - CHUNK, columns, CHUNK, True, VECTOR)
                        if n - p >= CHUNK:
                            current, off, word, windows, parts, sums = forward_chunk(
                                arrived, before, earlier, off, word, windows, parts, sums,
                                source, out, k, words, thresholds, threshold_t, on_threshold, release_level, shift,
                                centre, columns, t, p, n, FIRST, LAST, TRAIL, OUTER, FAR, ACTIVATION, OUTPUT,
                                THRESHOLD_PER_POSITION, NEAR, SCALE, STORED, ROUNDING, CHUNK, True, False, VECTOR,
                            )  # fmt: skip
                        else:
                            current, off, word, windows, parts, sums = forward_chunk(
                                arrived, before, earlier, off, word, windows, parts, sums,
                                source, out, k, words, thresholds, threshold_t, on_threshold, release_level, shift,
                                centre, columns, t, p, n, FIRST, LAST, TRAIL, OUTER, FAR, ACTIVATION, OUTPUT,
                                THRESHOLD_PER_POSITION, NEAR, SCALE, STORED, ROUNDING, CHUNK, True, True, VECTOR,
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
                            source, out, k, words, thresholds, threshold_t, on_threshold, release_level, shift, centre,
                            columns, t, inside, n, FIRST, LAST, TRAIL, OUTER, FAR, ACTIVATION, OUTPUT,
                            THRESHOLD_PER_POSITION, NEAR, SCALE, STORED, ROUNDING, CHUNK, False, False, VECTOR,
                        )  # fmt: skip
                        earlier = before
                        before = current
                    p += tl.maximum(end_inside - p + CHUNK - 1, 0) // CHUNK * CHUNK
        t = end

    if OUTPUT == "mask":
        tl.store(row_pointers(words, T >> 5, k, VECTOR), word, mask=each(columns, T & 31) != 0)
    rest = zero
    if OUTER >= 0:
        rest = tl.fma(sums[3], zero + T.to(COMPUTE), -sums[2] * sums[2])
    for s in tl.static_range(S):
        energy = parts[s]
        if TRAIL[s] >= 0:
            energy = energy * -2
        if s == OUTER:
            energy = rest
        elif OUTER >= 0:
            rest = rest - energy
        # Rounding can make a sum of squares negative, and overflowing squares can give inf - inf = NaN. Unless a
        # feature is NaN (then so is the sum of squares), the true value is then infinite.
        energy = tl.where(energy <= 0, 0.0, energy)
        energy = tl.where((energy != energy) & (sums[1] == sums[1]), float("inf"), energy)
        store_column_values(differences, b * S + s, k, columns, energy, VECTOR)
    store_column_values(total, b, k, columns, sums[0] * (1 / SCALE), VECTOR)
    store_column_values(square, b, k, columns, sums[1], VECTOR)
