"""Metrics of features along the sequence: the `temporal` object of eval.json.

A pair (t, t + lag) counts if both positions lie in one segment: no pair includes an excluded position or crosses a
document boundary. `h` is the feature activations, [B, T, d_sae]; a feature is on where h > 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.evaluation.metrics.accumulator import Accumulator, mean_where, pair_mask, ratio, row_chunks, segment_runs

DIFFERENCE_LAGS = (1, 4, 16, 64)
CURVE_LAGS = (1, 2, 4, 8, 16, 32, 64)
MIN_ACTIVATIONS = 20  # with fewer, a feature's P(on | on) is too noisy for persistence_excess


def lags_at(length: int) -> tuple[int, ...]:
    """The lags of the curve in sequences of ``length`` tokens, powers of 2: `CURVE_LAGS`, as far as they are below the
    length, and longer ones up to three quarters of it."""
    longer = takewhile(lambda lag: 4 * lag <= 3 * length, (2 * CURVE_LAGS[-1] << i for i in count()))
    return (*(lag for lag in CURVE_LAGS if lag < length), *longer)


def _has_difference(lag: int) -> bool:
    """Whether the relative difference is reported at a lag: `DIFFERENCE_LAGS`, and further powers of 4."""
    return lag in DIFFERENCE_LAGS or (lag > DIFFERENCE_LAGS[-1] and lag.bit_length() % 2 == 1)


class LagStatistics(Accumulator):
    """Differences and autocorrelation of features at a few lags.

    For each lag, with sums over its pairs (t, u = t + lag) and features j:

    relative_difference              sum_j sum (h_u - h_t)^2 / sum_j sum (h_u^2 + h_t^2); 0 = constant,
                                     1 = unrelated, 2 = alternating in sign
    relative_difference_per_feature  the same ratio per feature, averaged over features with a nonzero
                                     denominator
    autocorrelation                  sum (h_t - m)(h_u - m) / (pairs * v) with m and v the mean and variance
                                     of the feature over all counted positions, averaged over features with
                                     v > 1e-10 E[h^2] (less is float32 rounding)

    A value is 0.0 if there is nothing to average, or no pair because every segment is shorter than the lag.
    """

    def __init__(self, lags: Sequence[int] = CURVE_LAGS) -> None:
        super().__init__()
        self.lags = tuple(lags)
        self._shift: Tensor | None = None  # [d_sae]

    def update(self, h: Tensor, segments: Tensor) -> None:
        """h: [B, T, d_sae] floating point, 0 at excluded positions; segments: [B, T] integers."""
        counted = segments >= 0
        n = int(counted.sum())
        if n == 0:
            return
        if self._shift is None:
            # The variance of a feature far from 0 is computed about this, without cancellation.
            self._shift = (counted.flatten().to(h.dtype) @ h.flatten(0, 1)) / n
        T = h.shape[1]
        masks = [pair_mask(segments, lag).to(h.dtype) for lag in self.lags]  # [B, T - lag] each
        # Row 0 counts positions; row i counts the pairs of lag i that a position belongs to (0, 1 or 2).
        weights = h.new_zeros((1 + len(self.lags), *segments.shape))
        weights[0] = counted
        for weight, mask, lag in zip(weights[1:], masks, self.lags, strict=True):
            weight[:, : max(T - lag, 0)] += mask
            weight[:, lag:] += mask
        weights = weights.flatten(1)  # [1 + lags, B * T]

        flat = h.flatten(0, 1)
        buffer = torch.empty_like(flat)
        self._add("energy", weights @ torch.mul(flat, flat, out=buffer))  # [1 + lags, d_sae]
        y = torch.sub(flat, self._shift.to(h.dtype), out=buffer)
        self._add("sum", weights @ y)
        self._add("square", weights @ y.square_())
        pairs = torch.stack([weights[0].sum(), *(mask.sum() for mask in masks)])
        self._add("count", pairs)

        differences = h.new_zeros((len(self.lags), h.shape[2]))
        for i, (mask, lag) in enumerate(zip(masks, self.lags, strict=True)):
            if mask.numel():
                step = buffer[: mask.numel()].view(*mask.shape, -1)
                torch.sub(h[:, lag:], h[:, : T - lag], out=step)
                differences[i] = mask.flatten() @ step.square_().flatten(0, 1)
        self._add("differences", differences)

    def merge(self, other: Accumulator) -> None:
        """Add the sums of `other`; ValueError if its lags differ."""
        if isinstance(other, LagStatistics):
            if other.lags != self.lags:
                raise ValueError(f"other must have lags {self.lags}, got {other.lags}")
            if other._shift is not None:
                if self._shift is None:
                    self._shift = other._shift
                other = other._shifted(self._shift)
        super().merge(other)

    def _shifted(self, shift: Tensor) -> LagStatistics:
        """The same sums about another shift."""
        assert self._shift is not None  # `merge` has seen to it
        moved = LagStatistics(self.lags)
        moved._sums, moved._shift = dict(self._sums), shift
        delta = (self._shift.double() - shift.double()).to(self._sums["sum"].device)
        # Row i of "sum" runs over both ends of every pair: twice as many terms as there are pairs.
        terms = self._sums["count"].clone()
        terms[1:] *= 2
        terms = terms[:, None]
        moved._sums["sum"] = self._sums["sum"] + terms * delta
        moved._sums["square"] = self._sums["square"] + 2 * delta * self._sums["sum"] + terms * delta.square()
        return moved

    def compute(self) -> dict[str, dict[int, float]]:
        """The three metrics of the class docstring, each by lag."""
        out: dict[str, dict[int, float]] = {
            "relative_difference": {},
            "relative_difference_per_feature": {},
            "autocorrelation": {},
        }
        if self._shift is None:
            return {name: dict.fromkeys(self.lags, 0.0) for name in out}
        energy, differences = self._get("energy"), self._get("differences")
        correlation = self.autocorrelation_per_feature()
        for i, lag in enumerate(self.lags, start=1):
            difference = differences[i - 1]
            out["relative_difference"][lag] = ratio(difference.sum(), energy[i].sum())
            per_feature = difference / energy[i]
            out["relative_difference_per_feature"][lag] = mean_where(per_feature, energy[i] > 0)
            out["autocorrelation"][lag] = mean_where(correlation[i - 1], ~correlation[i - 1].isnan())
        return out

    @property
    def reported(self) -> tuple[int, ...]:
        """The lags that have a pair, and those of `CURVE_LAGS`, which may have none."""
        pairs = self._get("count")[1:].tolist() if self._shift is not None else [0] * len(self.lags)
        return tuple(lag for lag, n in zip(self.lags, pairs, strict=True) if n or lag in CURVE_LAGS)

    def autocorrelation_per_feature(self) -> Tensor:
        """`autocorrelation` of each feature: [lags, d_sae] float64 on the CPU, NaN where undefined.

        Raises ValueError if no position was counted.
        """
        if self._shift is None:
            raise ValueError("no position has been counted; call update first")
        count, energy = self._get("count"), self._get("energy")
        total, square, differences = self._get("sum"), self._get("square"), self._get("differences")
        mean = total[0] / count[0]
        variance = square[0] / count[0] - mean.square()
        varying = variance > 1e-10 * energy[0] / count[0]
        pairs = count[1:, None]  # [lags, 1]
        product = (square[1:] - differences) / 2  # sum over pairs of y_t y_u
        covariance = product - mean * total[1:] + pairs * mean.square()
        return torch.where(varying & (pairs > 0), covariance / (pairs * variance), torch.nan)


class FeaturePersistence(NamedTuple):
    """Switching statistics of each feature, [d_sae] float64 on the CPU; NaN where undefined."""

    active: Tensor
    """Positions at which the feature is on."""
    density: Tensor
    """Fraction of counted positions at which it is on."""
    stays: Tensor
    """P(on at t + 1 | on at t)."""
    excess: Tensor
    """The same corrected for chance: (stays - density) / (1 - density); 0 for a feature that is always on."""
    dwell: Tensor
    """Mean length in tokens of a run of activations. Runs end at the segment's end, which cuts long ones short."""


