"""Autocorrelation over bands of lags equals its definition, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tsae.evaluation.metrics import TemporalMetrics
from tsae.evaluation.metrics.bands import BandAutocorrelation, bands_at, partners

BANDS = ((1, 3), (4, 15), (16, 127))


def example(seed: int) -> tuple[Tensor, Tensor]:
    """Features that switch, one that never fires and one far from 0; packed documents with excluded positions."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(4, 40, 6, generator=generator).relu()
    h[:, 1:] += 0.7 * h[:, :-1]
    h[..., 4] = 0
    h[..., 5] += 500
    segments = torch.zeros(4, 40, dtype=torch.int32)
    segments[1, 7:] = 1
    segments[2, 3:5] = -1
    segments[3, 10:] = 1
    segments[3, 11:] = 0  # the id of the first document comes back
    segments[3, 39] = -1
    return h, segments


def by_definition(h: Tensor, segments: Tensor, low: int, high: int) -> list[float]:
    out = []
    counted = h[segments >= 0].double()
    for j in range(h.shape[2]):
        mean, variance = counted[:, j].mean().item(), counted[:, j].var(correction=0).item()
        total, pairs = 0.0, 0
        for row, ids in zip(h[..., j].double().tolist(), segments.tolist(), strict=True):
            for t in range(len(row)):
                for u in range(t + low, min(t + high, len(row) - 1) + 1):
                    if ids[t] >= 0 and all(i == ids[t] for i in ids[t : u + 1]):
                        total += (row[t] - mean) * (row[u] - mean)
                        pairs += 1
        out.append(total / (pairs * variance) if variance > 0 and pairs else math.nan)
    return out


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_definition(seed: int) -> None:
    h, segments = example(seed)
    bands = BandAutocorrelation(BANDS)
    bands.update(h[:1], segments[:1])
    bands.update(h[1:], segments[1:])
    for row, (low, high) in zip(bands.compute(), BANDS, strict=True):
        expected = torch.tensor(by_definition(h, segments, low, high), dtype=torch.float64)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=2e-5, equal_nan=True)


def test_a_band_of_one_lag_is_the_autocorrelation_at_that_lag() -> None:
    h, segments = example(2)
    bands, lags = BandAutocorrelation(((1, 1), (4, 4))), TemporalMetrics()
    bands.update(h, segments)
    lags.update(torch.zeros(*h.shape[:2], 3), h, segments)
    expected = lags.lags.autocorrelation_per_feature()
    torch.testing.assert_close(bands.compute()[0], expected[0], rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(bands.compute()[1], expected[2], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_partners_counts_both_sides_within_the_segment() -> None:
    segments = torch.tensor([[0, 0, 0, 0, 1, -1, 1, 1]])
    near, far = partners(segments, ((1, 1), (2, 127))).tolist()
    assert near == [[1, 2, 2, 1, 0, 0, 1, 1]]
    assert far == [[2, 1, 1, 2, 0, 0, 0, 0]]


def test_no_pair_is_no_number() -> None:
    bands = BandAutocorrelation(BANDS)
    bands.update(torch.rand(3, 1, 2), torch.zeros(3, 1, dtype=torch.int32))
    assert bands.compute().isnan().all()


def test_bands_follow_the_length() -> None:
    assert bands_at(128) == BANDS
    assert bands_at(1024) == (*BANDS, (128, 1023))
    assert bands_at(129) == (*BANDS, (128, 128))
    assert bands_at(20) == ((1, 3), (4, 15), (16, 19))
    assert bands_at(16) == ((1, 3), (4, 15))
    assert bands_at(2) == ((1, 1),)
