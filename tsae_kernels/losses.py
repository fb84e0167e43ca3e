"""Losses on temporal statistics: TSAE's multi-scale loss and TC-SAE's window loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsae_kernels.arguments import check_features, check_segments, check_tensor
from tsae_kernels.backends.registry import choose_backend
from tsae_kernels.bands import MULTISCALE, Bands, check_bands
from tsae_kernels.dtypes import dtype_of_stats
from tsae_kernels.functions import CountedStats, TemporalStats, temporal_stats
from tsae_kernels.segments import count_positions, find_runs


def temporal_loss(
    h: Tensor,
    weights: Sequence[float] = (0.01, 0.005, 0.001),
    bands: Bands = MULTISCALE,
    variance: Tensor | None = None,
    min_variance: float = 0.01,
    segments: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The multi-scale temporal loss L_temp (TSAE, eq. 2 and 3, section 4.1 and 4.3).

        L_temp  = (1/N) sum_s weights_s sum_j omega_j sum_b differences[b, s, j]
        omega_j = var_j [var_j >= min_variance] / sum_i var_i [var_i >= min_variance]

    where N is the number of non-excluded positions in the batch.

    h: [B, T, k] feature activations
    weights: one number per band, the paper's lambda
    variance: [k] in the square of h's unit, or None. The variance estimate in omega, which the paper leaves open. None:
        this batch's variance within each sequence, averaged over sequences (two passes over h, accurate for a large
        mean).
    min_variance: features below it are excluded from the loss and get exactly zero gradient from it
    bands, segments, backend: as in `temporal_stats`
    out: [] float32 (float64 for float64 h), in the square of h's unit; 0 with zero gradient if no feature passes. No
        gradient flows through omega.

    Raises the errors of `temporal_stats`, and `ValueError` if there is not one weight per band. If the statistics are
    already known, `temporal_loss_from_stats` saves the pass over h.
    """
    check_features("h", h)
    _check_weights(weights, len(check_bands(bands)))
    check_segments(segments, h)
    if variance is None:
        variance = _variance_of_features(h, segments)
    positions = h.shape[1] if segments is None else count_positions(segments)
    stats = temporal_stats(h, bands, segments, backend=backend)
    return temporal_loss_from_stats(stats, positions, weights, variance, min_variance)


def temporal_loss_from_stats(
    stats: TemporalStats | CountedStats,
    positions: int | Tensor,
    weights: Sequence[float] = (0.01, 0.005, 0.001),
    variance: Tensor | None = None,
    min_variance: float = 0.01,
) -> Tensor:
    """`temporal_loss` from the statistics of the features, in O(B S k) work.

    stats: from `activate_with_stats` or `temporal_stats`
    positions: T, or with segments `count_positions(segments)`, the [B] number of non-excluded positions of each row
    weights, variance, min_variance, out: as in `temporal_loss`, but the default variance is
        `within_sequence_variance(stats, positions)`, which is less precise for a large mean

    Raises `TypeError` or `ValueError` for an invalid argument. Does not wait for the GPU.
    """
    _check_weights(weights, stats.differences.shape[1])
    if not isinstance(min_variance, (int, float)):
        raise TypeError(f"min_variance must be a number, got {type(min_variance).__name__}")
    B, _, k = stats.differences.shape
    if variance is None:
        variance = within_sequence_variance(stats, positions)
    else:
        check_tensor("variance", variance, (k,), stats.differences.device)
    if isinstance(positions, Tensor):
        N: int | Tensor = positions.sum().clamp_min(1)
    else:
        N = max(B * positions, 1)
    dtype = stats.differences.dtype
    passing = variance.detach().to(dtype)
    passing = torch.where(passing >= min_variance, passing, 0)
    mass = passing.sum()
    omega = passing / torch.where(mass > 0, mass, 1)
    per_band = stats.differences.sum(0)  # [S, k]; summed over b first, so that all sequences share one gradient
    # A masked feature must not affect the loss even if its differences overflow.
    per_band = torch.where(omega > 0, per_band, 0)
    if not weights:
        return per_band.sum() / N
    # The weights stay Python numbers: copying them to a GPU would wait for it.
    return (per_band * torch.stack([weight * omega for weight in weights])).sum() / N