class Persistence(Accumulator):
    """Does an active feature stay active on the next token? Sums over the pairs (t, t + 1).

    persistence         P(on at t + 1 | on at t), pooled over features and pairs
    persistence_excess  mean over features with at least 20 activations of (P(on | on) - p) / (1 - p), p being
                        the fraction of counted positions at which the feature is on: 0 for a feature that is
                        on at random and, by definition, for one that is always on
    transitions         rates of on_on, on_off, off_on, off_off over all pairs and features, dead ones
                        included; they sum to 1

    A value is 0.0 if there is nothing to average; without a pair the four rates are 0. A feature whose activations
    start no pair has no P(on | on) and is left out of the excess.
    """

    def update(self, on: Tensor, segments: Tensor) -> None:
        """on: [B, T, d_sae] floating point, 1 where active, 0 elsewhere; segments: [B, T] integers."""
        mask = pair_mask(segments, 1).to(on.dtype)  # [B, T - 1]
        weights = on.new_zeros((3, *segments.shape))
        weights[0] = segments >= 0
        weights[1, :, :-1] = mask
        weights[2, :, 1:] = mask
        self._add("on", weights.flatten(1) @ on.flatten(0, 1))  # [3, d_sae]: any, first, second of a pair
        both = on[:, 1:] * on[:, :-1]
        self._add("both", mask.flatten() @ both.flatten(0, 1))
        self._add("count", torch.stack([weights[0].sum(), mask.sum()]))

    def update_features(self, h: Tensor, segments: Tensor) -> None:
        """`update` with features that are on where h > 0.

        h: [B, T, d_sae] floating point, any value at excluded positions; segments: [B, T] integers.
        """
        for rows in row_chunks(h):
            part = _counted(h[rows], segments[rows])
            self.update((part > 0).to(part.dtype), segments[rows])

    def excess(self) -> float:
        """`persistence_excess`."""
        if "on" not in self._sums:
            return 0.0
        features = self.per_feature()
        return mean_where(features.excess, (features.active >= MIN_ACTIVATIONS) & ~features.excess.isnan())

    def per_feature(self) -> FeaturePersistence:
        """The statistics of each feature behind `persistence` and `persistence_excess`.

        Raises ValueError if no position was counted.
        """
        if "on" not in self._sums:
            raise ValueError("no position has been counted; call update first")
        active, first, _ = self._get("on")
        both = self._get("both")
        density = active / self._get("count")[0]
        stays = both / first  # NaN for 0 / 0
        excess = torch.where(density < 1, (stays - density) / (1 - density), stays * 0)
        return FeaturePersistence(active, density, stays, excess, active / (active - both))

    def compute(self) -> dict[str, float | dict[str, float]]:
        """The metrics of the class docstring."""
        if "on" not in self._sums:
            rates = dict.fromkeys(("on_on", "on_off", "off_on", "off_off"), 0.0)
            return {"persistence": 0.0, "persistence_excess": 0.0, "transitions": rates}
        _, first, second = self._get("on").sum(dim=1)
        both = self._get("both").sum()
        cells = self._get("count")[1] * self._get("both").numel()
        return {
            "persistence": ratio(both, first),
            "persistence_excess": self.excess(),
            "transitions": {
                "on_on": ratio(both, cells),
                "on_off": ratio(first - both, cells),
                "off_on": ratio(second - both, cells),
                "off_off": ratio(cells - first - second + both, cells),
            },
        }


