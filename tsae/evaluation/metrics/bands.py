"""Autocorrelation of each feature over bands of lags, from the squared differences of `tsae_kernels`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from tsae.evaluation.metrics.accumulator import Accumulator, row_chunks
from tsae_kernels import MULTISCALE, Bands, temporal_stats
from tsae_kernels.segments import find_runs


def bands_at(length: int) -> Bands:
    """The paper's bands as far as sequences of ``length`` tokens have such pairs, and one for the lags beyond them."""
    beyond = MULTISCALE[-1][1] + 1
    return tuple((low, min(high, length - 1)) for low, high in (*MULTISCALE, (beyond, length - 1)) if low < length)


class BandAutocorrelation(Accumulator):
    """`LagStatistics.autocorrelation` of each feature, with all pairs in a band of lags pooled.

    For a band (a, b), with sums over the pairs (t, u), a <= u - t <= b, of one segment:

        sum (h_t - m)(h_u - m) / (pairs * v)

    m and v are the mean and variance of the feature over all counted positions. With y = h - m and D the differences
    of `temporal_stats`, the sum of products is ``(sum (y_t^2 + y_u^2) - D) / 2``, which needs no loop over lags.
    """

    def __init__(self, bands: Bands = MULTISCALE) -> None:
        super().__init__()
        self.bands = bands
        self._shift: Tensor | None = None  # [d_sae]

    def update(self, h: Tensor, segments: Tensor) -> None:
        """h: [B, T, d_sae] floating point; segments: [B, T] integers, negative = excluded."""
        for rows in row_chunks(h):
            self._update(h[rows].float(), segments[rows])

    def _update(self, h: Tensor, segments: Tensor) -> None:
        counted = segments >= 0
        if not bool(counted.any()):
            return
        h = h.masked_fill(~counted[..., None], 0)
        if self._shift is None:  # keeps the variance of a feature far from 0 exact in float32
            self._shift = h.flatten(0, 1).sum(0) / counted.sum()
        y = h - self._shift
        degrees = partners(segments, self.bands).to(h.dtype)  # [S, B, T]
        weights = torch.cat([counted[None].to(h.dtype), degrees]).flatten(1)  # [1 + S, B * T]
        flat = y.flatten(0, 1)
        self._add("sum", weights @ flat)
        self._add("square", weights @ flat.square())
        self._add("count", torch.cat([weights[:1].sum(1), degrees.flatten(1).sum(1) / 2]))
        self._add("differences", temporal_stats(h, self.bands, segments).differences.sum(0, dtype=torch.float64))

    def compute(self) -> Tensor:
        """[S, d_sae] float64 on the CPU; NaN for a feature that never varies, or a band without a pair."""
        count, total, square = self._get("count"), self._get("sum"), self._get("square")
        mean = total[0] / count[0]
        variance = square[0] / count[0] - mean.square()
        shift = cast(Tensor, self._shift).double().cpu()  # set by the first batch
        energy = square[0] / count[0] + 2 * mean * shift + shift.square()
        pairs = count[1:, None]
        product = (square[1:] - self._get("differences")) / 2
        covariance = product - mean * total[1:] + pairs * mean.square()
        varying = variance > 1e-10 * energy
        return torch.where(varying & (pairs > 0), covariance / (pairs * variance), torch.nan)


def partners(segments: Tensor, bands: Bands) -> Tensor:
    """Number of positions u in the segment of each position t with a <= |u - t| <= b.

    segments: [B, T] integers, negative = excluded
    out:      [S, B, T] int64, 0 at excluded positions
    """
    runs = find_runs(segments)
    place = torch.arange(segments.shape[1], device=segments.device)
    before, after = place - runs.start, runs.end - 1 - place  # positions of the segment on either side

    def within(reach: Tensor, low: int, high: int) -> Tensor:
        return (reach.clamp(max=high) - (low - 1)).clamp(min=0)

    counts = [within(before, low, high) + within(after, low, high) for low, high in bands]
    return torch.stack(counts).masked_fill(~runs.valid, 0)
