"""The Triton kernel of the forward pass: activation (with the Schmitt trigger) and temporal statistics.

Derivations: docs/mathematics.md, sections 2 to 4 and 7; design and byte counts: docs/kernels.md. `launch.py` imports
this file on first use, so that a machine without a GPU does not need Triton.

One program walks one sequence along T with a block of adjacent features. Rows are loaded `CHUNK` at a time, and those
of the next chunk are requested before the current chunk is processed. The chunk before the current one is in registers
(in the backward pass, the one after it, too); rows further away are read again, from the caches. The last chunk of a
segment may be short: `GUARDED` selects its code. Forward kernels are compiled without contraction and use `tl.fma`
explicitly, so the statistics of h have the same bits whether h was just computed or is read.

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
        at = tl.max_contiguous(tl.multiple_of(x + b * stride_b + columns, 16), 32)
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
        row = row_pointers(at, i, stride, VECTOR)
        if GUARDED:
            rows = rows + (tl.load(row, mask=each(columns, left) > i, other=0.0),)
        else:
            rows = rows + (tl.load(row),)
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

    An infinite release is a plain threshold: nothing is kept on below it. With <=, NaN stays on and visible.
    """
    if ACTIVATION == "gelu":
        z = z * normal_distribution(z)
    if ACTIVATION == "relu":
        off = (z <= threshold) & ((z <= release) | off)
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
def was_active(history, words, row, k, exists, BEHIND: tl.constexpr, VECTOR: tl.constexpr):
    """The mask's bits, 0 or 1, of a row that was BEHIND rows before the current chunk.

    history: the bits of the last 32 rows before the current chunk, the last in the highest bit
    words: the mask in memory, which has all words but the one being filled
    """
    if BEHIND <= 32:
        bit = (history >> (32 - BEHIND)) & 1
    else:
        word = tl.load(row_pointers(words, row >> 5, k, VECTOR), mask=exists, other=0)
        bit = (word >> (row & 31)).to(tl.uint32) & 1
    return bit


