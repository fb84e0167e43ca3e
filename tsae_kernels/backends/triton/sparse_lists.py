"""Triton kernels that make lists of active features: by token from the active mask, and by feature from those by token.

`sparse_launch.py` launches them and says what they read and write. All indices into [B, T, k] tensors are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsae_kernels.backends.triton.forward import narrow


@triton.jit(do_not_specialize=["T", "W", "k", "C"])
def list_kernel(
    active,
    chunk_counts,
    indices,
    counts,
    T,
    W,
    k,
    C,
    CHUNKS: tl.constexpr,
    WRITES: tl.constexpr,
):
    """One of CHUNKS ranges of the columns in one row of the active mask [B, W, k], for the row's 32 tokens.

    Without WRITES: chunk_counts [B W, CHUNKS, 32], the active features of each token in the range. With WRITES: their
    indices in the lists, from the place that the counts of the ranges before give; the last range also writes `counts`.
    A lane reads a word, 32 at a time; a word that is not 0 is then read by all lanes, each for its token.
    """
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    width = tl.cdiv(tl.cdiv(k, CHUNKS), 32) * 32
    first = chunk * width
    last = tl.minimum(first + width, k)
    lanes = tl.arange(0, 32)
    number = tl.zeros([32], tl.int32)  # of each token's active features in the columns before
    if WRITES:
        before = tl.arange(0, CHUNKS)[:, None]
        at_counts = chunk_counts + (row * CHUNKS + before) * 32 + lanes[None, :]
        number = tl.sum(tl.load(at_counts, mask=before < chunk, other=0), 0).to(tl.int32)
    t = (row % W) * 32 + lanes
    n = (row // W) * T + t
    words_in = active + row * k
    upcoming = tl.load(words_in + first + lanes, mask=first + lanes < last, other=0)
    for begin in range(first, last, 32):
        words = upcoming
        after = begin + 32 + lanes
        upcoming = tl.load(words_in + after, mask=after < last, other=0)
        column = tl.min(tl.where(words != 0, lanes, 32), 0)
        while column < 32:
            bit = (tl.load(words_in + begin + column) >> lanes) & 1
            if WRITES:
                tl.store(indices + n * C + number, begin + column + lanes * 0, mask=(bit != 0) & (number < C))
            number += bit
            column = tl.min(tl.where((words != 0) & (lanes > column), lanes, 32), 0)
    if not WRITES:
        tl.store(chunk_counts + (row * CHUNKS + chunk) * 32 + lanes, number)
    elif chunk == CHUNKS - 1:
        tl.store(counts + n, number, mask=t < T)


@triton.jit(do_not_specialize=["T", "k", "C", "E"])
def values_kernel(
    pre,
    bias,
    counts,
    indices,
    values,
    T,
    k,
    C,
    E,
    pre_b,
    pre_t,
    pre_k,
    COMPUTE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values [E] of the listed features, pre + bias; past the counts the value 0 and the index k."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = entries // C
    used = (entries < E) & (entries - n * C < tl.load(counts + n, mask=entries < E, other=0))
    j = tl.load(indices + entries, mask=used, other=0)
    z = tl.load(pre + (n // T) * pre_b + (n % T) * pre_t + j.to(tl.int64) * pre_k, mask=used, other=0.0).to(COMPUTE)
    if bias is not None:
        z += tl.load(bias + j, mask=used, other=0.0).to(COMPUTE)
    tl.store(values + entries, narrow(z, values.dtype.element_ty, ROUNDING), mask=entries < E)
    tl.store(indices + entries, j * 0 + k, mask=(entries < E) & (used == 0))


@triton.jit(do_not_specialize=["T", "W"])
def window_kernel(
    active,
    pre,
    bias,
    threshold,
    release,
    segments,
    listed,
    T,
    W,
    k,
    half_width,
    pre_b,
    pre_t,
    pre_k,
    threshold_k,
    release_k,
    ids_b,
    ids_t,
    BLOCK: tl.constexpr,
):
    """`active` with the features in the window around a level set too, of 32 positions and a block of columns."""
    blocks = tl.cdiv(k, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # of words
    b, first = row // W, (row % W).to(tl.int32) * 32
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < k
    words = tl.load(active + row * k + columns, mask=inside, other=0)
    last = tl.load(active + (row - 1) * k + columns, mask=inside & (columns * 0 + first > 0), other=0)
    before = (words << 1) | ((last >> 31) & 1)  # bit i: on at the position before
    lanes = tl.arange(0, 32)
    t = first + lanes
    keeps = t < T
    if segments is not None:
        at = segments + b * ids_b + t.to(tl.int64) * ids_t
        ids = tl.load(at, mask=keeps, other=0)
        joined = keeps & (t > 0) & (tl.load(at - ids_t, mask=keeps & (t > 0), other=0) == ids)
        before = before & tl.sum(joined.to(tl.int32) << lanes, 0)
        keeps = keeps & (ids >= 0)
    kept = tl.sum(keeps.to(tl.int32) << lanes, 0)  # bit i: the position counts
    from_off = tl.load(threshold + columns * threshold_k, mask=inside, other=0.0).to(tl.float32)
    from_on = tl.load(release + columns * release_k, mask=inside, other=0.0).to(tl.float32)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    row_of_pre = pre + b * pre_b + columns.to(tl.int64) * pre_k
    near = tl.zeros([BLOCK], tl.int32)
    for i in range(tl.minimum(T - first, 32)):
        z = tl.load(row_of_pre + (first + i).to(tl.int64) * pre_t, mask=inside, other=0.0).to(tl.float32) + shift
        level = tl.where(((before >> i) & 1) != 0, from_on, from_off)
        near |= (tl.abs(z - level) < half_width * level).to(tl.int32) << i
    tl.store(listed + row * k + columns, words | (near & kept), mask=inside)


@triton.jit(do_not_specialize=["T", "W", "k", "C", "E"])
def gated_values_kernel(
    active,
    pre,
    bias,
    threshold,
    release,
    segments,
    counts,
    indices,
    values,
    levels,
    T,
    W,
    k,
    C,
    E,
    half_width,
    pre_b,
    pre_t,
    pre_k,
    threshold_k,
    release_k,
    ids_b,
    ids_t,
    COMPUTE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `values_kernel`, but 0 for features that are off, and the levels [E] whose window the entries are in."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = entries // C
    used = (entries < E) & (entries - n * C < tl.load(counts + n, mask=entries < E, other=0))
    j = tl.load(indices + entries, mask=used, other=0).to(tl.int64)
    b = (n.to(tl.int32) // T).to(tl.int64)  # tokens are fewer than 2^31, and a 64-bit division takes many registers
    t = n.to(tl.int32) % T
    stored = tl.load(pre + b * pre_b + t.to(tl.int64) * pre_t + j * pre_k, mask=used, other=0.0)
    z, rounded = stored.to(COMPUTE), stored.to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + j, mask=used, other=0.0)
        z += shift.to(COMPUTE)
        rounded += shift.to(tl.float32)
    on = (tl.load(active + (b * W + t // 32) * k + j, mask=used, other=0) >> (t % 32)) & 1
    earlier = used & (t > 0)
    s = tl.maximum(t - 1, 0)
    before = (tl.load(active + (b * W + s // 32) * k + j, mask=earlier, other=0) >> (s % 32)) & 1
    kept = used
    if segments is not None:
        ids = tl.load(segments + b * ids_b + t.to(tl.int64) * ids_t, mask=used, other=0)
        same = tl.load(segments + b * ids_b + s.to(tl.int64) * ids_t, mask=used, other=0) == ids
        before = tl.where(same, before, 0)
        kept = kept & (ids >= 0)
    from_on = tl.load(release + j * release_k, mask=used, other=0.0).to(tl.float32)
    level = tl.where(before != 0, from_on, tl.load(threshold + j * threshold_k, mask=used, other=0.0).to(tl.float32))
    near = kept & (tl.abs(rounded - level) < half_width * level)
    value = narrow(tl.where(on != 0, z, 0.0), values.dtype.element_ty, ROUNDING)
    tl.store(values + entries, value, mask=entries < E)
    tl.store(levels + entries, tl.where(near, level, 0.0), mask=entries < E)
    tl.store(indices + entries, (j * 0 + k).to(tl.int32), mask=(entries < E) & (used == 0))


@triton.jit(do_not_specialize=["E", "C"])
def entries_kernel(order, values, tokens, sorted_values, E, C, BLOCK: tl.constexpr):
    """Token and value [E] of every entry in the order by feature."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    entries = tl.load(order + places, mask=places < E, other=0)
    tl.store(tokens + places, (entries // C).to(tl.int32), mask=places < E)
    tl.store(sorted_values + places, tl.load(values + entries), mask=places < E)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit(do_not_specialize=["T", "ids_b", "ids_t"])
def segment_bounds_kernel(segments, starts, ends, T, ids_b, ids_t, BLOCK: tl.constexpr):
    """[N] each: the first token of every token's segment and one past its last, the same where excluded.

    One program a sequence: forwards for the starts, backwards for the ends.
    """
    b = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(T, BLOCK)
    lanes = tl.arange(0, BLOCK)
    start = 0
    for block in range(blocks):
        t = block * BLOCK + lanes
        at = segments + b * ids_b + t * ids_t
        ids = tl.load(at, mask=t < T, other=0)
        before = tl.load(at - ids_t, mask=(t < T) & (t > 0), other=0)
        firsts = tl.where((t == 0) | (ids != before), t, 0)
        start_here = tl.maximum(tl.associative_scan(firsts, 0, _larger), start)
        tl.store(starts + b * T + t, (b * T + start_here).to(tl.int32), mask=t < T)
        start = tl.max(start_here, 0)
    end = T
    for reverse in range(blocks):
        t = (blocks - 1 - reverse) * BLOCK + lanes
        at = segments + b * ids_b + t * ids_t
        ids = tl.load(at, mask=t < T, other=0)
        after = tl.load(at + ids_t, mask=t + 1 < T, other=0)
        lasts = tl.where((t + 1 >= T) | (ids != after), tl.minimum(t + 1, T), T)
        end_here = tl.minimum(tl.associative_scan(lasts, 0, _smaller, reverse=True), end)
        start_here = tl.load(starts + b * T + t, mask=t < T, other=0)
        tl.store(ends + b * T + t, tl.where(ids < 0, start_here, (b * T + end_here).to(tl.int32)), mask=t < T)
        end = tl.min(end_here, 0)
