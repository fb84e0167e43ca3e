"""Thresholds from what a switch costs in bits: the activation `rate`.

A feature's support along the sequence is coded as a two-state Markov chain, with

    p01 = P(on at t + 1 | off at t),    p11 = P(on at t + 1 | on at t).

Being on at t costs, against being off, -log2 of the ratio of both probabilities given the state at t - 1, plus a bits
for the amplitude. With decoder rows of norm 1, a feature of pre-activation z lowers the squared error by about z^2. A
decision that knows the state before and the rates has

    on^2      = lambda c01,  c01 = log2((1 - p01) / p01) + a      from off
    release^2 = lambda c11,  c11 = log2((1 - p11) / p11) + a      from on

which is a Schmitt trigger with thresholds per feature (docs/mathematics.md, section 9). What the state saves at t + 1
is left out. Thresholds use the rates of `decision_rates`, which bounds those of rare features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae.parallel.axis import SINGLE_PROCESS, Axis

MEMORY = 200  # steps over which counts are averaged
# A feature without counts has these rates, as if it had been seen at so many positions.
_PRIOR_ON_AFTER_OFF = (0.013, 2000.0)
_PRIOR_ON_AFTER_ON = (0.3, 20.0)
# Of the mean density: the lower bound of p01, and the weight of the common p11, in thresholds.
_RAREST, _COMMON = 0.5, 4.0
_MOST = 1 - 2.0**-20  # of a probability, so that its odds are finite in float32
_LEAST = 0.05  # bits: lower bound of c01, so that an always-on feature keeps a threshold


class SwitchCosts(NamedTuple):
    """Bits that being on costs against being off, (d_sae), for the two states at t - 1."""

    from_off: Tensor
    from_on: Tensor
    """At least 0 and at most ``from_off``."""


def decision_rates(
    rates: Tensor, amplitude_bits: float, release_ratio: float, features: Axis = SINGLE_PROCESS.features
) -> Tensor:
    """The rates that decide when a feature is on: its own, drawn towards common ones the rarer it is.

    With m the mean over features of the stationary density d = p01 / (1 - p11 + p01), about the mean L0 / d_sae:

        p01' = max(p01, m / 2)
        p11' = (d p11 + 4 m P) / (d + 4 m),   log2((1 - P) / P) + a = release_ratio^2 (log2((1 - p01') / p01') + a)

    Without the bound, a feature that is seldom on gets a higher threshold, is on still less often, and dies. P alone
    would give a release of ``release_ratio`` times the threshold.

    rates: (2, d_sae) or a shard of it, p01 and p11, each in (0, 1); a p11 below p01 counts as p01
    amplitude_bits: a, at least 0; release_ratio: in [0, 1]
    features: the axis that d_sae is divided over
    out: (2, d_sae), as ``rates``, with p11 at least p01
    """
    p01, p11 = rates[0], torch.maximum(rates[0], rates[1])
    density = p01 / (1 - p11 + p01)
    mean = features.sum_no_grad(density.sum()) / (density.numel() * features.size)
    p01, weight = torch.maximum(p01, _RAREST * mean), _COMMON * mean
    bits = release_ratio**2 * (torch.log2((1 - p01) / p01) + amplitude_bits) - amplitude_bits
    common = (1 / (1 + torch.exp2(bits))).clamp(max=_MOST)
    p11 = (density * p11 + weight * common) / (density + weight)
    return torch.stack([p01, torch.maximum(p01, p11)])


def switch_costs(rates: Tensor, amplitude_bits: float) -> SwitchCosts:
    """c01 and c11 of the module's docstring.

    rates: (2, d_sae), p01 and p11, each in (0, 1); a p11 below p01 counts as p01
    amplitude_bits: a, at least 0
    """
    p01, p11 = rates[0], torch.maximum(rates[0], rates[1])
    from_off = torch.log2((1 - p01) / p01) + amplitude_bits
    from_on = torch.log2((1 - p11) / p11) + amplitude_bits
    from_off = from_off.clamp(min=_LEAST)
    return SwitchCosts(from_off, torch.minimum(from_on.clamp(min=0.0), from_off))


def path_costs(rates: Tensor, amplitude_bits: float) -> tuple[Tensor, Tensor]:
    """Bits of every transition and start, for `tsae_kernels.viterbi_path`.

    rates, amplitude_bits: as in `switch_costs`
    out: (2, 2, d_sae), from state (0 off, 1 on) to state; (2, d_sae), of the state at a segment's start, which has the
        chain's stationary probability
    """
    on = torch.stack([rates[0], torch.maximum(rates[0], rates[1])])  # [2, d_sae], after off and after on
    transitions = torch.stack([-torch.log2(1 - on), -torch.log2(on) + amplitude_bits], dim=1)
    density = on[0] / (1 - on[1] + on[0])
    return transitions, torch.stack([-torch.log2(1 - density), -torch.log2(density) + amplitude_bits])


class TransitionRates:
    """Running estimates of p01 and p11, from the counts of `tsae_kernels.CountedStats`.

    Counts are sums in which those of n steps ago weigh (1 - 1 / 200)^n.

    Args:
        d_sae: features of this process.
        device: of the counts.
    """

    def __init__(self, d_sae: int, device: torch.device | None = None) -> None:
        self.counts = torch.zeros(3, d_sae, device=device)  # on -> on, on -> off, off -> on
        self.pairs = torch.zeros((), device=device)  # of positions
        self.settled = False
        """Whether the rates are those of trained features from the first step on (a warm start)."""

    def start(self, rates: Tensor, pairs: float) -> None:
        """Continue from ``rates`` (2, d_sae) of a trained autoencoder, as if counted over ``pairs`` pairs."""
        p01, p11 = rates
        on = pairs * p01 / (1 - p11 + p01)  # the chain's density
        prior, weight = _PRIOR_ON_AFTER_ON
        both = p11 * (on + weight) - prior * weight
        prior, weight = _PRIOR_ON_AFTER_OFF
        self.counts.copy_(torch.stack([both, on - both, p01 * (pairs - on + weight) - prior * weight]))
        self.pairs.fill_(pairs)
        self.settled = True

    def update(self, counts: Tensor, pairs: Tensor) -> None:
        """Add a step's counts (3, d_sae) over ``pairs`` pairs of positions (a scalar). Does not wait for a device."""
        # In place, as all state that a step changes, so that a CUDA graph of the step finds it where it was.
        self.counts.mul_(1 - 1 / MEMORY).add_(counts)
        self.pairs.mul_(1 - 1 / MEMORY).add_(pairs)

    @property
    def rates(self) -> Tensor:
        """p01 and p11, (2, d_sae)."""
        both, ends, begins = self.counts
        off = self.pairs - both - ends
        after_off = _smoothed(begins, off, *_PRIOR_ON_AFTER_OFF)
        return torch.stack([after_off, _smoothed(both, both + ends, *_PRIOR_ON_AFTER_ON)])

    @property
    def active_pairs(self) -> Tensor:
        """Pairs in which each feature is on at one end or both, (d_sae)."""
        return self.counts.sum(0).clamp(min=0)

    def support_bits(self, counts: Tensor, pairs: Tensor) -> Tensor:
        """Bits per token of the support with these ``counts`` (3, d_sae) in the code of the running rates; a scalar."""
        both, ends, begins = counts
        p01, p11 = self.rates
        off = pairs - both - ends
        nats = both * p11.log() + ends * torch.log1p(-p11) + begins * p01.log() + (off - begins) * torch.log1p(-p01)
        return -nats.sum() / torch.log(torch.tensor(2.0)) / pairs.clamp(min=1)

    def state_dict(self) -> dict[str, Tensor]:
        """The state to resume from."""
        return {"counts": self.counts, "pairs": self.pairs, "settled": torch.tensor(self.settled)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from a `state_dict`."""
        self.counts, self.pairs = state["counts"].clone(), state["pairs"].clone()
        self.settled = bool(state["settled"])


def _smoothed(events: Tensor, trials: Tensor, rate: float, weight: float) -> Tensor:
    return (events + rate * weight) / (trials + weight)
