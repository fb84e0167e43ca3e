"""The operators of `sparse_ops.py` in PyTorch, for any device. Shapes do not depend on values, so nothing waits for it.

Sums over the entries of a token and of a feature run in the order of the list, as in the Triton kernels. On a GPU
`weight_gradients` uses `index_add_`, whose order is not fixed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    mask = unpack_active(active, pre.shape[1]).flatten(0, 1)
    indices = _first_places(mask, capacity)
    values = torch.where(indices < pre.shape[2], _pre_at(indices, pre, bias), 0).to(pre.dtype)
    return values, indices, mask.sum(1, dtype=torch.int32)


def _first_places(mask: Tensor, capacity: int) -> Tensor:
    """[N, C] int32: the columns of the first C set entries of each row of mask [N, k], k past the last of them."""
    reached = mask.cumsum(1, dtype=torch.int32)
    ranks = torch.arange(1, capacity + 1, dtype=torch.int32, device=mask.device).expand(len(mask), capacity)
    return torch.searchsorted(reached, ranks.contiguous(), out_int32=True)


def _at(indices: Tensor, x: Tensor) -> Tensor:
    """[N, C]: the entries of x [N, k] at the indices, any past the count."""
    return x.gather(1, indices.clamp_max(x.shape[1] - 1).long())


def _pre_at(indices: Tensor, pre: Tensor, bias: Tensor | None) -> Tensor:
    """[N, C]: pre + bias at the indices, not rounded."""
    z = _at(indices, pre.flatten(0, 1)).to(dtype_of_stats(pre.dtype))
    return z if bias is None else z + bias.to(z.dtype)[indices.clamp_max(len(bias) - 1).long()]


def compress_gated(
    active: Tensor,
    pre: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    release: Tensor,
    segments: Tensor | None,
    width: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`compress` of the active features and of those in the window around a level, which `sparse_ops.py` defines.

    values, indices, counts: of these; values are 0 where a feature is off
    levels: [N, C] float32, the level in whose window the entry is, 0 if in none
    active: [N] int32, the number of active features
    """
    T, k = pre.shape[1:]
    on = unpack_active(active, T)
    before = torch.zeros_like(on)
    before[:, 1:] = on[:, :-1]
    if segments is not None:
        before[:, 1:] &= (segments[:, 1:] == segments[:, :-1])[..., None]
    level = torch.where(before, release, threshold).float()  # [B, T, k]
    z = pre.float() if bias is None else pre.float() + bias.float()
    near = (z - level).abs() < width / 2 * level
    if segments is not None:
        near &= (segments >= 0)[..., None]
    on, near, level = (each.flatten(0, 1) for each in (on, near, level))
    listed = on | near
    indices = _first_places(listed, capacity)
    used = indices < k
    values = torch.where(used & _at(indices, on), _pre_at(indices, pre, bias), 0).to(pre.dtype)
    levels = torch.where(used & _at(indices, near), _at(indices, level), 0)
    return values, indices, listed.sum(1, dtype=torch.int32), levels, on.sum(1, dtype=torch.int32)


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


def group_of(features: Tensor, ends: Sequence[int]) -> Tensor:
    """The group of each feature: the index of the first of the prefixes `ends` that contains it, like `features`."""
    groups = torch.zeros_like(features)
    for end in ends[:-1]:
        groups += features >= end
    return groups


