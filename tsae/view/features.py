"""The features of a page: their statistics, where each is strongest, and its neighbour in time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tsae.evaluation.metrics import Persistence
from tsae.evaluation.metrics.accumulator import pair_mask, row_chunks
from tsae.evaluation.metrics.bands import BandAutocorrelation, bands_at
from tsae.evaluation.metrics.temporal import MIN_ACTIVATIONS, LagStatistics, lags_at
from tsae_kernels.segments import find_runs

NEIGHBOUR_LAGS = (1, 2, 3, 4)
DENSE = 1 << 26  # elements per [tokens, features] float32 block: 256 MB


class Activity:
    """Sparse activations of features on a text, with their statistics.

    After `finish`, with n activations above 0, sorted by feature and then by position:

        feature, position: [n] int64; a position counts tokens over all rows, row * T + t
        value:             [n] float32

    and `run` [N * T] int64, the segment run of each position, numbered over all rows, -1 where excluded.

    length: T, of the sequences
    """

    def __init__(self, d_sae: int, length: int = 128) -> None:
        self.d_sae = d_sae
        self.lags, self.persistence = LagStatistics(lags_at(length)), Persistence()
        self.bands = BandAutocorrelation(bands_at(length))
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._segments: list[Tensor] = []

    def update(self, h: Tensor, segments: Tensor) -> None:
        """h: [B, T, d_sae] features; segments: [B, T] integers, negative = excluded."""
        h = h.float().masked_fill((segments < 0)[..., None], 0)
        for rows in row_chunks(h):
            self.lags.update(h[rows], segments[rows])
        self.persistence.update_features(h, segments)
        self.bands.update(h, segments)
        flat = h.flatten(0, 1).cpu()
        position, feature = (flat > 0).nonzero(as_tuple=True)
        done = sum(part.numel() for part in self._segments)
        self._parts.append(((position + done).numpy(), feature.numpy(), flat[position, feature].numpy()))
        self._segments.append(segments.cpu())

    def finish(self) -> None:
        """Sort the activations and number the segment runs, after the last `update`."""
        self.segments = torch.cat(self._segments)  # [N, T]
        position, feature, value = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.argsort(feature, kind="stable")  # positions stay ascending within a feature
        self.position, self.feature, self.value = position[order], feature[order], value[order]
        runs = find_runs(self.segments)
        start = runs.start + torch.arange(len(self.segments))[:, None] * self.segments.shape[1]
        _, numbers = start.flatten().unique(return_inverse=True)
        self.run = torch.where(runs.valid.flatten(), numbers, -1).numpy()

    @property
    def peak(self) -> np.ndarray:
        """[d_sae] largest activation; 0 for a feature that is never on."""
        out = np.zeros(self.d_sae, dtype=np.float32)
        np.maximum.at(out, self.feature, self.value)
        return out

    def strongest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The runs in which each feature peaks highest, at most ``count`` per feature, in descending order.

        out: feature and run, [m] int64 each, sorted by feature
        """
        if len(self.feature) == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        run = self.run[self.position]
        border = np.flatnonzero((np.diff(self.feature) != 0) | (np.diff(run) != 0)) + 1
        first = np.concatenate([[0], border])
        highest = np.maximum.reduceat(self.value, first)
        feature, run = self.feature[first], run[first]
        order = np.lexsort((run, -highest, feature))
        feature, run = feature[order], run[order]
        begins = np.flatnonzero(np.diff(feature, prepend=-1))
        rank = np.arange(len(feature)) - np.repeat(begins, np.diff(begins, append=len(feature)))
        return feature[rank < count], run[rank < count]

    def top_tokens(self, token: np.ndarray, count: int) -> list[list[int]]:
        """The tokens with the largest activation of each feature, summed over the text, in descending order.

        token: [N * T] integers, the token at each position
        """
        size = int(token.max()) + 1
        key, inverse = np.unique(self.feature * size + token[self.position], return_inverse=True)
        total = np.bincount(inverse, weights=self.value, minlength=len(key))
        order = np.lexsort((-total, key // size))
        out: list[list[int]] = [[] for _ in range(self.d_sae)]
        for feature, each in zip((key // size)[order].tolist(), (key % size)[order].tolist(), strict=True):
            if len(out[feature]) < count:
                out[feature].append(each)
        return out


@torch.no_grad()
def neighbours(activity: Activity) -> tuple[np.ndarray, np.ndarray]:
    """For each feature i the other feature j whose activation 1 to 4 tokens later correlates most with it.

    With sums over the pairs (t, u) within a segment, u - t in `NEIGHBOUR_LAGS`, the correlation is

        r_ij = sum (h_i,t - m_i)(h_j,u - m_j) / (pairs * s_i * s_j)

    m and s are the mean and the standard deviation of a feature over all counted positions, as in the autocorrelation.
    Features that are on fewer than 20 times neither have a neighbour nor are one.

    out: j [d_sae] int64, -1 for no neighbour, and r_ij [d_sae] float32, NaN for none
    """
    counts = np.bincount(activity.feature, minlength=activity.d_sae)
    able = np.flatnonzero(counts >= MIN_ACTIVATIONS)
    neighbour = np.full(activity.d_sae, -1, dtype=np.int64)
    strength = np.full(activity.d_sae, np.nan, dtype=np.float32)
    if len(able) < 2:
        return neighbour, strength
    segments = activity.segments
    counted = (segments >= 0).flatten()
    bounds = np.searchsorted(activity.feature, np.arange(activity.d_sae + 1))

    def standard(features: np.ndarray) -> Tensor:
        """[N, T, b]: standardised activations; 0 at excluded positions."""
        h = torch.zeros(len(features), counted.numel())
        for row, j in zip(h, features, strict=True):
            own = slice(bounds[j], bounds[j + 1])
            row[activity.position[own]] = torch.from_numpy(activity.value[own])
        n = counted.sum()
        h -= (h.sum(1) / n)[:, None]
        h[:, ~counted] = 0
        h /= (h.square().sum(1) / n).sqrt().clamp(min=1e-30)[:, None]
        return h.T.contiguous().view(*segments.shape, -1)

    pairs = sum(int(pair_mask(segments, lag).sum()) for lag in NEIGHBOUR_LAGS)
    if pairs == 0:
        return neighbour, strength
    size = max(DENSE // counted.numel(), 1)
    blocks = [able[i : i + size] for i in range(0, len(able), size)]
    best = {b: torch.full((len(block),), -torch.inf) for b, block in enumerate(blocks)}
    for candidates in blocks:
        y = standard(candidates)
        later = torch.zeros_like(y)  # at t: the sum of y over t + 1 ... t + 4 in the segment
        for lag in NEIGHBOUR_LAGS:
            later[:, :-lag] += y[:, lag:] * pair_mask(segments, lag)[..., None]
        del y
        for b, block in enumerate(blocks):
            r = standard(block).flatten(0, 1).T @ later.flatten(0, 1) / pairs  # [block, candidates]
            if block is candidates:
                r.fill_diagonal_(-torch.inf)
            value, index = r.max(dim=1)
            better = (value > best[b]).numpy()
            best[b] = torch.maximum(best[b], value)
            neighbour[block[better]] = candidates[index.numpy()[better]]
    for block, value in zip(blocks, best.values(), strict=True):
        strength[block] = value.numpy()
    return neighbour, strength