def within_sequence_variance(stats: TemporalStats | CountedStats, positions: int | Tensor) -> Tensor:
    """The variance of each feature within a sequence, averaged over the sequences with non-excluded positions.

    stats: [B, ...] statistics. positions: T or [B], as in `temporal_loss_from_stats`
    out: [k] in the statistics' dtype and in the square of h's unit, without gradient: sigma_j^2 of TSAE, eq. 3

    Computed as square/n - (total/n)^2 in float64, clamped at 0. Because float32 statistics are rounded, the relative
    error is about 1e-7 (m/s)^2 for a feature with mean m and standard deviation s.
    """
    total, square = stats.total.detach().double(), stats.square.detach().double()
    if isinstance(positions, Tensor):
        rows: int | Tensor = (positions > 0).sum().clamp_min(1)
        n: int | Tensor = positions.clamp_min(1)[:, None]
    else:
        rows, n = max(total.shape[0], 1), positions
    variance = (square / n - (total / n) ** 2).clamp_min(0)
    return (variance.sum(0) / rows).to(stats.total.dtype)


def _variance_of_features(h: Tensor, segments: Tensor | None) -> Tensor:
    """`within_sequence_variance` computed from the features, which are centred before squaring. out: [k]"""
    x = h.detach().to(dtype_of_stats(h.dtype))
    B, T, _ = x.shape
    if segments is None:
        deviation = x - x.mean(1, keepdim=True)
        return deviation.square_().sum((0, 1)) / max(B * T, 1)
    excluded = (segments < 0)[..., None]
    n = count_positions(segments)
    mean = x.masked_fill(excluded, 0).sum(1) / n.clamp_min(1)[:, None]
    deviation = (x - mean[:, None]).masked_fill_(excluded, 0)
    per_row = deviation.square_().sum(1) / n.clamp_min(1)[:, None]
    return per_row.sum(0) / (n > 0).sum().clamp_min(1)


def window_consistency(
    h: Tensor, window: int = 3, segments: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """The sliding-window consistency loss (TC-SAE, eq. 3).

    The mean, over all windows of `window` positions within a segment, of
    1/(window-1) * sum_{i=1}^{window-1} |f_{t+i} - f_{t+i-1}|^2.

    h: [B, T, k] features f
    window: at least 2; 3 in the paper
    segments, backend: as in `temporal_stats`
    out: [] float32 (float64 for float64 h), in the square of h's unit; 0 if every segment is shorter than a window.
        Differentiable once. Exact at segment edges, where a pair is in fewer windows.

    Raises the errors of `temporal_stats`, and `TypeError` or `ValueError` if `window` is not an integer of at least 2.
    """
    check_features("h", h)
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an integer of at least 2, got {window!r}")
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    check_segments(segments, h)
    chosen = choose_backend(backend, h.device)
    weights = window_weights(h, window, segments)
    energy: Tensor = torch.ops.tsae_kernels.step_energy(h, weights, chosen)
    return energy


def window_weights(h: Tensor, window: int, segments: Tensor | None) -> Tensor:
    """[B, T]: the weight of |f_{t+1} - f_t|^2 in `window_consistency`; 0 across segments and at T - 1.

    In a segment of n positions, the pair at position r is in min(r, n - w) - max(0, r - w + 2) + 1 of its
    n - w + 1 windows (none if n < w).
    """
    B, T, _ = h.shape
    t = torch.arange(T, device=h.device).expand(B, T)
    if segments is None:
        position, length = t, torch.full_like(t, T)
    else:
        runs = find_runs(segments)
        position, length = t - runs.start, runs.end - runs.start
    room = length - window
    count = torch.minimum(position, room) - (position - window + 2).clamp_min(0) + 1
    used = (room >= 0) & (position < length - 1)
    windows = torch.where(position == 0, (room + 1).clamp_min(0), 0).sum().clamp_min(1)
    weights = torch.where(used, count, 0).to(dtype_of_stats(h.dtype))
    return weights / (windows * (window - 1))


def _check_weights(weights: Sequence[float], bands: int) -> None:
    if isinstance(weights, (str, Tensor)) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a sequence of numbers, one per band, got {type(weights).__name__}")
    if len(weights) != bands:
        raise ValueError(f"weights must have one number per band: {bands}, got {len(weights)}")
