"""The Triton kernel of the statistics' gradient at active features (docs/kernels.md, "Sparse training step").

With c_s twice the gradient of band s, the gradient of an entry h_t through the differences is the sum over bands of

    c_s ((sum over active u in the band of h_t - h_u) + (degree_t - number of active u) h_t)

since h_u = 0 where u is off. In the order by feature the active u of an entry are next to it, at most as many places
away as positions.
"""

# ruff: noqa: RUF005 - Triton has no starred expressions
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def band_sums(
    features, tokens, values, sums, numbers, places, feature, token, h, low, high, alive, E,
    STEP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """`sums` of h_t - h_u and `numbers` of u in each band, over the active u on one side of each entry."""
    REACH: tl.constexpr = LAST[len(LAST) - 1]
    at = places + STEP
    while tl.max(alive.to(tl.int32), 0) > 0:
        alive = alive & (at >= 0) & (at < E)
        alive = alive & (tl.load(features + at, mask=alive, other=-1) == feature)
        other = tl.load(tokens + at, mask=alive, other=0)
        distance = tl.abs(other - token)
        alive = alive & (other >= low) & (other < high) & (distance <= REACH)
        step = h - tl.load(values + at, mask=alive, other=0.0).to(h.dtype)
        new_sums = ()
        new_numbers = ()
        for s in tl.static_range(len(FIRST)):
            within = alive & (distance >= FIRST[s]) & (distance <= LAST[s])
            new_sums = new_sums + (sums[s] + tl.where(within, step, 0.0),)
            new_numbers = new_numbers + (numbers[s] + within.to(tl.int32),)
        sums = new_sums
        numbers = new_numbers
        at += STEP
    return sums, numbers


@triton.jit(do_not_specialize=["E", "C", "T", "k"])
def stats_backward_kernel(
    values,
    order,
    features,
    tokens,
    grad_values,
    grad_differences,
    grad_total,
    grad_square,
    starts,
    ends,
    grad_pre,
    E,
    C,
    T,
    k,
    differences_b,
    differences_s,
    differences_k,
    total_b,
    total_k,
    square_b,
    square_k,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_pre [E] of a block of entries in the order by feature; 0 past the last entry.

    FIRST, LAST: the bands' offsets. starts, ends: [N], of every token's segment; None if each sequence is one
    """
    COMPUTE: tl.constexpr = grad_pre.dtype.element_ty
    S: tl.constexpr = len(FIRST)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    listed = places < E
    feature = tl.load(features + places, mask=listed, other=2147483647)
    used = feature < k
    token = tl.load(tokens + places, mask=used, other=0)
    h = tl.load(values + places, mask=used, other=0.0).to(COMPUTE)
    b = (token // T).to(tl.int64)
    low = token - token % T
    high = low + T
    if starts is not None:
        low = tl.load(starts + token, mask=used, other=0)
        high = tl.load(ends + token, mask=used, other=0)
    counted = used & (low < high) & (h != 0)  # not excluded, and active: relu passes no other gradient
    column = feature.to(tl.int64)

    grad = tl.zeros([BLOCK], COMPUTE)
    if grad_differences is not None and S > 0:
        coefficients = ()
        wanted = counted & False
        for s in tl.static_range(S):
            at = grad_differences + b * differences_b + s * differences_s + column * differences_k
            coefficient = tl.load(at, mask=counted, other=0.0).to(COMPUTE) * 2
            wanted = wanted | (coefficient != 0)
            coefficients = coefficients + (coefficient,)
        # The entries of features whose coefficients are all 0 find no partners, and blocks of them skip the search.
        sums = (tl.zeros([BLOCK], COMPUTE),) * S
        numbers = (tl.zeros([BLOCK], tl.int32),) * S
        sums, numbers = band_sums(
            features, tokens, values, sums, numbers, places, feature, token, h, low, high, wanted, E, 1, FIRST, LAST
        )
        sums, numbers = band_sums(
            features, tokens, values, sums, numbers, places, feature, token, h, low, high, wanted, E, -1, FIRST, LAST
        )
        for s in tl.static_range(S):
            degree = tl.minimum(token + LAST[s] + 1, high) - tl.minimum(token + FIRST[s], high)
            degree += tl.maximum(token - FIRST[s] + 1, low) - tl.maximum(token - LAST[s], low)
            term = sums[s] + (degree - numbers[s]).to(COMPUTE) * h
            grad += tl.where(coefficients[s] == 0, 0.0, coefficients[s] * term)
    if grad_total is not None:
        grad += tl.load(grad_total + b * total_b + column * total_k, mask=counted, other=0.0).to(COMPUTE)
    if grad_square is not None:
        grad += tl.load(grad_square + b * square_b + column * square_k, mask=counted, other=0.0).to(COMPUTE) * 2 * h
    grad = tl.where(counted, grad, 0.0)
    if grad_values is not None:
        entry = tl.load(order + places, mask=used, other=0)
        grad += tl.load(grad_values + entry, mask=used, other=0.0).to(COMPUTE)
    tl.store(grad_pre + places, grad, mask=listed)