class Smoothness(Accumulator):
    """Smoothness of T-SAE (arXiv 2511.05541): lower is smoother.

    The mean, over all pairs of a sequence and a feature active in it, of

        max_t |h_{t+1} - h_t| / |x_{t+1} - x_t|_2

    (The authors' code, `lipschitz_cont`, averages over features within a sequence and then over sequences, and has no
    segments.) A row is one sequence. The maximum is over its within-segment pairs with x_{t+1} != x_t; active means on
    at either end of such a pair. 0.0 if there is no such sequence and feature.
    """

    def update(self, h: Tensor, on: Tensor, x: Tensor, segments: Tensor) -> None:
        """h, on: [B, T, d_sae]; x: [B, T, d]; segments: [B, T] integers."""
        if h.shape[1] < 2:
            return
        distance = (x[:, 1:] - x[:, :-1]).norm(dim=-1).to(h.dtype)  # [B, T - 1]
        pairs = pair_mask(segments, 1) & (distance > 0)
        scale = torch.where(pairs, 1 / distance, 0)
        steepest = (h[:, 1:] - h[:, :-1]).abs_().mul_(scale[..., None]).amax(dim=1)  # [B, d_sae]
        used = h.new_zeros(segments.shape)
        used[:, :-1] += pairs
        used[:, 1:] += pairs
        active = (used[:, None, :] @ on).squeeze(1) > 0  # [B, d_sae]
        self._add("steepest", torch.where(active, steepest, 0).sum(dtype=torch.float64))
        self._add("count", active.sum())

    def compute(self) -> float:
        """The metric of the class docstring, in units of features per unit of activations."""
        return ratio(self._get("steepest"), self._get("count"))


