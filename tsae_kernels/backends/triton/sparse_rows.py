"""Triton kernels that gather rows: of W_dec for each token, of tokens for each feature. Both sums have a fixed order.

A program is one warp with a block of columns. The column block is the slow index of the grid, so that the rows that all
running programs gather from, cut to one block, stay in the L2 cache: at 16,384 tokens and 256 columns of bfloat16 8 MB,
where whole rows are 75 MB. `UNROLL` rows are requested before the first is used.
"""

# ruff: noqa: RUF005 - Triton has no starred expressions
from __future__ import annotations

import triton
import triton.language as tl

from tsae_kernels.backends.triton.forward import narrow


@triton.jit
def columns_of(block, d, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """The indices of a block of columns, and which of them exist. EVEN_D: all do."""
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = tl.full([BLOCK_D], True, tl.int1)
    if not EVEN_D:
        inside = columns < d
    return columns, inside


@triton.jit
def load_row(x, row, d, columns, inside, exists, EVEN_D: tl.constexpr):
    """Columns of a row of x [rows, d], 0 unless it exists."""
    at = x + tl.cast(row, tl.int64) * d + columns
    return tl.load(at, mask=inside & (inside.to(tl.int32) * 0 + exists > 0), other=0.0)


@triton.jit
def end_of_group(indices, counts, n, C, g: tl.constexpr, ENDS: tl.constexpr, PLACES: tl.constexpr):
    """Where the features of group g end in a token's list: at ENDS[g], or with the list."""
    if g == len(ENDS):
        end = tl.minimum(tl.load(counts + n), C)
    else:
        places = tl.arange(0, PLACES)
        listed = tl.load(indices + n * C + places, mask=places < C, other=2147483647)
        end = tl.sum((listed < ENDS[g]).to(tl.int32), 0)
    return end


@triton.jit(do_not_specialize=["N", "C"])
def decode_kernel(
    values,
    indices,
    counts,
    weight,
    out,
    N,
    C,
    d,
    ENDS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    UNROLL: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """out [G, N, d]: for each prefix of the dictionary, the sum of value * weight row over a token's features in it.

    ENDS: of all prefixes but the last, ascending. PLACES: a power of two of at least C
    """
    n = tl.program_id(0).to(tl.int64)
    columns, inside = columns_of(tl.program_id(1), d, BLOCK_D, EVEN_D)
    total = tl.zeros([BLOCK_D], COMPUTE)
    begin = 0
    for g in tl.static_range(len(ENDS) + 1):
        end = end_of_group(indices, counts, n, C, g, ENDS, PLACES)
        for i in range(begin, end, UNROLL):
            rows = ()
            shares = ()
            for u in tl.static_range(UNROLL):
                j = tl.load(indices + n * C + i + u, mask=i + u < end, other=0)
                shares = shares + (tl.load(values + n * C + i + u, mask=i + u < end, other=0.0).to(COMPUTE),)
                rows = rows + (load_row(weight, j, d, columns, inside, end - i - u, EVEN_D),)
            for u in tl.static_range(UNROLL):
                total += shares[u] * rows[u].to(COMPUTE)
        begin = end
        at = out + (g * N + n) * d + columns
        tl.store(at, narrow(total, out.dtype.element_ty, ROUNDING), mask=inside)


@triton.jit(do_not_specialize=["N", "C", "blocks"])
def decode_backward_kernel(
    grad,
    indices,
    counts,
    weight,
    out,
    N,
    C,
    d,
    blocks,
    ENDS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    UNROLL: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """out [splits, N, C]: the products of each entry's weight row and the token's gradient, over `blocks` of columns.

    grad: [G, N, d], of the features before ENDS[0], those up to ENDS[1] and so on. Past the count out is 0.
    """
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    results = out + (split * N + n) * C
    begin = 0
    for g in tl.static_range(len(ENDS) + 1):
        end = end_of_group(indices, counts, n, C, g, ENDS, PLACES)
        for i in range(begin, end, UNROLL):
            features = ()
            sums = ()
            for u in tl.static_range(UNROLL):
                features = features + (tl.load(indices + n * C + i + u, mask=i + u < end, other=0),)
                sums = sums + (tl.zeros([BLOCK_D], COMPUTE),)
            for block in range(split * blocks, (split + 1) * blocks):
                columns, inside = columns_of(block, d, BLOCK_D, False)
                incoming = load_row(grad, g * N + n, d, columns, inside, 1, EVEN_D).to(COMPUTE)
                rows = ()
                for u in tl.static_range(UNROLL):
                    rows = rows + (load_row(weight, features[u], d, columns, inside, end - i - u, EVEN_D),)
                new_sums = ()
                for u in tl.static_range(UNROLL):
                    new_sums = new_sums + (sums[u] + incoming * rows[u].to(COMPUTE),)
                sums = new_sums
            for u in tl.static_range(UNROLL):
                product = narrow(tl.sum(sums[u], 0), out.dtype.element_ty, ROUNDING)
                tl.store(results + i + u, product, mask=i + u < end)
        begin = end
    places = tl.arange(0, PLACES)
    tl.store(results + places, tl.zeros([PLACES], out.dtype.element_ty), mask=(places >= begin) & (places < C))


@triton.jit
def store_row(
    total, share, j, out, out_sum, squares, weight, products, k, d, columns, inside, block, complete,
):  # fmt: skip
    """Store a complete row of a gradient and, per block of columns, its square and its product with the weight's row.

    out: [k, d]; squares: [blocks, k]; products: [2, blocks, k], of the row and the weight's, and of the weight's with
    itself. Without `complete` nothing is stored.
    """
    mask = inside & (inside.to(tl.int32) * 0 + complete.to(tl.int32) > 0)
    row = tl.cast(j, tl.int64) * d + columns
    tl.store(out + row, total, mask=mask, cache_modifier=".cs")
    to = tl.cast(block, tl.int64) * k + j
    if squares is not None:
        tl.store(squares + to, tl.sum(total * total, 0), mask=complete)
    if weight is not None:
        of_weight = tl.load(weight + row, mask=mask, other=0.0).to(total.dtype)
        tl.store(products + to, tl.sum(total * of_weight, 0), mask=complete)
        tl.store(products + tl.num_programs(1).to(tl.int64) * k + to, tl.sum(of_weight * of_weight, 0), mask=complete)
    if out_sum is not None:
        tl.store(out_sum + j, share, mask=complete & (block == 0))


@triton.jit
def store_sum(
    total, share, j, chunk, out, partials, out_sum, partial_sums, squares, weight, products, offsets, k, d,
    columns, inside, block, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store a feature's sum over one chunk of entries: its row if the chunk has all of them, else a partial sum.

    partials: [chunks, 2, d], of the feature that comes from the chunk before and of the one that goes on in the next
    """
    begins = tl.load(offsets + j) // CHUNK
    ends = (tl.load(offsets + j + 1) - 1) // CHUNK
    store_row(
        total, share, j, out, out_sum, squares, weight, products, k, d, columns, inside, block, begins == ends
    )  # fmt: skip
    crossing = begins != ends
    slot = chunk.to(tl.int64) * 2 + (begins == chunk).to(tl.int64)
    mask = inside & (inside.to(tl.int32) * 0 + crossing.to(tl.int32) > 0)
    tl.store(partials + slot * d + columns, total, mask=mask)
    if out_sum is not None:
        tl.store(partial_sums + slot, share, mask=crossing & (block == 0))


@triton.jit
def feature_gradients(
    features, tokens, grad_pre, x, values, grad_xhat, i, end, N, d, columns, inside,
    ENDS: tl.constexpr, EVEN_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The next UNROLL entries: features, coefficients and rows of the encoder, then those of the decoder."""
    which = ()
    encoder_shares = ()
    encoder_rows = ()
    decoder_shares = ()
    decoder_rows = ()
    for u in tl.static_range(UNROLL):
        left = end - i - u
        feature = tl.load(features + i + u, mask=left > 0, other=-1)
        token = tl.load(tokens + i + u, mask=left > 0, other=0)
        which = which + (feature,)
        if grad_pre is not None:
            encoder_shares = encoder_shares + (tl.load(grad_pre + i + u, mask=left > 0, other=0.0),)
            encoder_rows = encoder_rows + (load_row(x, token, d, columns, inside, left, EVEN_D),)
        if values is not None:
            decoder_shares = decoder_shares + (tl.load(values + i + u, mask=left > 0, other=0.0),)
            group = tl.cast(0, tl.int64)
            for g in tl.static_range(len(ENDS)):
                group += (feature >= ENDS[g]).to(tl.int64)
            decoder_rows = decoder_rows + (load_row(grad_xhat, group * N + token, d, columns, inside, left, EVEN_D),)
    return which, encoder_shares, encoder_rows, decoder_shares, decoder_rows


@triton.jit(do_not_specialize=["N", "k"])
def weight_gradients_kernel(
    features,
    tokens,
    offsets,
    grad_pre,
    x,
    values,
    grad_xhat,
    W_dec,
    encoder,
    decoder,
    bias,
    encoder_squares,
    decoder_squares,
    products,
    encoder_partials,
    decoder_partials,
    bias_partials,
    N,
    k,
    d,
    ENDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Rows of the weights' gradients, from one chunk of the entries by feature.

    encoder [k, d]: the sum of grad_pre * row of x over a feature's entries; decoder [k, d]: of values * row of
    grad_xhat [G, N, d], of the feature's group; bias [k]: of grad_pre. Rows of features without entries are not
    written. Features whose entries lie in several chunks have partial sums, which `finish_weight_gradients_kernel` adds
    in order. `store_row` explains squares and products.
    """
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    columns, inside = columns_of(block, d, BLOCK_D, EVEN_D)
    total = tl.load(offsets + k)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, total)
    COMPUTE: tl.constexpr = encoder.dtype.element_ty if grad_pre is not None else decoder.dtype.element_ty
    if begin < end:
        zero = tl.zeros([BLOCK_D], COMPUTE)
        of_encoder = zero
        of_decoder = zero
        of_bias = tl.cast(0.0, COMPUTE)
        j = tl.load(features + begin)
        for i in range(begin, end, UNROLL):
            which, encoder_shares, encoder_rows, decoder_shares, decoder_rows = feature_gradients(
                features, tokens, grad_pre, x, values, grad_xhat, i, end, N, d, columns, inside, ENDS, EVEN_D, UNROLL
            )
            for u in tl.static_range(UNROLL):
                if (which[u] != j) & (which[u] >= 0):  # -1: past the end
                    if grad_pre is not None:
                        store_sum(
                            of_encoder, of_bias, j, chunk, encoder, encoder_partials, bias, bias_partials,
                            encoder_squares, None, None, offsets, k, d, columns, inside, block, CHUNK,
                        )  # fmt: skip
                    if values is not None:
                        store_sum(
                            of_decoder, of_bias, j, chunk, decoder, decoder_partials, None, None,
                            decoder_squares, W_dec, products, offsets, k, d, columns, inside, block, CHUNK,
                        )  # fmt: skip
                    of_encoder = zero
                    of_decoder = zero
                    of_bias = tl.cast(0.0, COMPUTE)
                    j = which[u]
                if grad_pre is not None:
                    share = encoder_shares[u].to(COMPUTE)
                    of_encoder += share * encoder_rows[u].to(COMPUTE)
                    of_bias += share
                if values is not None:
                    of_decoder += decoder_shares[u].to(COMPUTE) * decoder_rows[u].to(COMPUTE)
        if grad_pre is not None:
            store_sum(
                of_encoder, of_bias, j, chunk, encoder, encoder_partials, bias, bias_partials,
                encoder_squares, None, None, offsets, k, d, columns, inside, block, CHUNK,
            )  # fmt: skip
        if values is not None:
            store_sum(
                of_decoder, of_bias, j, chunk, decoder, decoder_partials, None, None,
                decoder_squares, W_dec, products, offsets, k, d, columns, inside, block, CHUNK,
            )  # fmt: skip


@triton.jit
def add_partials(partials, chunk, last, d, columns, inside, COMPUTE: tl.constexpr):
    """The sum of a feature's partial rows: the one that begins in `chunk`, then those of the chunks up to `last`."""
    at = partials + columns
    total = tl.load(at + (chunk.to(tl.int64) * 2 + 1) * d, mask=inside, other=0.0).to(COMPUTE)
    for c in range(chunk + 1, last + 1):
        total += tl.load(at + (tl.cast(c, tl.int64) * 2) * d, mask=inside, other=0.0).to(COMPUTE)
    return total


@triton.jit(do_not_specialize=["k"])
def finish_weight_gradients_kernel(
    features,
    offsets,
    W_dec,
    encoder,
    decoder,
    bias,
    encoder_squares,
    decoder_squares,
    products,
    encoder_partials,
    decoder_partials,
    bias_partials,
    k,
    d,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """The row of the feature that begins in a chunk and goes on in the next, if there is one."""
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    past = (chunk + 1) * CHUNK
    if past < tl.load(offsets + k):
        j = tl.load(features + past)
        begins = tl.load(offsets + j)
        if (begins < past) & (begins >= past - CHUNK):
            last = (tl.load(offsets + j + 1) - 1) // CHUNK
            columns, inside = columns_of(block, d, BLOCK_D, EVEN_D)
            complete = last > chunk  # always
            if encoder is not None:
                total = add_partials(encoder_partials, chunk, last, d, columns, inside, encoder.dtype.element_ty)
                share = tl.load(bias_partials + chunk * 2 + 1)
                for c in range(chunk + 1, last + 1):
                    share += tl.load(bias_partials + c * 2)
                store_row(
                    total, share, j, encoder, bias, encoder_squares, None, None, k, d, columns, inside, block, complete
                )
            if decoder is not None:
                total = add_partials(decoder_partials, chunk, last, d, columns, inside, decoder.dtype.element_ty)
                store_row(
                    total, 0.0, j, decoder, None, decoder_squares, W_dec, products, k, d, columns, inside, block,
                    complete,
                )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def squared_errors_kernel(x, xhat, out, N, d, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):
    """out [N]: the sum over a token's columns of (x - xhat)^2."""
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_D], COMPUTE)
    for begin in range(0, d, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        error = tl.load(x + n * d + columns, mask=columns < d, other=0.0).to(COMPUTE)
        error -= tl.load(xhat + n * d + columns, mask=columns < d, other=0.0).to(COMPUTE)
        total += error * error
    tl.store(out + n, tl.sum(total, 0))


@triton.jit(do_not_specialize=["N"])
def squared_errors_backward_kernel(
    x, xhat, grad, out, N, d, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, ROUNDING: tl.constexpr
):
    """out [N, d]: the gradient of xhat, 2 grad (xhat - x) for grad [N]; 0 where grad is 0, whatever the error."""
    n = tl.program_id(0).to(tl.int64)
    scale = tl.load(grad + n).to(COMPUTE) * 2
    for begin in range(0, d, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        error = tl.load(xhat + n * d + columns, mask=columns < d, other=0.0).to(COMPUTE)
        error -= tl.load(x + n * d + columns, mask=columns < d, other=0.0).to(COMPUTE)
        result = tl.where(tl.zeros([BLOCK_D], COMPUTE) + scale == 0, 0.0, error * scale)
        tl.store(out + n * d + columns, narrow(result, out.dtype.element_ty, ROUNDING), mask=columns < d)