@triton.jit
def past_rows(
    current, before, history, source, row, p, columns, centre, shift,
    OFFSET: tl.constexpr, OUTPUT: tl.constexpr, ROUNDING: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The features OFFSET rows before each row of the chunk at p; the centre for rows before the segment.

    source: pointers to the rows to read again, their stride, and, if h is not in memory, the mask and its stride: h is
        pre where the mask has a bit
    row: p's position in the sequence
    """
    if OFFSET >= 2 * CHUNK:
        out = (centre,) * CHUNK
        if p + CHUNK > OFFSET:  # else no row exists, as everywhere in a segment that is shorter
            out = rows_again(history, source, row, p, columns, centre, shift, CHUNK, OFFSET, OUTPUT, ROUNDING, VECTOR)
    else:
        out = ()
        if OFFSET > CHUNK:
            out = rows_again(
                history, source, row, p, columns, centre, shift, OFFSET - CHUNK, OFFSET, OUTPUT, ROUNDING, VECTOR
            )
        for i in tl.static_range(max(OFFSET - CHUNK, 0), CHUNK):
            if i >= OFFSET:
                out = out + (current[i - OFFSET],)
            else:
                out = out + (before[CHUNK + i - OFFSET],)
    return out


@triton.jit
def rows_again(
    history, source, row, p, columns, centre, shift,
    NUMBER: tl.constexpr, OFFSET: tl.constexpr, OUTPUT: tl.constexpr, ROUNDING: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The features OFFSET rows before the first NUMBER rows of the chunk at p, see `past_rows`, read from memory."""
    out = ()
    at = row_pointers(source[0], row - OFFSET, source[1], VECTOR)
    for i in tl.static_range(NUMBER):
        exists = each(columns, p + i) >= OFFSET
        here = row_pointers(at, i, source[1], VECTOR)
        x = tl.load(here, mask=exists, other=centre.to(at.dtype.element_ty)).to(centre.dtype)
        if OUTPUT == "mask":
            x = narrow(x + shift, at.dtype.element_ty, ROUNDING).to(centre.dtype)
            bit = was_active(history, source[2], row + i - OFFSET, source[3], exists, OFFSET - i, VECTOR)
            x = tl.where(exists, tl.where(bit != 0, x, 0.0), centre)
        out = out + (x,)
    return out


@triton.jit
def window_sum(
    history, source, begin, q, columns, centre, shift,
    FIRST: tl.constexpr, LAST: tl.constexpr, OUTPUT: tl.constexpr, ROUNDING: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The sum of h - centre over positions [q - 1 - LAST, q - 1 - FIRST] of the segment that begins at row `begin`."""
    total = tl.zeros_like(centre)
    for u in range(tl.maximum(q - 1 - LAST, 0), q - FIRST):
        at = row_pointers(source[0], begin + u, source[1], VECTOR)
        x = tl.load(at).to(centre.dtype)
        if OUTPUT == "mask":
            x = narrow(x + shift, at.dtype.element_ty, ROUNDING).to(centre.dtype)
            recent = (history >> tl.maximum(32 - (q - u), 0).to(tl.uint32)) & 1
            exists = each(columns, q - u) > 32
            stored = was_active(history, source[2], begin + u, source[3], exists, 33, VECTOR)
            x = tl.where(tl.where(exists, stored, recent) != 0, x, 0.0)
        total = total + (x - centre)
    return total


@triton.jit
def pair_energy(
    energy, current, before, history, source, row, p, n, columns, shift,
    FIRST: tl.constexpr, LAST: tl.constexpr, OUTPUT: tl.constexpr, ROUNDING: tl.constexpr, CHUNK: tl.constexpr,
    GUARDED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`energy` plus the squared differences of the chunk's rows at each offset of the band."""
    crossing = tl.zeros_like(energy)  # pairs with a row of the previous chunk
    for offset in tl.static_range(FIRST, LAST + 1):
        past = past_rows(
            current,
            before,
            history,
            source,
            row,
            p,
            columns,
            energy * 0,
            shift,
            offset,
            OUTPUT,
            ROUNDING,
            CHUNK,
            VECTOR,
        )
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


@triton.jit
def is_on(h, included):
    """``included`` where a feature is on, h > 0 or NaN (which compares false), else 0; int32."""
    return tl.where(h <= 0, 0, included)


@triton.jit
def forward_chunk(
    arrived, before, off, history, windows, parts, sums, counts,
    source, h, k, words, threshold, threshold_t, on_threshold, release_level, shift, centre, columns, t, p, n,
    included, FIRST: tl.constexpr, LAST: tl.constexpr, TRAIL: tl.constexpr, OUTER: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, THRESHOLD_PER_POSITION: tl.constexpr,
    SCALE: tl.constexpr, COUNTED: tl.constexpr, STORED: tl.constexpr, ROUNDING: tl.constexpr, CHUNK: tl.constexpr,
    GUARDED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One chunk at position p of a segment of n that begins at t; see `forward_kernel`. GUARDED: rows may be missing

    counts: if COUNTED, whether a feature is on at the last position, at how many positions it is on as at the one
        before, at how many it is on and was off at the one before, and see `forward_kernel`
    included: 1, or 0 if the segment does not count
    """
    S: tl.constexpr = len(FIRST)
    row = t + p
    out = row_pointers(h, row, k, VECTOR)
    zero = tl.zeros_like(centre)
    current = ()
    bits = each(columns, 0).to(tl.uint32)
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
            here = row_pointers(out, i, k, VECTOR)
            if GUARDED:
                tl.store(here, stored, mask=each(columns, p + i) < n)
            else:
                tl.store(here, stored)
        x = stored.to(zero.dtype)
        counted = x
        if GUARDED:
            counted = tl.where(p + i < n, x, 0.0)
            x = tl.where(p + i < n, x, centre)
        if COUNTED:
            on = is_on(counted, included)
            last_on = on
            if GUARDED:
                last_on = tl.where(p + i < n, on, counts[0])
            counts = (last_on, counts[1] + (on & counts[0]), counts[2] + (on & ~counts[0]), counts[3])
        if OUTPUT == "mask":
            bits = bits | tl.where(counted != 0, 1 << i, 0).to(tl.uint32)
        chunk_x = tl.fma(counted, zero + SCALE, chunk_x)
        chunk_xx = tl.fma(counted, counted, chunk_xx)
        if OUTER >= 0:
            y = x - centre
            chunk_y = chunk_y + y
            chunk_yy = tl.fma(y, y, chunk_yy)
        current = current + (x,)
    if OUTER >= 0:
        sums = (sums[0] + chunk_x, sums[1] + chunk_xx, sums[2] + chunk_y, sums[3] + chunk_yy)
    else:
        sums = (sums[0] + chunk_x, sums[1] + chunk_xx)

    new_parts = ()
    new_windows = ()
    trail = current  # of the previous band
    for s in tl.static_range(S):
        part = parts[s]
        window = windows[s]
        if s != OUTER and TRAIL[s] < 0:
            part = pair_energy(
                part, current, before, history, source, row, p, n, columns, shift,
                FIRST[s], LAST[s], OUTPUT, ROUNDING, CHUNK, GUARDED, VECTOR,
            )  # fmt: skip
        if s != OUTER and TRAIL[s] >= 0:
            # -D/2 = sum of y (F - degree y / 2)
            lead = trail
            if s == 0 or TRAIL[s - 1] != FIRST[s]:
                lead = past_rows(
                    current, before, history, source, row, p, columns, centre, shift,
                    FIRST[s], OUTPUT, ROUNDING, CHUNK, VECTOR,
                )  # fmt: skip
            trail = past_rows(
                current, before, history, source, row, p, columns, centre, shift,
                TRAIL[s], OUTPUT, ROUNDING, CHUNK, VECTOR,
            )  # fmt: skip
            for i in tl.static_range(CHUNK):
                window = window + (lead[i] - trail[i])
                degree = window_count(p + i, n, LAST[s]) - window_count(p + i, n, FIRST[s] - 1)
                y = current[i] - centre
                pull = tl.fma(y, zero - degree.to(zero.dtype) * 0.5, window)
                part = tl.fma(y, pull, part)
        new_parts = new_parts + (part,)
        new_windows = new_windows + (window,)
    if OUTPUT == "mask":
        history = add_bits(history, bits, words, row, tl.minimum(n - p, CHUNK), k, VECTOR)
    if OUTPUT != "nothing":
        tl.debug_barrier()  # rows may be read by other threads than wrote them
    return current, off, history, new_windows, new_parts, sums, counts


@triton.jit
def add_bits(history, bits, words, row, taken, k, VECTOR: tl.constexpr):
    """The mask's bits of the last 32 rows after `taken` more rows; a word that becomes full is stored."""
    filled = row & 31  # rows in the word that is being filled
    if filled + taken >= 32:
        word = ((history >> 1) >> (31 - filled).to(tl.uint32)) | (bits << filled.to(tl.uint32))
        tl.store(row_pointers(words, row >> 5, k, VECTOR), word.to(tl.int32, bitcast=True))
    return (history >> taken.to(tl.uint32)) | (bits << (32 - taken).to(tl.uint32))


@triton.jit(
    do_not_specialize=[
        "T", "k", "refresh", "has_bias", "has_threshold", "has_release", "segmented",
        "pre_b", "pre_t", "pre_k", "bias_k", "threshold_b", "threshold_t", "threshold_k", "release_k",
    ],
    do_not_specialize_on_alignment=[
        "pre", "bias", "threshold", "release", "output", "differences", "total", "square", "transitions",
        "segment_ends",
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
    transitions,
    segment_ends,
    T,
    k,
    refresh,
    has_bias,
    has_threshold,
    has_release,
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
    ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr,
    THRESHOLD_PER_POSITION: tl.constexpr,
    SCALE: tl.constexpr,
    COUNTED: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """h = activation(pre + bias) and its statistics.

    output: by OUTPUT, "h" [B, T, k], the "mask" of active features [B, ceil(T / 32), k] int32 (bit i of word w is
        position 32 w + i), or "nothing"
    refresh: the number of steps after which a window is summed afresh, to stop rounding errors from accumulating; a
        multiple of CHUNK
    has_bias, has_threshold, has_release, segmented: 0 if that pointer is not to be read
    FIRST, LAST: the bands' offsets
    TRAIL: the offset at which a row leaves each band's window, or -1 for a band that is summed pair by pair
    OUTER: the band that is computed as all pairs minus the others, or -1
    COUNTED: whether transitions [B, 3, k] int32 is written
    """
    S: tl.constexpr = len(FIRST)
    COMPUTE: tl.constexpr = total.dtype.element_ty
    STORED: tl.constexpr = pre.dtype.element_ty
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
    if ACTIVATION == "relu" and not THRESHOLD_PER_POSITION:
        on_threshold = not_negative(load_column_values(threshold, columns, threshold_k, has_threshold, 0.0, COMPUTE))
    thresholds = threshold + b * threshold_b

    SUMS: tl.constexpr = 4 if OUTER >= 0 else 2  # of x * SCALE, so that no partial sum overflows, xx, y, yy
    totals = (zero,) * SUMS
    energies = (zero,) * S
    none = each(columns, 0)
    # On at the last position; pairs that are on at both, and at the second alone; starts less ends at which it is on.
    counts = (none, none, none, none) if COUNTED else ()
    history = each(columns, 0).to(tl.uint32)
    t = 0
    while t < T:
        end = tl.load(segment_ends + b * T + t, mask=segmented != 0, other=T)
        excluded = end < 0
        end = tl.abs(end)
        n = end - t
        release_level = zero
        if ACTIVATION == "relu":  # read again for every segment: with one more vector in registers, it spills
            kept = tl.where(excluded, 0, has_release)  # no state carries over between excluded positions
            release_level = load_column_values(release, columns, release_k, kept, float("inf"), COMPUTE)
            release_level = not_negative(release_level)

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
        included = tl.where(excluded, 0, 1)
        if COUNTED:
            first_on = is_on(first, included)  # is counted with those that come after one that is off
            counts = (none, counts[1], counts[2] - first_on, counts[3] + first_on)  # type: ignore[misc]
        for q in range(0, n, refresh):
            sums = (zero,) * SUMS
            parts = (zero,) * S
            windows = ()  # F, the sum of y over [p - last, p - first]
            for s in tl.static_range(S):
                window = zero
                if TRAIL[s] >= 0 and s != OUTER:
                    window = window_sum(
                        history, source, t, q, columns, centre, shift, FIRST[s], LAST[s], OUTPUT, ROUNDING, VECTOR
                    )
                windows = windows + (window,)

            stop = tl.minimum(q + refresh, n)
            whole = stop - (stop - q) % CHUNK
            for p in range(q, whole, CHUNK):
                arrived = upcoming
                at = row_pointers(x_in, t + p + CHUNK, pre_t, VECTOR)
                upcoming = load_rows(at, pre_t, n - p - CHUNK, columns, CHUNK, True, VECTOR)
                before, off, history, windows, parts, sums, counts = forward_chunk(
                    arrived, before, off, history, windows, parts, sums, counts,
                    source, out, k, words, thresholds, threshold_t, on_threshold, release_level, shift, centre, columns,
                    t, p, n, included, FIRST, LAST, TRAIL, OUTER, ACTIVATION, OUTPUT, THRESHOLD_PER_POSITION, SCALE,
                    COUNTED, STORED, ROUNDING, CHUNK, False, VECTOR,
                )  # fmt: skip
            if whole < stop:
                before, off, history, windows, parts, sums, counts = forward_chunk(
                    upcoming, before, off, history, windows, parts, sums, counts,
                    source, out, k, words, thresholds, threshold_t, on_threshold, release_level, shift, centre, columns,
                    t, whole, n, included, FIRST, LAST, TRAIL, OUTER, ACTIVATION, OUTPUT, THRESHOLD_PER_POSITION, SCALE,
                    COUNTED, STORED, ROUNDING, CHUNK, True, VECTOR,
                )  # fmt: skip

            new_energies = ()
            for s in tl.static_range(S):
                new_energies = new_energies + (energies[s] + tl.where(excluded, 0.0, parts[s]),)
            energies = new_energies
            new_totals = ()
            for i in tl.static_range(SUMS):
                new_totals = new_totals + (totals[i] + tl.where(excluded, 0.0, sums[i]),)
            totals = new_totals
        if COUNTED:
            counts = (counts[0], counts[1], counts[2], counts[3] - counts[0])  # type: ignore[misc]
        t = end

    if OUTPUT == "mask":
        filled = T & 31
        if filled != 0:
            word = history >> (32 - filled).to(tl.uint32)
            tl.store(row_pointers(words, T >> 5, k, VECTOR), word.to(tl.int32, bitcast=True))
    rest = zero
    if OUTER >= 0:
        rest = tl.fma(totals[3], zero + T.to(COMPUTE), -totals[2] * totals[2])
    for s in tl.static_range(S):
        energy = energies[s]
        if TRAIL[s] >= 0:
            energy = energy * -2
        if s == OUTER:
            energy = rest
        elif OUTER >= 0:
            rest = rest - energy
        # Rounding can make a sum of squares negative, and overflowing squares can give inf - inf = NaN. Unless a
        # feature is NaN (then so is the sum of squares), the true value is then infinite.
        energy = tl.where(energy <= 0, 0.0, energy)
        energy = tl.where((energy != energy) & (totals[1] == totals[1]), float("inf"), energy)
        store_column_values(differences, b * S + s, k, columns, energy, VECTOR)
    store_column_values(total, b, k, columns, totals[0] * (1 / SCALE), VECTOR)
    store_column_values(square, b, k, columns, totals[1], VECTOR)
    if COUNTED:
        # A feature is switched on as often as off, but for those that are on at one end of a segment.
        store_column_values(transitions, b * 3, k, columns, counts[1], VECTOR)  # type: ignore[misc]
        store_column_values(transitions, b * 3 + 1, k, columns, counts[2] + counts[3], VECTOR)  # type: ignore[misc]
        store_column_values(transitions, b * 3 + 2, k, columns, counts[2], VECTOR)  # type: ignore[misc]
