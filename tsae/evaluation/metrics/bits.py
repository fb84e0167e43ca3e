"""Bits per token of an autoencoder's features: `support_bits`, `amplitude_bits` and their sum.

An autoencoder is a code for activations (MDL-SAEs, Ayonrinde et al. 2024, arXiv 2410.11179, for single tokens): which
features are on, and how strongly. Along the sequence a feature that lasts is cheap, because it is predictable. The
model of the code is counted on one half of the tokens and charged on the other, in both directions, so that nothing is
fitted where it is judged. docs/metrics.md derives the formulas and says what the figures depend on.

`h` is the feature activations, [B, T, d_sae]; a feature is on where h > 0, and only values above 0 are coded, so
features with values below 0 have no code length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.evaluation.metrics.accumulator import Accumulator, pair_mask, ratio, row_chunks

# Residuals of quantized values are counted in bins: exact below 16, then 8 bins per octave.
_LARGEST = 2**40
_EDGES = torch.cat([torch.arange(16), *(2**octave + 2**octave // 8 * torch.arange(8) for octave in range(4, 41))])
_WIDTHS = torch.cat([_EDGES.diff(), torch.tensor([2**41 - int(_EDGES[-1])])])
_BINS = len(_EDGES)
# Features of one class have residuals of about one scale, 2^(class / 2).
_CLASSES = (-24, 60)
_PRIOR = 16  # values that the prior of a class's histogram counts for
_SHRINK = 8  # values that shrink a feature's prediction toward no use of the previous value


class Rates(NamedTuple):
    """Probabilities that code the support, [d_sae] float64 on the CPU, each in (0, 1)."""

    density: Tensor
    """P(on), of a position without a predecessor."""
    on_after_off: Tensor
    """P(on at t + 1 | off at t)."""
    on_after_on: Tensor
    """P(on at t + 1 | on at t)."""


class CodeLength(Accumulator):
    """Code length of features, in bits per token.

    Every position is in half 0 or half 1; what is counted in one half is charged in the other, and the charges of both
    are added and divided by their number of positions.

    support_bits             each feature is a two-state Markov chain: a position with a predecessor in its segment and
                             half costs -log2 of the transition's probability, any other -log2 of the stationary one
    support_bits_memoryless  every position costs -log2 of the stationary probability
    amplitude_bits           active values, quantized in steps of the reconstruction: entropy coding of what a linear
                             prediction from the feature's previous value leaves, or its mean if it was off
    total_bits               support_bits + amplitude_bits

    A probability is (count + pooled rate) / (trials + 1), the pooled rate being that of all features: one observation
    of an average feature. So no event costs infinitely many bits, and with N positions in a half a dead feature costs
    about 1.44 L0 / (d_sae N) bits per token, and one that is always on at most 1.45 / N.

    Memory: 8 integers a feature, and 12 bytes an active value: 0.5 kB a token at L0 = 40, 5 GB for 10 million tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        # Of each active value: feature + d_sae * half (int32), the value, and the value at t - 1, 0 if off or none.
        self._active: list[tuple[Tensor, Tensor, Tensor]] = []
        self.d_sae = 0
        """Features; 0 before the first batch."""

    def update(self, h: Tensor, segments: Tensor, half: Tensor | int) -> None:
        """Count one batch, of any length T.

        h:        [B, T, d_sae] floating point, any value at excluded positions
        segments: [B, T] integers, negative = excluded
        half:     0 or 1; one number, or [B, T] integers
        """
        half = torch.as_tensor(half, device=segments.device).expand(segments.shape)
        self.d_sae = h.shape[2]
        for rows in row_chunks(h):
            self._update(h[rows], segments[rows], half[rows])

    def _update(self, h: Tensor, segments: Tensor, half: Tensor) -> None:
        d_sae, counted = h.shape[2], segments >= 0
        pairs = pair_mask(torch.where(counted, 2 * segments + half, -1), 1)  # [B, T - 1]
        first, second = torch.zeros_like(counted), torch.zeros_like(counted)
        first[:, : pairs.shape[1]] = pairs
        second[:, 1:] = pairs
        on, below = h > 0, h < 0
        if not bool(counted.all()):
            on &= counted[..., None]
            below &= counted[..., None]
        self._add("below", below.any())
        place = on.flatten().nonzero().squeeze(1)  # of the active values, [n]
        position, flat = place // d_sae, h.flatten()
        value, before = flat[place].float(), flat[(place - d_sae).clamp(min=0)].float()
        before = torch.where(second.flatten()[position] & (before > 0), before, 0)
        column = place % d_sae + d_sae * half.flatten()[position]
        for name, which in (
            ("active", slice(None)),
            ("first", first.flatten()[position]),
            ("second", second.flatten()[position]),
            ("both", before > 0),
        ):
            self._add(name, torch.bincount(column[which], minlength=2 * d_sae).view(2, d_sae))
        for name, mask in (("positions", counted), ("pairs", second)):
            self._add(name, torch.stack([(mask & (half == side)).sum() for side in (0, 1)])[:, None])  # [2, 1]
        self._active.append((column.to("cpu", torch.int32), value.cpu(), before.cpu()))

    def merge(self, other: Accumulator) -> None:
        """Add the counts of `other`, over other batches and the same autoencoder."""
        super().merge(other)
        if isinstance(other, CodeLength):
            self._active += other._active
            self.d_sae = max(self.d_sae, other.d_sae)

    def rates(self, half: int) -> Rates:
        """The probabilities counted in one half, which code the support of the other."""
        return Rates(*(_probability(on[half], trials[half]) for on, trials in self._events()))

    def support(self) -> tuple[float, float]:
        """`support_bits` and `support_bits_memoryless`; 0.0 if no position was counted."""
        tokens = float(self._get("positions").sum())
        if tokens == 0:
            return 0.0, 0.0
        (active, positions), after_off, after_on = self._events()
        starts = active - self._get("second"), positions - self._get("pairs")
        support = memoryless = 0.0
        for charged, counted in ((0, 1), (1, 0)):
            rates = self.rates(counted)
            for (on, trials), rate in zip((starts, after_off, after_on), rates, strict=True):
                support += _charge(on[charged], trials[charged], rate)
            memoryless += _charge(active[charged], positions[charged], rates.density)
        return support / tokens, memoryless / tokens

    def amplitude(self, step: float, norms: Tensor) -> float:
        """`amplitude_bits`; 0.0 if nothing is on or the step is 0, NaN if a value or the step is not finite.

        step:  of the quantization, in the units of the reconstruction; a feature's value times its norm is quantized
        norms: [d_sae] L2 norms of the decoder's rows; features that reconstruct nothing (norm 0) cost nothing
        """
        if not self._active or step == 0:
            return 0.0
        if not (math.isfinite(step) and bool(norms.isfinite().all()) and self._finite()):
            return math.nan
        bits = 0.0
        for first, second in self._levels(step, norms):
            bits += _AmplitudeCode(first, self.d_sae).bits(second) + _AmplitudeCode(second, self.d_sae).bits(first)
        return ratio(bits, self._get("positions").sum())

    def _finite(self) -> bool:
        return all(bool(value.isfinite().all()) for _, value, _ in self._active)

    def _levels(self, step: float, norms: Tensor) -> Iterator[tuple[_Levels, _Levels]]:
        """The active values of both halves, quantized: first where the feature was off before, then where it was on."""
        column, value, before = (torch.cat(each) for each in zip(*self._active, strict=True))
        self._active = [(column, value, before)]
        scale = (norms.detach().double().cpu() / step).repeat(2)
        for lasts in (False, True):
            halves = []
            for side in (0, 1):
                index = ((before > 0) == lasts).logical_and_((column >= self.d_sae) == bool(side)).nonzero().squeeze(1)
                owner = column[index].long()
                levels = (quantize(numbers[index], scale[owner]) for numbers in (value, before))
                halves.append(_Levels(owner % self.d_sae, *levels))
            yield halves[0], halves[1]

    def compute(self, step: float, norms: Tensor) -> dict[str, float]:
        """The four metrics of the class docstring; none if a value was below 0. step, norms: as in `amplitude`."""
        if self._get("below") > 0:
            return {}
        support, memoryless = self.support()
        amplitude = self.amplitude(step, norms)
        return {
            "support_bits": support,
            "support_bits_memoryless": memoryless,
            "amplitude_bits": amplitude,
            "total_bits": support + amplitude,
        }

    def _events(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Times on, and trials: of all positions, after off, after on. [2, d_sae] and [2, d_sae] or [2, 1]."""
        active, first, second, both = (self._get(name) for name in ("active", "first", "second", "both"))
        return (active, self._get("positions")), (second - both, self._get("pairs") - first), (both, first)


def _probability(on: Tensor, trials: Tensor) -> Tensor:
    """P(on) of each feature, [d_sae]: its counts and one observation of the pooled rate."""
    trials = trials.expand_as(on)
    pooled = (on.sum() + 0.5) / (trials.sum() + 1)
    return (on + pooled) / (trials + 1)


def _charge(on: Tensor, trials: Tensor, rate: Tensor) -> float:
    """Bits of `on` ones among `trials` coded with probability `rate`."""
    return float(-(on * rate.log2() + (trials - on) * torch.log1p(-rate) / math.log(2)).sum())


class _Levels(NamedTuple):
    """Quantized active values, int64 [n]."""

    feature: Tensor
    value: Tensor
    before: Tensor
    """The same feature's value at the position before; 0 if it was off."""


def quantize(values: Tensor, scale: Tensor) -> Tensor:
    """Levels, int64, of active values: value times scale, the norm of its decoder row over the step, rounded."""
    return (values.double() * scale).clamp_(max=_LARGEST / 2).round_().long()


class _AmplitudeCode:
    """A code for quantized active values, fitted to the `counted` ones."""

    def __init__(self, counted: _Levels, d_sae: int) -> None:
        self.prediction = _Prediction(counted, d_sae)
        residuals = self.prediction.residual(counted)
        self.kind = _scale_class(counted.feature, residuals, d_sae)
        """The class of each feature, [d_sae]."""
        self.cost = _costs(_histogram(self.kind[counted.feature], residuals))
        """Bits of a residual by class, sign and bin: [classes, 2, bins]."""

    def bits(self, charged: _Levels) -> float:
        """The length of the code of the `charged` values."""
        observed = _histogram(self.kind[charged.feature], self.prediction.residual(charged))
        present = observed > 0
        return float((observed[present] * self.cost[present]).sum())


class _Prediction:
    """A feature's value from the one before, m + a (before - b) with 0 <= a <= 1, fitted by least squares.

    a = 0 codes values directly and a = 1 differences; few values shrink a toward 0. Features without values have the
    median of all values for m.
    """

    def __init__(self, levels: _Levels, d_sae: int) -> None:
        feature, value, before = levels.feature, levels.value.double(), levels.before.double()

        def total(numbers: Tensor) -> Tensor:
            return torch.zeros(d_sae, dtype=torch.float64).index_add_(0, feature, numbers)

        n = torch.bincount(feature, minlength=d_sae).double()
        typical = float(value.median()) if len(value) else 0.0
        self.mean = torch.where(n > 0, total(value) / n, typical)
        self.mean_before = torch.where(n > 0, total(before) / n, typical)
        y = before - self.mean_before[feature]
        spread = total(y.square())
        slope = torch.where(spread > 0, total(y * (value - self.mean[feature])) / spread, 0)
        self.slope = (slope * n / (n + _SHRINK)).clamp(0, 1)

    def residual(self, levels: _Levels) -> Tensor:
        """The value less its prediction: [n] int64."""
        return levels.value - self.expected(levels.feature, levels.before)

    def expected(self, feature: Tensor, before: Tensor) -> Tensor:
        """The prediction of a feature's level from the one before, rounded: [n] int64."""
        shift = self.slope[feature] * (before - self.mean_before[feature])
        return (self.mean[feature] + shift).round_().long()


def _scale_class(feature: Tensor, residual: Tensor, d_sae: int) -> Tensor:
    """Class of each feature, [d_sae] from 0: two per octave of its mean residual, to which one typical one is added."""
    size = residual.abs().double()
    typical = max(float(size.median()), 1.0) if len(size) else 1.0
    n = torch.bincount(feature, minlength=d_sae)
    total = torch.zeros(d_sae, dtype=torch.float64).index_add_(0, feature, size)
    scale = (total + typical) / (n + 1)
    return (2 * scale.log2()).round_().clamp_(*_CLASSES).long() - _CLASSES[0]


def _histogram(kind: Tensor, residual: Tensor) -> Tensor:
    """Counts of residuals by class, sign and bin: [classes, 2, bins] float64."""
    bins = torch.bucketize(residual.abs(), _EDGES, right=True) - 1
    cell = (2 * kind + (residual < 0)) * _BINS + bins
    classes = _CLASSES[1] - _CLASSES[0] + 1
    return torch.bincount(cell, minlength=classes * 2 * _BINS).double().view(classes, 2, _BINS)


def _costs(counts: Tensor) -> Tensor:
    """Bits of one residual by class, sign and bin, from the counts: [classes, 2, bins].

    A class's counts are smoothed by 16 values of a prior with its scale s and heavy tails, P(|r| >= m) = s / (s + m).
    Residuals of one bin are equally likely.
    """
    scale = 2.0 ** (torch.arange(_CLASSES[0], _CLASSES[1] + 1, dtype=torch.float64) / 2)[:, None]  # [classes, 1]
    tail = scale / (scale + torch.cat([_EDGES, _EDGES[-1:] + _WIDTHS[-1:]]))  # [classes, bins + 1]
    prior = (tail[:, :-1] - tail[:, 1:])[:, None].repeat(1, 2, 1) / 2
    prior[:, 0, 0] *= 2
    prior[:, 1, 0] = 0  # 0 has no sign
    share = (counts + _PRIOR * prior) / (counts.sum(dim=(1, 2), keepdim=True) + _PRIOR)
    return -(share / _WIDTHS).log2()
