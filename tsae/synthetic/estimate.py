"""Chains from observations alone: Baum-Welch for a two-state chain per feature, which needs no label.

The estimate is of a feature's hidden state from when the feature is on: its density, its autocorrelation, how often it
is on while its hidden state is, and how often it is on while that is off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae.evaluation.metrics.accumulator import pair_mask
from tsae.synthetic.bayes import backward_ratios, filter_states, likelihood_ratio, starts_of, updated
from tsae.synthetic.chains import Chain

LAGS = 4  # from which the moments are taken
_WEIGHT = 2.0  # observations that a typical feature counts for
_ROWS = 8  # sequences at a time


def fit_chain(observed: Tensor, segments: Tensor, iterations: int = 5) -> Chain:
    """The chain of each feature.

    observed: [N, T, n] bool; segments: [N, T]
    iterations: of Baum-Welch, from the moments
    out: [n] each, float64; a feature that is never observed gets a density near 0
    """
    chain = chain_from_moments(observed, segments)
    for _ in range(iterations):
        counts = _Counts(*(torch.zeros(len(chain.pi), dtype=torch.float64) for _ in _Counts._fields))
        for first in range(0, len(observed), _ROWS):
            rows = slice(first, first + _ROWS)
            part = _expected(observed[rows], segments[rows], chain)
            counts = _Counts(*(a + b for a, b in zip(counts, part, strict=True)))
        chain = _maximized(counts)
    return chain


def chain_from_moments(observed: Tensor, segments: Tensor) -> Chain:
    """The chain whose density and autocovariances at lags 1 to 4 are those observed, if nothing is observed falsely.

    The mean is m = e pi and the autocovariance at lag k is C_k = e^2 pi (1 - pi) rho^k, so that
    rho = sum C_{k+1} / sum C_k, e = (C_1 / rho + m^2) / m and pi = m / e. Arguments as of `fit_chain`.
    """
    values = observed.flatten(0, 1)
    mean = (values.sum(0).double() + 0.5) / (len(values) + 1)
    covariances = []
    for lag in range(1, LAGS + 1):
        pairs = pair_mask(segments, lag)
        both = (observed[:, lag:] & observed[:, :-lag])[pairs].sum(0).double()
        covariances.append(both / max(int(pairs.sum()), 1) - mean.square())
    total = torch.stack(covariances)
    rho = (total[1:].sum(0) / total[:-1].sum(0).clamp(min=1e-12)).clamp(0.02, 0.995)
    scale = total[:-1].sum(0) / sum(rho**k for k in range(1, LAGS))  # e^2 pi (1 - pi)
    emission = ((scale + mean.square()) / mean).clamp(0.2, 0.98)
    emission = torch.maximum(emission, mean.clamp(max=0.98))
    return Chain(mean / emission, rho, emission, 0.05 * mean)


class _Counts(NamedTuple):
    """Expected counts of the hidden state and of observations, [n] float64."""

    on: Tensor
    on_observed: Tensor
    off: Tensor
    off_observed: Tensor
    from_on: Tensor
    on_on: Tensor
    from_off: Tensor
    off_on: Tensor


def _expected(observed: Tensor, segments: Tensor, chain: Chain) -> _Counts:
    ratio, starts = likelihood_ratio(observed, chain), starts_of(segments)
    filtered = filter_states(observed, segments, chain)
    future = backward_ratios(ratio, starts, chain)
    on = updated(filtered, future)
    # P(on at t, on at t + 1 | all), from what is known at t and what t + 1 and later say.
    before, likelihood = filtered[:, :-1], (ratio * future)[:, 1:]
    to_on, to_off = chain.on_after_on.float(), chain.on_after_off.float()
    on_on, on_off = before * to_on * likelihood, before * (1 - to_on)
    off_on, off_off = (1 - before) * to_off * likelihood, (1 - before) * (1 - to_off)
    inside = ~starts[:, 1:, None] / (on_on + on_off + off_on + off_off)
    seen = observed.float()
    return _Counts(
        *(part.sum((0, 1)).double() for part in (on, on * seen, 1 - on, (1 - on) * seen)),
        *((part * inside).sum((0, 1)).double() for part in (on_on + on_off, on_on, off_on + off_off, off_on)),
    )


def _maximized(counts: _Counts) -> Chain:
    """The chain of (nearly) largest likelihood for the counts, each rate with `_WEIGHT` observations of the pooled one.

    The density is that of all tokens, not the stationary one of the transitions, which a feature that is nearly always
    on or off determines badly.
    """

    def rate(part: Tensor, trials: Tensor) -> Tensor:
        pooled = part.sum() / trials.sum().clamp(min=1e-9)
        return ((part + _WEIGHT * pooled) / (trials + _WEIGHT)).clamp(1e-7, 1 - 1e-4)

    rho = (rate(counts.on_on, counts.from_on) - rate(counts.off_on, counts.from_off)).clamp(min=0)
    emission = rate(counts.on_observed, counts.on)
    false_rate = torch.minimum(rate(counts.off_observed, counts.off), emission / 2)  # on is what is observed more
    return Chain(rate(counts.on, counts.on + counts.off), rho, emission, false_rate)
