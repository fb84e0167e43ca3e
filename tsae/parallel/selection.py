"""Order statistics of what is spread over processes, exact: thresholds of TopK, BatchTopK and exact steering."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tsae.parallel.axis import Axis

_BINS = 1 << 16


@torch.no_grad()
def kth_largest(values: Tensor, k: int, axis: Axis) -> Tensor:
    """The ``k``-th largest of all processes' ``values``, the same as of one tensor that held them all.

    The bits of a float32, read as an integer, are in the order of the numbers. So two histograms of 65,536 bins, of the
    upper and then of the lower half of the bits, find it: two sums over the processes, however much there is.

    values: any shape, may be empty; as float32
    k: from 1 to the number of values on all processes
    out: scalar in the dtype of ``values``
    """
    bits = values.detach().float().contiguous().flatten().view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ascending, negative numbers too
    upper = (keys >> 16) + _BINS // 2
    high, left = _bin(upper, torch.tensor(k, device=keys.device), axis)
    low, _ = _bin((keys & (_BINS - 1))[upper == high], left, axis)
    key = (((high - _BINS // 2) << 16) | low).to(torch.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32).to(values.dtype)


def _bin(digits: Tensor, k: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """The digit of the k-th largest, and its place among those of the same digit, counted from 1."""
    counts = axis.total(torch.bincount(digits, minlength=_BINS)).flip(0)
    reached = counts.cumsum(0)
    place = (reached < k).sum()
    return _BINS - 1 - place, k - (reached[place] - counts[place])


@torch.no_grad()
def kth_largest_per_row(values: Tensor, k: int, axis: Axis) -> Tensor:
    """The ``k``-th largest of each row, whose entries are spread over the processes.

    values: (..., n), n may differ between processes; in all rows' entries together at least ``k``
    out: (..., 1)
    """
    n = min(k, values.shape[-1])
    own = values.detach().topk(n, dim=-1).values
    lowest = -torch.inf
    every = axis.gather(functional.pad(own, (0, k - n), value=lowest), dim=-1)  # [..., size * k]
    return every.topk(k, dim=-1, sorted=True).values[..., k - 1 :]
