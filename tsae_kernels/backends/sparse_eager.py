"""The operators of `sparse_ops.py` in PyTorch, for any device. Shapes do not depend on values, so nothing waits for it.

Sums over the entries of a token and of a feature run in the order of the list, as in the Triton kernels. On a GPU
`weight_gradients` uses `index_add_`, whose order is not fixed there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tsae_kernels.bands import Bands
from tsae_kernels.dtypes import dtype_of_stats
from tsae_kernels.segments import find_runs

WORD = 32  # positions in a word of the active mask


def pack_active(h: Tensor) -> Tensor:
    """The active mask of features h [B, T, k]: [B, W, k] int32, W = ceil(T / 32).

    Bit i (from the lowest) of word w is set where h[:, 32 w + i] is not 0, NaN included. Bits past T are 0.
    """
    B, T, k = h.shape
    W = -(-T // WORD)
    active = F.pad(h != 0, (0, 0, 0, W * WORD - T)).view(B, W, WORD, k)
    words = torch.zeros(B, W, k, dtype=torch.int32, device=h.device)
    for i in range(WORD):
        words |= active[:, :, i].int() << i
    return words


def unpack_active(active: Tensor, T: int) -> Tensor:
    """The inverse of `pack_active`: [B, T, k] bool."""
    B, W, k = active.shape
    shifts = torch.arange(WORD, dtype=torch.int32, device=active.device)[:, None]
    return ((active[:, :, None] >> shifts) & 1).bool().view(B, W * WORD, k)[:, :T]


def compress(active: Tensor, pre: Tensor, bias: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """values [N, C] in pre's dtype, indices [N, C] int32, counts [N] int32 of the features in an active mask."""
    B, T, k = pre.shape
    mask = unpack_active(active, T).reshape(B * T, k)
    reached = mask.cumsum(1, dtype=torch.int32)
    ranks = torch.arange(1, capacity + 1, dtype=torch.int32, device=pre.device).expand(B * T, capacity)
    indices = torch.searchsorted(reached, ranks.contiguous(), out_int32=True)  # k where there is no such feature
    columns = indices.clamp_max(k - 1).long()
    z = pre.reshape(B * T, k).gather(1, columns).to(dtype_of_stats(pre.dtype))
    if bias is not None:
        z = z + bias.to(z.dtype)[columns]
    values = torch.where(indices < k, z, 0).to(pre.dtype)
    return values, indices, mask.sum(1, dtype=torch.int32)


def _used(indices: Tensor, k: int, slot: int) -> tuple[Tensor, Tensor]:
    """The features [N] in one place of every token's list, 0 past the count, and which are not past it, [N, 1]."""
    j = indices[:, slot]
    return torch.where(j < k, j, 0), (j < k)[:, None]


