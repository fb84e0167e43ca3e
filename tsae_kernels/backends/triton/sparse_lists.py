"""Triton kernels that make lists of active features: by token from the active mask, and by feature from those by token.

`sparse_launch.py` launches them and says what they read and write. All indices into [B, T, k] tensors are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsae_kernels.backends.triton.forward import narrow


@triton.jit(do_not_specialize=["T", "W", "k", "C"])
def compress_kernel(
    active,
    pre,
    bias,
    chunk_counts,
    values,
    indices,
    counts,
    T,
    W,
    k,
    C,
    pre_b,
    pre_t,
    pre_k,
    CHUNKS: tl.constexpr,
    WRITES: tl.constexpr,
    TRUNCATES: tl.constexpr,
    BLOCK: tl.constexpr,
    FILL: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One of CHUNKS ranges of the columns in one row of the active mask [B, W, k], for the row's 32 tokens.

    Without WRITES: chunk_counts [B W, CHUNKS, 32], the active features of each token in the range. With WRITES: their
    entries in the lists, from the place that the counts of the ranges before give. The last range also writes `counts`
    and what is past them. Lanes are tokens: a token's features pass through one lane in order.
    """
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    width = tl.cdiv(tl.cdiv(k, CHUNKS), BLOCK) * BLOCK
    first = chunk * width
    last = tl.minimum(first + width, k)
    lanes = tl.arange(0, 32)
    at_counts = chunk_counts + (row * CHUNKS) * 32 + lanes
    number = tl.zeros([32], tl.int32)  # of each token's active features in the columns before
    if WRITES:
        before = tl.arange(0, CHUNKS)
        of_chunks = tl.load(
            chunk_counts + (row * CHUNKS + before[:, None]) * 32 + lanes[None, :], mask=before[:, None] < chunk, other=0
        )
        number = tl.sum(of_chunks, 0).to(tl.int32)
    t = (row % W) * 32 + lanes
    n = (row // W) * T + t
    words_in = active + row * k
    columns = first + tl.arange(0, BLOCK)
    upcoming = tl.load(words_in + columns, mask=columns < last, other=0)
    for begin in range(first, last, BLOCK):
        words = upcoming
        columns = begin + tl.arange(0, BLOCK)
        upcoming = tl.load(words_in + columns + BLOCK, mask=columns + BLOCK < last, other=0)
        if tl.max((words != 0).to(tl.int32), 0) > 0:
            bits = (words[:, None] >> lanes[None, :]) & 1  # [BLOCK, 32]
            if WRITES:
                place = number[None, :] + tl.cumsum(bits, 0) - bits
                kept = (bits != 0) & (place < C)
                at = pre + (row // W) * pre_b + t[None, :] * pre_t + columns[:, None].to(tl.int64) * pre_k
                z = tl.load(at, mask=kept, other=0.0).to(COMPUTE)
                if bias is not None:
                    z = z + tl.load(bias + columns, mask=columns < last, other=0.0).to(COMPUTE)[:, None]
                to = n[None, :] * C + place
                tl.store(values + to, narrow(z, values.dtype.element_ty, TRUNCATES), mask=kept)
                tl.store(indices + to, columns[:, None] + tl.zeros([1, 32], tl.int32), mask=kept)
            number += tl.sum(bits, 0).to(tl.int32)
    if not WRITES:
        tl.store(at_counts + chunk * 32, number)
    elif chunk == CHUNKS - 1:
        tl.store(counts + n, number, mask=t < T)
        for place in range(0, C, FILL):
            places = place + tl.arange(0, FILL)
            unused = (t < T)[:, None] & (places[None, :] >= number[:, None]) & (places[None, :] < C)
            to = n[:, None] * C + places[None, :]
            tl.store(values + to, tl.zeros([32, FILL], values.dtype.element_ty), mask=unused)
            tl.store(indices + to, tl.zeros([32, FILL], tl.int32) + k, mask=unused)


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
