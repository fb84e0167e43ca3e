"""Posteriors of hidden states: the causal filter and the forward-backward smoother of a two-state chain, both exact.

Among all functions of the same observations the posterior, a conditional mean, is the one that correlates most with
the state. All that x says of the states is in the amplitudes, and of those in the observed supports; so with the true
supports and parameters, its correlation is the ceiling of every method that reads x, causal (`filter_states`) or not
(`smooth_states`). With linearly independent directions, n <= d, the amplitudes can be read off x and the ceiling can
be reached; with more features than dimensions it is an upper bound.

`observed` is [B, T, n] bool, `segments` [B, T]; states are drawn anew from their stationary distribution wherever the
segment changes. Posteriors are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.synthetic.chains import Chain

_LEAST = 1e-9  # a probability of observations, at least; so that likelihood ratios are finite


def filter_states(observed: Tensor, segments: Tensor, chain: Chain) -> Tensor:
    """P(on at t | observations of the segment up to t), [B, T, n]: the forward algorithm."""
    return _forward(likelihood_ratio(observed, chain), starts_of(segments), chain)


def smooth_states(observed: Tensor, segments: Tensor, chain: Chain) -> Tensor:
    """P(on at t | all observations of the segment), [B, T, n]: forward-backward."""
    ratio, starts = likelihood_ratio(observed, chain), starts_of(segments)
    return updated(_forward(ratio, starts, chain), backward_ratios(ratio, starts, chain))


def backward_ratios(ratio: Tensor, starts: Tensor, chain: Chain) -> Tensor:
    """P(later observations of the segment | on at t) / P(... | off at t), [B, T, n].

    ratio: from `likelihood_ratio`; starts: from `starts_of`
    """
    to_on, to_off = chain.on_after_on.float(), chain.on_after_off.float()
    out = torch.ones_like(ratio)
    for t in range(ratio.shape[1] - 1, 0, -1):
        likelihood = ratio[:, t] * out[:, t] - 1
        future = (1 + to_on * likelihood) / (1 + to_off * likelihood)
        out[:, t - 1] = future.masked_fill(starts[:, t, None], 1.0)
    return out


def likelihood_ratio(observed: Tensor, chain: Chain) -> Tensor:
    """P(observation | on) / P(observation | off) of every token, [B, T, n] float32."""
    emission = chain.emission.clamp(_LEAST, 1 - _LEAST)
    false_rate = chain.false_rate.clamp(_LEAST, 1 - _LEAST)
    present, absent = emission / false_rate, (1 - emission) / (1 - false_rate)
    return torch.where(observed, present.float(), absent.float())


def _forward(ratio: Tensor, starts: Tensor, chain: Chain) -> Tensor:
    prior, rho, to_off = chain.pi.float(), chain.rho.float(), chain.on_after_off.float()
    out = torch.empty_like(ratio)
    state = torch.zeros_like(ratio[:, 0])
    for t in range(ratio.shape[1]):
        predicted = torch.where(starts[:, t, None], prior, to_off + rho * state)
        state = updated(predicted, ratio[:, t])
        out[:, t] = state
    return out


def updated(probability: Tensor, ratio: Tensor) -> Tensor:
    """The posterior probability of a probability and a likelihood ratio."""
    return probability * ratio / (1 + probability * (ratio - 1))


def starts_of(segments: Tensor) -> Tensor:
    """Where a segment begins, [B, T] bool."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return starts


def leak_for(chain: Chain) -> Tensor:
    """The leak l, [n], of the best linear causal filter v_t = l v_{t-1} + (1 - l) s_t for the hidden state.

    The observed support is emission * z plus white noise and z has the autocorrelation rho^k, so the steady-state
    Kalman filter applies: with q the variance of z's innovations and r that of the noise over emission^2, the error P
    before an observation solves P = rho^2 P r / (P + r) + q, the gain is K = P / (P + r), and l = rho (1 - K).
    """
    pi, rho, emission, _ = chain
    q = pi * (1 - pi) * (1 - rho**2)
    r = (pi * (1 - emission) / emission).clamp(min=1e-12)
    b = r * (1 - rho**2) - q
    before = (-b + (b**2 + 4 * q * r).sqrt()) / 2
    return rho * r / (before + r)


def leaky_mean(values: Tensor, segments: Tensor, leak: Tensor) -> Tensor:
    """v_t = l v_{t-1} + (1 - l) values_t from v = 0 at the start of every segment, [B, T, n]; ``leak`` is [n]."""
    leak, starts = leak.to(values), starts_of(segments)
    out, state = torch.empty_like(values), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1]):
        state = leak * state.masked_fill(starts[:, t, None], 0.0) + (1 - leak) * values[:, t]
        out[:, t] = state
    return out