def decode(
    values: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, ends: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """[G, N, d]: for each end in `ends`, the sum of values * weight rows over the features before it."""
    N, C = indices.shape
    k, d = weight.shape
    compute = compute_dtype(values, weight)
    out = torch.zeros(len(ends), N, d, dtype=compute, device=values.device)
    for i in range(C):
        j, used = _used(indices, k, i)
        row = torch.where(used, values[:, i, None].to(compute) * weight[j].to(compute), 0)
        for g, end in enumerate(ends):
            out[g] += torch.where((j < end)[:, None], row, 0)
    return out.to(dtype)


def decode_backward(
    grad: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, ends: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """[N, C]: the gradient of every value, the sum over the prefixes it is in; 0 past the count. grad: [G, N, d]."""
    N, C = indices.shape
    compute = compute_dtype(grad, weight)
    out = torch.zeros(N, C, dtype=compute, device=grad.device)
    for i in range(C):
        j, used = _used(indices, len(weight), i)
        row = weight[j].to(compute)
        for g, end in enumerate(ends):
            part = (grad[g].to(compute) * row).sum(1)
            out[:, i] += torch.where(used[:, 0] & (j < end), part, 0)
    return out.to(dtype)


def _segment_bounds(segments: Tensor | None, N: int, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[N] each: first token of every token's segment and one past its last, the same where excluded."""
    if segments is None:
        start = torch.arange(N, device=device) // T * T
        return start, start + T
    runs = find_runs(segments)
    rows = torch.arange(0, N, T, device=device)[:, None]
    return (runs.start + rows).flatten(), (runs.end + rows).flatten()


def stats_backward(
    values: Tensor,
    order: Tensor,
    offsets: Tensor,
    grad_values: Tensor | None,
    grad_differences: Tensor | None,
    grad_total: Tensor | None,
    grad_square: Tensor | None,
    bands: Bands,
    segments: Tensor | None,
    T: int,
) -> Tensor:
    """[N, C]: the gradient of every value, through itself and the statistics.

    In the order by feature, the entries of a feature within `reach` positions are at most `reach` places apart.
    """
    (N, C), k = values.shape, len(offsets) - 1
    dtype = dtype_of_stats(values.dtype)
    grad = torch.zeros(N * C, dtype=dtype, device=values.device)
    if N == 0:
        return grad.view(N, C)
    if grad_values is not None:
        grad += grad_values.flatten()
    place = torch.arange(N * C, device=values.device)
    feature = torch.searchsorted(offsets, place.int(), right=True) - 1  # k past the last entry
    used = feature < k
    feature = feature.clamp_max(k - 1)
    token = order // C
    h = values.flatten()[order].to(dtype)
    start, end = (bound[token] for bound in _segment_bounds(segments, N, T, values.device))
    counted = used & (end > start)  # excluded positions do not enter the statistics
    out = torch.zeros_like(h)
    if grad_differences is not None and bands:
        of_entry = 2 * grad_differences[token // T, :, feature].to(dtype)  # [N C, S]
        reach = min(max(last for _, last in bands), T - 1)
        for s, (first, last) in enumerate(bands):
            degree = (
                torch.minimum(token + last + 1, end)
                - torch.minimum(token + first, end)
                + torch.maximum(token - first + 1, start)
                - torch.maximum(token - last, start)
            )
            partners, found = torch.zeros_like(h), torch.zeros_like(token)
            for step in (*range(-reach, 0), *range(1, reach + 1)):
                other = (place + step).clamp(0, N * C - 1)
                distance = (token[other] - token).abs()
                near = (place + step == other) & used[other] & (feature[other] == feature)
                near &= (token[other] >= start) & (token[other] < end) & (distance >= first) & (distance <= last)
                partners += torch.where(near, h - h[other], 0)
                found += near
            term = partners + (degree - found) * h  # partners that are off have h = 0
            out += torch.where(of_entry[:, s] == 0, 0, of_entry[:, s] * term)
    if grad_total is not None:
        out += grad_total[token // T, feature]
    if grad_square is not None:
        out += 2 * grad_square[token // T, feature] * h
    out = torch.where(counted, out, 0)
    return (grad + torch.zeros_like(grad).index_copy_(0, order, out)).view(N, C)


def weight_gradients(
    order: Tensor,
    offsets: Tensor,
    grad_pre: Tensor | None,
    x: Tensor | None,
    values: Tensor | None,
    grad_xhat: Tensor | None,
    ends: Sequence[int],
    fill: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of W_enc.T [k, d], W_dec [k, d] and b_enc [k]; empty tensors for what is not asked for.

    grad_pre: [N, C] and x [N, d], or None; values: [N, C] and grad_xhat [G, N, d], or None
    fill: rows of features without an entry must be 0 (else they may hold anything; here they are 0 too)
    """
    nothing = torch.empty(0, dtype=torch.float32, device=order.device)
    encoder = bias = decoder = nothing
    if grad_pre is not None and x is not None:
        encoder, bias = _sums_by_feature(order, offsets, grad_pre, x[None], [len(offsets) - 1])
    if values is not None and grad_xhat is not None:
        decoder, _ = _sums_by_feature(order, offsets, values, grad_xhat, ends)
    return encoder, decoder, bias


def _sums_by_feature(
    order: Tensor, offsets: Tensor, coefficients: Tensor, rows: Tensor, ends: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """[k, d] and [k]: for each feature, the sum over its entries of coefficient * row of the token, and of coefficient.

    coefficients: [N, C]; rows: [G, N, d]; an entry takes the sum of the rows of the prefixes that contain its feature.
    """
    (_, C), (_, _, d), k = coefficients.shape, rows.shape, len(offsets) - 1
    compute = compute_dtype(coefficients, rows)
    out = torch.zeros(k + 1, d, dtype=compute, device=rows.device)  # the last row takes what is past the counts
    sums = torch.zeros(k + 1, dtype=compute, device=rows.device)
    place = torch.arange(order.numel(), dtype=torch.int32, device=rows.device)
    features = torch.searchsorted(offsets, place, right=True) - 1
    indices = torch.zeros_like(order).index_copy_(0, order, features).view(coefficients.shape)
    for i in range(C):
        j, coefficient = indices[:, i], coefficients[:, i].to(compute)
        for row, end in zip(rows, ends, strict=True):
            out.index_add_(0, j, torch.where((j < end)[:, None], coefficient[:, None] * row.to(compute), 0))
        sums.index_add_(0, j, coefficient)
    return out[:k], sums[:k]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
