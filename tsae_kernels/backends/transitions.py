"""Transitions between on and off, counted along T for the `eager` backend (docs/mathematics.md, section 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae_kernels.backends.windows import ChunkSegments, rows_by_time


class TransitionCounts:
    """Counts of the pairs (t - 1, t) in one segment by whether a feature is on (h > 0 or NaN) at each end.

    Kept as sums of "off", 1 or 0 in the features' dtype, because PyTorch vectorizes `le` into a floating-point tensor
    and no boolean arithmetic; NaN compares false. Sums of 2^24 ones and more need float64.
    """

    def __init__(self, T: int, like: Tensor, segments: ChunkSegments | None) -> None:
        """like: a slice [B, k] in the dtype of the statistics. segments: of the same rows."""
        self.first, self.second, self.both = (  # pairs that are off at their first end, their second, both
            torch.zeros_like(like, dtype=torch.float64 if T >= 2**24 else like.dtype) for _ in range(3)
        )
        self.before: Tensor | None = None  # off at t - 1
        self.pairs: int | Tensor = T - 1
        self.broken: list[Tensor | None] = [None] * T  # rows in which t - 1 and t are in no pair
        if segments is not None:
            starts = segments.start == torch.arange(T, device=like.device)
            connected = segments.valid & ~starts  # [B, T]
            self.pairs = connected.sum(1, dtype=torch.int32)[:, None]
            self.broken = rows_by_time(~connected)

    def add(self, t: int, x: Tensor) -> None:
        """x: h at t, [B, k]; called for t = 0, 1, ..."""
        off = torch.le(x, 0, out=torch.empty_like(self.both))
        before, now, rows = self.before, off, self.broken[t]
        self.before = off
        if before is None:
            return
        if rows is not None:
            before, now = before.index_fill_(0, rows, 0), off.index_fill(0, rows, 0)
        self.first += before
        self.second += now
        self.both.addcmul_(before, now)

    def counts(self) -> Tensor:
        """[B, 3, k] int32: on to on, on to off, off to on."""
        first, second, both = (each.int() for each in (self.first, self.second, self.both))
        return torch.stack([self.pairs - first - second + both, second - both, first - both], 1)