class TemporalMetrics:
    """All temporal metrics of an evaluation set except the shuffled control.

    length: of its sequences, which decides the lags (`lags_at`)
    """

    def __init__(self, length: int = 128) -> None:
        self.lags = LagStatistics(lags_at(length))
        self.persistence = Persistence()
        self.smoothness = Smoothness()

    def update(self, x: Tensor, h: Tensor, segments: Tensor) -> None:
        """Count one batch.

        x:        [B, T, d] the autoencoder's input
        h:        [B, T, d_sae] feature activations; computed in float32 (float64 if h is)
        segments: [B, T] integers, negative = excluded
        """
        for rows in row_chunks(h):
            part, ids = _counted(h[rows], segments[rows]), segments[rows]
            on = (part > 0).to(part.dtype)
            self.lags.update(part, ids)
            self.persistence.update(on, ids)
            self.smoothness.update(part, on, x[rows], ids)

    def merge(self, other: TemporalMetrics) -> None:
        """Add the sums of `other`, over other batches and the same autoencoder."""
        self.lags.merge(other.lags)
        self.persistence.merge(other.persistence)
        self.smoothness.merge(other.smoothness)

    def compute(self) -> dict[str, float | dict[str, float]]:
        """The `temporal` object of eval.json without `persistence_excess_shuffled`; lags are string keys.

        Lags are those of `LagStatistics.reported`; the relative difference has `DIFFERENCE_LAGS` and further powers
        of 4.
        """
        lags, reported = self.lags.compute(), self.lags.reported
        differences = [lag for lag in reported if _has_difference(lag)]
        return {
            **{
                name: {str(lag): lags[name][lag] for lag in differences}
                for name in ("relative_difference", "relative_difference_per_feature")
            },
            "autocorrelation": {str(lag): lags["autocorrelation"][lag] for lag in reported},
            **self.persistence.compute(),
            "smoothness": self.smoothness.compute(),
        }


def shuffle_within_segments(x: Tensor, segments: Tensor, generator: torch.Generator) -> Tensor:
    """Permute the positions within each segment at random; excluded positions stay in place.

    x:         [B, T, d]
    segments:  [B, T] integers, negative = excluded
    generator: on the CPU, so that a seed gives the same permutation on every device
    """
    B, T = segments.shape
    key = torch.rand((B, T), generator=generator, dtype=torch.float64).to(segments.device)
    place = torch.arange(T, device=segments.device, dtype=torch.float64) / T
    key = torch.where(segments >= 0, key, place)
    # Runs are numbered along T and keys are below 1, so sorting keeps every position in its run.
    order = (segment_runs(segments) + key).argsort(dim=1)  # [B, T]
    return x.gather(1, order.to(x.device)[..., None].expand_as(x))


def _counted(h: Tensor, segments: Tensor) -> Tensor:
    """h in at least float32, with excluded positions (even NaN) set to 0."""
    h = h if h.dtype == torch.float64 else h.to(torch.float32)
    excluded = segments < 0
    return h.masked_fill(excluded[..., None], 0) if bool(excluded.any()) else h
