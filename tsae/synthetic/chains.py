"""Activations with known features: hidden two-state Markov chains, noisy emissions, random directions.

The generative model is that of the temporal crosscoders' denoising benchmark (OpenReview JfN7nRdBxA: 40 features,
d = 80, pi = 0.15, emission 0.625). Feature j has a hidden state z, a two-state Markov chain with density `pi` and
autocorrelation `rho` per token:

    P(on | on) = rho + pi (1 - rho)         P(on | off) = pi (1 - rho)

It is observed with probability `emission` where z is on, and never where z is off: s = z Bernoulli(emission). Where it
is observed its amplitude a is drawn from N(1, 0.15^2), at least 0, elsewhere a = 0; and x = sum_j a_j f_j, with unit
directions f_j drawn uniformly. docs/synthetic.md says what follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

AMPLITUDE, SPREAD = 1.0, 0.15  # mean and standard deviation of an observed amplitude


class Chain(NamedTuple):
    """Hidden chains and their emissions; [n] each.

    pi: P(hidden state on)
    rho: autocorrelation of the hidden state from one token to the next, in [0, 1)
    emission: P(observed | hidden state on)
    false_rate: P(observed | hidden state off); 0 in made-up activations, above 0 for what an autoencoder observes
    """

    pi: Tensor
    rho: Tensor
    emission: Tensor
    false_rate: Tensor

    @classmethod
    def of(cls, pi: float, rhos: list[float], emission: float) -> Chain:
        """A chain for each of ``rhos``; float64."""
        rho = torch.tensor(rhos, dtype=torch.float64)
        return cls(torch.full_like(rho, pi), rho, torch.full_like(rho, emission), torch.zeros_like(rho))

    @property
    def on_after_on(self) -> Tensor:
        """P(on at t + 1 | on at t) of the hidden state."""
        return self.rho + self.pi * (1 - self.rho)

    @property
    def on_after_off(self) -> Tensor:
        """P(on at t + 1 | off at t) of the hidden state."""
        return self.pi * (1 - self.rho)

    @property
    def dwell(self) -> Tensor:
        """Mean length in tokens of a run of the hidden state on, within a segment."""
        return 1 / (1 - self.on_after_on)

    @property
    def observed_correlation(self) -> Tensor:
        """Correlation of the observed with the hidden state, for a false rate of 0."""
        return (self.emission * (1 - self.pi) / (1 - self.emission * self.pi)).sqrt()


def rho_for(dwell: float, pi: float) -> float:
    """The autocorrelation of a hidden state with density ``pi`` and a mean dwell time of ``dwell`` tokens.

    Negative if the dwell time is below 1 / (1 - pi), that of independent draws.
    """
    return 1 - 1 / (dwell * (1 - pi))


class Truth(NamedTuple):
    """A batch of activations and what they consist of.

    x: [B, T, d] float32
    segments: [B, T] int32; the hidden states of two segments are independent
    hidden: [B, T, n] bool
    amplitude: [B, T, n] float32, 0 where the feature is not observed
    """

    x: Tensor
    segments: Tensor
    hidden: Tensor
    amplitude: Tensor


@dataclass
class Source:
    """Streams of made-up activations, functions of their seeds.

    chain: the features'
    width: d, of the activations
    segment: mean tokens per segment; a new one begins with probability 1 / segment at every token
    seed: of the directions
    """

    chain: Chain
    width: int
    segment: float
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randn(self.features, self.width, generator=generator)
        self.directions = functional.normalize(rows, dim=1)  # [n, d]

    @property
    def features(self) -> int:
        """The number n of features."""
        return len(self.chain.pi)

    @property
    def observed_l0(self) -> float:
        """Expected number of features observed at a token."""
        return float((self.chain.pi * self.chain.emission).sum())

    def batches(self, count: int, batch: int, length: int, seed: int) -> Iterator[Truth]:
        """``count`` batches of ``batch`` sequences of ``length`` tokens. Other seeds give independent streams."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield self._draw((batch, length, self.features), generator)

    def _draw(self, shape: tuple[int, int, int], generator: torch.Generator) -> Truth:
        starts = torch.rand(shape[:2], generator=generator) < 1 / self.segment
        starts[:, 0] = True
        pi, rho, emission, _ = (each.float() for each in self.chain)
        # A chain with autocorrelation rho keeps its state with probability rho and draws it anew otherwise.
        drawn = torch.rand(shape, generator=generator) < pi
        anew = (torch.rand(shape, generator=generator) >= rho) | starts[..., None]
        times = torch.arange(shape[1], dtype=torch.int32)[:, None]
        latest = torch.where(anew, times, 0).cummax(1).values  # the token of the latest draw
        hidden = drawn.gather(1, latest.long())
        emitted = torch.rand(shape, generator=generator) < emission
        amplitude = (AMPLITUDE + SPREAD * torch.randn(shape, generator=generator)).clamp_(min=0) * (hidden & emitted)
        return Truth(amplitude @ self.directions, starts.cumsum(1).int(), hidden, amplitude)