def decode_backward(
    grad: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, ends: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """[N, C]: the gradient of every value, 0 past the count. grad: [G, N, d], for the features of each group."""
    N, C = indices.shape
    compute = compute_dtype(grad, weight)
    tokens = torch.arange(N, device=grad.device)
    columns = []
    for i in range(C):
        j, used = _used(indices, len(weight), i)
        product = grad[group_of(j, ends), tokens].to(compute) * weight[j].to(compute)
        columns.append(torch.where(used[:, 0], product.sum(1), 0))
    return torch.stack(columns, 1).to(dtype)


def sort_entries(indices: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """order, features, tokens, values [E] and offsets [k + 1] of `sparse_ops.Entries`."""
    features, order = torch.sort(indices.flatten(), stable=True)
    tokens = (order // indices.shape[1]).int()
    offsets = torch.searchsorted(features, torch.arange(k + 1, device=features.device), out_int32=True)
    return order, features, tokens, values.flatten().index_select(0, order), offsets


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
    features: Tensor,
    tokens: Tensor,
    k: int,
    grad_values: Tensor | None,
    grad_differences: Tensor | None,
    grad_total: Tensor | None,
    grad_square: Tensor | None,
    bands: Bands,
    segments: Tensor | None,
    T: int,
) -> Tensor:
    """[E]: the gradient of every entry through itself and the statistics, in the order by feature.

    grad_values: [N, C]. Entries of value 0 are off and get that of the statistics no more than features without an
    entry. In the order by feature the entries of a feature within a distance are at most as many places apart.
    """
    E = values.numel()
    dtype = dtype_of_stats(values.dtype)
    out = torch.zeros(E, dtype=dtype, device=values.device)
    if E == 0:
        return out
    used = features < k
    feature, token, h = features.clamp_max(k - 1).long(), tokens.long(), values.to(dtype)
    N = T * (segments.shape[0] if segments is not None else -(-E // T))
    start, end = (bound[token] for bound in _segment_bounds(segments, N, T, values.device))
    if grad_differences is not None and bands:
        of_entry = 2 * grad_differences[token // T, :, feature].to(dtype)  # [E, S]
        neighbours = _Neighbours(feature, token, h, used, start, end)
        for s, (first, last) in enumerate(bands):
            term = neighbours.window_term(first, min(last, T - 1))
            out += torch.where(of_entry[:, s] == 0, 0, of_entry[:, s] * term)
    if grad_total is not None:
        out += grad_total[token // T, feature]
    if grad_square is not None:
        out += 2 * grad_square[token // T, feature] * h
    out = torch.where((end > start) & (h != 0), out, 0)  # excluded positions do not enter the statistics
    if grad_values is not None:
        out += grad_values.flatten()[order]
    return torch.where(used, out, 0)


class _Neighbours(NamedTuple):
    """Entries in the order by feature: all [E]."""

    feature: Tensor
    token: Tensor
    h: Tensor
    used: Tensor
    start: Tensor  # of the token's segment
    end: Tensor

    def window_term(self, first: int, last: int) -> Tensor:
        """[E]: the sum of h_t - h_u over the positions u of the segment with first <= |u - t| <= last."""
        feature, token, h, used, start, end = self
        place = torch.arange(len(h), device=h.device)
        partners, found = torch.zeros_like(h), torch.zeros_like(token)
        for step in (*range(-last, 0), *range(1, last + 1)):
            other = (place + step).clamp(0, len(h) - 1)
            distance = (token[other] - token).abs()
            near = (place + step == other) & used[other] & (feature[other] == feature)
            near &= (token[other] >= start) & (token[other] < end) & (distance >= first) & (distance <= last)
            partners += torch.where(near, h - h[other], 0)
            found += near
        degree = torch.minimum(token + last + 1, end) - torch.minimum(token + first, end)
        degree += torch.maximum(token - first + 1, start) - torch.maximum(token - last, start)
        return partners + (degree.clamp_min(0) - found) * h  # h_u = 0 where u is off


def weight_gradients(
    features: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    grad_pre: Tensor | None,
    x: Tensor | None,
    values: Tensor | None,
    grad_xhat: Tensor | None,
    W_dec: Tensor | None,
    ends: Sequence[int],
    fill: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of W_enc.T [k, d], W_dec [k, d] and b_enc [k]; empty tensors for what is not asked for.

    grad_pre: [E] and x [N, d], or None; values: [E] and grad_xhat [G, N, d], or None
    W_dec: [k, d] or None
    fill: rows of features without an entry must be 0 (else they may hold anything; here they are 0 too)
    out: also measures [4, k]: of each feature |row|^2 of the encoder's and of the decoder's gradient, the product of
        the latter with W_dec's row, and |W_dec's row|^2; 0 for features without an entry and what is not asked for
    """
    k = len(offsets) - 1
    encoder, decoder, bias = (torch.empty(0, dtype=torch.float32, device=tokens.device) for _ in range(3))
    sources = [each for each in (grad_pre, x, values, grad_xhat) if each is not None]
    measures = torch.zeros(4, k, dtype=compute_dtype(*sources), device=tokens.device)
    if grad_pre is not None and x is not None:
        encoder, bias = _sums_by_feature(features, tokens, k, grad_pre, x[None], [k])
        measures[0] = encoder.square().sum(1)
    if values is not None and grad_xhat is not None:
        decoder, _ = _sums_by_feature(features, tokens, k, values, grad_xhat, ends)
        measures[1] = decoder.square().sum(1)
        if W_dec is not None:
            W_dec = W_dec.to(decoder.dtype)
            fired = offsets[1:] > offsets[:-1]
            measures[2] = (decoder * W_dec).sum(1)
            measures[3] = torch.where(fired, W_dec.square().sum(1), 0)
    return encoder, decoder, bias, measures


def _sums_by_feature(
    features: Tensor, tokens: Tensor, k: int, coefficients: Tensor, rows: Tensor, ends: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """[k, d] and [k]: for each feature, the sum over its entries of coefficient * row of the token, and of coefficient.

    features, tokens, coefficients: [E]; rows: [G, N, d], for the features of each group
    """
    d, compute = rows.shape[2], compute_dtype(coefficients, rows)
    out = torch.zeros(k + 1, d, dtype=compute, device=rows.device)  # the last row takes what is past the counts
    sums = torch.zeros(k + 1, dtype=compute, device=rows.device)
    step = max(2**22 // max(d, 1), 1)  # entries at a time, to bound the memory
    for j, n, share in zip(features.split(step), tokens.split(step), coefficients.split(step), strict=True):
        share = share.to(compute)
        out.index_add_(0, j, share[:, None] * rows[group_of(j, ends), n].to(compute))
        sums.index_add_(0, j, share)
    return out[:k], sums[:k]


def squared_errors(x: Tensor, xhat: Tensor) -> Tensor:
    """[N]: the sum over d of (x - xhat)^2; x, xhat: [N, d]."""
    compute = compute_dtype(x, xhat)
    return (x.to(compute) - xhat.to(compute)).square().sum(1)


def squared_errors_backward(x: Tensor, xhat: Tensor, grad: Tensor) -> Tensor:
    """[N, d]: the gradient of xhat; 0 where grad [N] is 0, whatever the error."""
    compute = compute_dtype(x, xhat)
    scale = 2 * grad.to(compute)[:, None]
    return torch.where(scale == 0, 0, scale * (xhat.to(compute) - x.to(compute))).to(xhat.dtype)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
