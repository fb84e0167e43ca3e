"""Sliding-window sums along T for the `eager` backend (docs/mathematics.md, sections 2 and 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tsae_kernels.bands import Bands
from tsae_kernels.dtypes import sum_scale
from tsae_kernels.segments import Runs


def rows_by_time(mask: Tensor) -> list[Tensor | None]:
    """For every t, the rows b with mask[b, t], or None if there are none. mask: [B, T]."""
    rows = mask.t().nonzero()[:, 1].split(mask.sum(0).tolist())
    return [chosen if len(chosen) else None for chosen in rows]


class ChunkSegments:
    """The segments of one chunk of rows: `start`, `end` and `valid` of `Runs`, and row indices for every t.

    excluded: the rows where t is excluded, or None
    begins: the rows where a segment begins at t, or None
    """

    def __init__(self, runs: Runs, rows: slice) -> None:
        self.start, self.end, self.valid = (field[rows] for field in runs)
        self.excluded = rows_by_time(~self.valid)
        t = torch.arange(self.start.shape[1], device=self.start.device)
        self.begins = rows_by_time((self.start == t) & self.valid)

    def zero_excluded(self, x: Tensor, t: int) -> Tensor:
        """x [B, k] with zeros in the rows where t is excluded; a copy if there are any.

        Multiplying by 0 would keep an inf or NaN in the padding.
        """
        rows = self.excluded[t]
        return x if rows is None else x.index_fill(0, rows, 0)


class WindowSums:
    """Sums of y = scale * (h - mean of its segment) over windows, as differences of the prefix sum P.

    P[t] = y[0] + ... + y[t-1] is [T + 1, B, k]: T comes first so that each row [B, k] is contiguous.
    """

    def __init__(
        self,
        slices: Sequence[Tensor],
        bands: Bands,
        segments: ChunkSegments | None,
        dtype: torch.dtype,
        scale: float = 1.0,
    ) -> None:
        """slices: h as T slices [B, k]. segments: of the same rows, None if each row is one segment."""
        self.slices, self.bands, self.segments, self.dtype, self.scale = slices, bands, segments, dtype, scale
        self.T, (self.B, k) = len(slices), slices[0].shape
        self.P = torch.empty(self.T + 1, self.B, k, dtype=dtype, device=slices[0].device)
        self.P[0] = 0
        self.rows = self.P.unbind(0)
        self.offsets = self._offsets()
        if segments is None:
            return
        # Indices into P, flattened to [(T + 1) * B, k], of every window bound that the bands need.
        self.flat = self.P.flatten(0, 1)
        t = torch.arange(self.T, device=self.P.device)[:, None]
        lanes = torch.arange(self.B, device=self.P.device)
        start, end = segments.start.t(), segments.end.t()  # [T, B]
        reaches = {reach for first, last in bands for reach in (first - 1, last)}
        self.low = {r: (torch.maximum(t - r, start) * self.B + lanes).unbind(0) for r in reaches}
        self.high = {r: (torch.minimum(t + r + 1, end) * self.B + lanes).unbind(0) for r in reaches}

    def _offsets(self) -> list[Tensor | None]:
        """For every t, -scale * mean of the segments that begin there, [rows, k]."""
        offsets: list[Tensor | None] = [None] * self.T
        running = torch.zeros_like(self.rows[0])
        inner = sum_scale(self.dtype)
        if self.segments is None:
            for h_t in self.slices:
                running.add_(h_t, alpha=inner)
            offsets[0] = running.div_(self.T).mul_(-self.scale / inner)
            return offsets
        length = (self.segments.end - self.segments.start).to(self.dtype)
        for t in reversed(range(self.T)):  # backwards: a segment's sum is complete where it begins
            running.add_(self.segments.zero_excluded(self.slices[t], t), alpha=inner)
            rows = self.segments.begins[t]
            if rows is not None:
                offsets[t] = running.index_select(0, rows).div_(length[rows, t, None]).mul_(-self.scale / inner)
                running.index_fill_(0, rows, 0)
        return offsets

    def fill(self) -> Iterator[Tensor]:
        """Like `centred`, and write P[t + 1] before y[t] is yielded."""
        for t, y in enumerate(self.centred()):
            torch.add(self.rows[t], y, out=self.rows[t + 1])
            yield y

    def centred(self) -> Iterator[Tensor]:
        """Yield y[t], [B, k], zero where excluded, for t = 0, 1, ..."""
        if self.segments is None:
            only = self.offsets[0]
            assert only is not None  # the one segment begins at 0
            for h_t in self.slices:
                yield self._centred(h_t, only)
            return
        offset = torch.zeros_like(self.rows[0])
        for t, h_t in enumerate(self.slices):
            rows, starting = self.segments.begins[t], self.offsets[t]
            if rows is not None and starting is not None:
                offset.index_copy_(0, rows, starting)
            yield self.segments.zero_excluded(self._centred(h_t, offset), t)

    def _centred(self, h_t: Tensor, offset: Tensor) -> Tensor:
        return torch.add(offset, h_t.to(self.dtype), alpha=self.scale)

    def low_row(self, t: int, reach: int) -> Tensor:
        """P at t - reach, clamped to the segment's start: [B, k]."""
        if self.segments is None:
            return self.rows[max(t - reach, 0)]
        return self.flat.index_select(0, self.low[reach][t])

    def high_row(self, t: int, reach: int) -> Tensor:
        """P at t + reach + 1, clamped to the segment's end: [B, k]."""
        if self.segments is None:
            return self.rows[min(t + reach + 1, self.T)]
        return self.flat.index_select(0, self.high[reach][t])

    def degrees(self) -> Tensor:
        """[1 or B, T, S]: the number of positions of t's segment at each band's offsets, before and after t."""
        t = torch.arange(self.T, device=self.P.device)
        start = t.new_zeros(1, self.T) if self.segments is None else self.segments.start
        end = t.new_full((1, self.T), self.T) if self.segments is None else self.segments.end
        counts = [
            torch.maximum(t - first + 1, start)
            - torch.maximum(t - last, start)
            + torch.minimum(t + last + 1, end)
            - torch.minimum(t + first, end)
            for first, last in self.bands
        ]
        return torch.stack(counts, dim=2).to(self.dtype)
