"""Exact order statistics of sharded tensors: the thresholds of TopK, BatchTopK and exact steering."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tsae.parallel.axis import Axis

_BINS = 1 << 16
_SLICE = 1 << 24  # values whose 64-bit bins are held at a time


@torch.no_grad()
def kth_largest(values: Tensor, k: int, axis: Axis) -> Tensor:
    """The ``k``-th largest of the ``values`` of all processes, as if one tensor held them.

    values: any shape; with several processes compared as float32, and possibly empty on some
    k: from 1 to the number of values on all processes
    out: scalar in the dtype of ``values``
    """
    if axis.size == 1:
        return values.detach().flatten().kthvalue(values.numel() - k + 1).values
    return kth_largest_by_histogram(values, k, axis)


@torch.no_grad()
def kth_largest_by_histogram(values: Tensor, k: int, axis: Axis) -> Tensor:
    """`kth_largest` with two all-reduces of 65,536 counts, however many values there are.

    Read as integers, the bits of float32 numbers are in the order of the numbers (after a flip for negative ones). A
    histogram of their upper halves finds the bin of the result, a histogram of the lower halves in that bin the result.
    """
    bits = values.detach().float().contiguous().flatten().view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ascending, negative numbers too
    upper = (keys >> 16) + _BINS // 2
    high, left = _bin(upper, torch.tensor(k, device=keys.device), axis)
    low, _ = _bin((keys & (_BINS - 1))[upper == high], left, axis)
    key = (((high - _BINS // 2) << 16) | low).to(torch.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32).to(values.dtype)


def _bin(digits: Tensor, k: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """The bin of the k-th largest digit, and the rank of that digit within the bin, counted from 1."""
    return _place(axis.sum_no_grad(torch.bincount(digits, minlength=_BINS)), k)


def _place(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """As `_bin`, from the number of digits in each bin. Bin 0 if there are fewer than k."""
    counts = counts.flip(0)
    reached = counts.cumsum(0)
    place = (reached < k).sum().clamp(max=_BINS - 1)
    return _BINS - 1 - place, k - (reached - counts).take(place)


@torch.no_grad()
def kth_largest_without_waiting(values: Tensor, kept: Tensor, k: Tensor, axis: Axis) -> Tensor:
    """`kth_largest_by_histogram` of some of the values, with nothing that makes the host wait for the device.

    values: (..., n); kept: bool (...), the rows that count; k: int64 scalar on the device
    """
    rows = values.detach().flatten(0, -2)
    size = max(1, _SLICE // rows.shape[1])
    parts = list(zip(rows.split(size), kept.flatten().split(size), strict=True))

    def digits(part: Tensor) -> tuple[Tensor, Tensor]:
        bits = part.float().contiguous().view(torch.int32)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return (keys >> 16) + _BINS // 2, keys & (_BINS - 1)

    counts = torch.zeros(2, _BINS, dtype=torch.int64, device=values.device)
    for part, used in parts:
        upper, _ = digits(part)
        counts[0].scatter_add_(0, upper.flatten().long(), used[:, None].expand_as(part).flatten().long())
    high, left = _place(axis.sum_no_grad(counts[0]), k)
    for part, used in parts:
        upper, lower = digits(part)
        counts[1].scatter_add_(0, lower.flatten().long(), (used[:, None] & (upper == high)).flatten().long())
    low, _ = _place(axis.sum_no_grad(counts[1]), left)
    key = (((high - _BINS // 2) << 16) | low).to(torch.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32).to(values.dtype)


@torch.no_grad()
def kth_largest_per_row(values: Tensor, k: int, axis: Axis) -> Tensor:
    """The ``k``-th largest entry of each row, where the entries of a row are sharded over the processes.

    values: (..., n); n may differ between processes, and a row has at least ``k`` entries in all
    out: (..., 1)
    """
    n = min(k, values.shape[-1])
    own = values.detach().topk(n, dim=-1, sorted=True).values
    if axis.size == 1:
        return own[..., k - 1 :]
    every = axis.all_gather(functional.pad(own, (0, k - n), value=-torch.inf), dim=-1)  # [..., size * k]
    return every.topk(k, dim=-1, sorted=True).values[..., k - 1 :]


def keep_k_largest_per_row(values: Tensor, k: int, axis: Axis) -> Tensor:
    """``values`` (..., n) with all but the ``k`` largest entries of each row, as in `kth_largest_per_row`, set to 0.

    On one process exactly k are kept. On several, entries that tie with the k-th largest are all kept.
    """
    if axis.size == 1:
        kept, indices = values.topk(k, dim=-1)
        return torch.zeros_like(values).scatter(-1, indices, kept)
    return torch.where(values >= kth_largest_per_row(values, k, axis), values, 0.0)
