"""Running per-feature statistics over training: the temporal buffer, dead features, lag-1 correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae.training.feature_lists import FeatureLists
from tsae_kernels import temporal_stats


class TemporalBuffer:
    """The running estimate of ``var_j`` (TSAE section 4.3, "temporal buffers").

    The paper does not define it. Our reading: it starts as the variance of 128 draws of N(0, std^2) per feature, which
    is at the 0.01 threshold for std 0.1, and is updated by ``v <- (1 - m) v + m batch_var``.

    ``variance``: (d_sae), float32.
    """

    def __init__(self, d_sae: int, std: float = 0.1, *, generator: torch.Generator | None = None) -> None:
        self.variance = (torch.randn(128, d_sae, generator=generator) * std).var(0, correction=0)

    def update(self, batch_variance: Tensor, mixing: float | Tensor) -> None:
        """Mix in ``batch_variance`` (d_sae) with weight ``mixing``."""
        self.variance = self.variance.to(batch_variance.device)
        self.variance.copy_(torch.lerp(self.variance, batch_variance, mixing))


class DeadFeatures:
    """Counts the tokens since each feature last fired.

    ``silent``: (d_sae), int64.
    """

    def __init__(self, d_sae: int) -> None:
        self.silent = torch.zeros(d_sae, dtype=torch.int64)

    def update(self, square: Tensor, tokens: int | Tensor, ranks: Ranks = SINGLE_PROCESS) -> None:
        """Reset the count of features that fired (nonzero sum of squares) and add ``tokens`` to the others.

        square: [B, d_sae], from `TemporalStats`; with several processes those of this shard
        tokens: positions of the full batch
        """
        fired = ranks.data.any((square > 0).any(0))
        self.silent = self.silent.to(fired.device)
        self.silent.copy_(torch.where(fired, 0, self.silent + tokens))

    def longest_silent(self, after_tokens: int, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` features silent for longest, (count) int64, and which of them are dead, (count) bool.

        As `indices`, for a device that the host must not wait for: of more dead features, ``count`` are listed.
        """
        silent, features = self.silent.topk(count)
        return features, silent > after_tokens

    def indices(self, after_tokens: int) -> Tensor:
        """Indices of the features silent for more than ``after_tokens`` tokens, (n) int64."""
        return (self.silent > after_tokens).nonzero().squeeze(1)


@torch.no_grad()
def lag1_correlation(h: Tensor | FeatureLists, segments: Tensor | None = None, ranks: Ranks = SINGLE_PROCESS) -> Tensor:
    """Correlation of each feature with itself one token later (TC-SAE section 4, "feature correlation tracking").

    From the statistics of band (1, 1): ``2 sum f_t f_{t+1} = sum (f_t^2 + f_{t+1}^2) - D_1`` over pairs inside a
    segment, centred by the mean and divided by the variance over all non-excluded positions.

    h: (B, T, d_sae); segments: (B, T) or None; with several processes a shard of the batch
    out: (d_sae), float32, over the full batch; 0 where a feature is constant or there is no pair
    """
    if isinstance(h, FeatureLists):
        return _lag1_correlation_of_lists(h, segments, ranks)
    D1, total, square = (s.double().sum(0) for s in temporal_stats(h.detach(), ((1, 1),), segments))
    batch, tokens, _ = h.shape
    if segments is None:
        segments = h.new_zeros(batch, tokens, dtype=torch.int32)
    kept = segments >= 0
    joined = (segments[:, 1:] == segments[:, :-1]) & kept[:, 1:]  # [B, T-1]
    pairs, n = int(ranks.data.sum_no_grad(joined.sum())), int(ranks.data.sum_no_grad(kept.sum()))
    if pairs == 0:
        return h.new_zeros(h.shape[-1], dtype=torch.float32)
    # Every position counts twice in sum (f_t^2 + f_{t+1}^2), except at the ends of a segment, which have one neighbour.
    missing = torch.full((batch, tokens), 2, device=h.device)
    missing[:, 1:] -= joined.int()
    missing[:, :-1] -= joined.int()
    edge = missing * kept  # [B, T]
    rows = edge > 0
    ends, weight = h.detach()[rows].double(), edge[rows].double()[:, None]  # [edges, d_sae]
    products = 0.5 * (2.0 * square - (weight * ends.square()).sum(0) - D1[0])
    sums = 2.0 * total - (weight * ends).sum(0)  # of f_t + f_{t+1} over pairs
    return _correlation(torch.stack([products, sums, total, square]), n, pairs, ranks)


def _lag1_correlation_of_lists(h: FeatureLists, segments: Tensor | None, ranks: Ranks) -> Tensor:
    batch, tokens, _ = h.shape
    if segments is None:
        segments = torch.zeros(batch, tokens, dtype=torch.int32, device=h.device)
    kept = segments >= 0
    joined = (segments[:, 1:] == segments[:, :-1]) & kept[:, 1:]  # [B, T-1]
    pairs, n = ranks.data.sum_no_grad(joined.sum()), ranks.data.sum_no_grad(kept.sum())
    none = torch.zeros_like(kept[:, :1])
    before = torch.cat([joined, none], 1).flatten()[:, None]  # [B T, 1], whether t and t + 1 are a pair
    neighbours = before.double() + torch.cat([none, joined], 1).flatten()[:, None]
    values, counted = h.values.detach().double(), kept.flatten()[:, None]
    entries = (values * h.detach().next_values() * before, values * neighbours, values * counted)
    sums = [h.sum_by_feature(each) for each in (*entries, values.square() * counted)]
    return _correlation(torch.stack(sums), n, pairs, ranks)


def _correlation(sums: Tensor, n: int | Tensor, pairs: int | Tensor, ranks: Ranks) -> Tensor:
    """From this shard's sums over pairs of f_t f_{t+1} and f_t + f_{t+1} and over positions of f_t and f_t^2; with the
    numbers of positions and pairs in the full batch."""
    products, sums, total, square = ranks.data.sum_no_grad(sums)
    n, pairs = torch.as_tensor(n).clamp(min=1), torch.as_tensor(pairs).clamp(min=1)
    mean = total / n
    variance = square / n - mean.square()
    covariance = (products - mean * sums) / pairs + mean.square()
    return torch.where(variance > 1e-12 * (square / n), covariance / variance.clamp(min=1e-300), 0.0).float()
