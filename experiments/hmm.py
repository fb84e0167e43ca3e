"""A two-state hidden Markov model for each feature of trained autoencoders: the soft limit of the trigger.

    python -m experiments.hmm runs/neighbours/plain-28 runs/neighbours/plain-36 --json docs/results/neighbours-hmm.json
    python experiments/summary.py runs/neighbours docs/results/neighbours-hmm.json

The chains are fitted on as much of a run's training text as its evaluation uses. The run has a plain threshold, and a
feature's state there is whether its pre-activation is above it: the emissions are Gaussian in each state, the
transitions as counted. On held-out text the forward-backward algorithm gives P(on | all tokens of the segment), and a
feature keeps its value where that is above 1/2. The posterior uses later tokens, so this is not causal; `--causal`
has the forward pass alone. The metrics of RUN are listed as RUN@hmm, or RUN@filter.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.neighbours import measure, to_json
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.evaluation.held_out import training_sample
from tsae.evaluation.subject import open_run
from tsae.sae.model import SparseAutoencoder

PRIOR = 20  # observations of a state that the average feature counts for


class Chain(NamedTuple):
    """Emissions and transitions of every feature, [d_sae] each; z is the pre-activation with its bias."""

    mean: tuple[Tensor, Tensor]
    """Of z off and on."""
    std: tuple[Tensor, Tensor]
    density: Tensor
    """P(on) at the start of a segment."""
    on_after_off: Tensor
    on_after_on: Tensor


@torch.no_grad()
def fit(sae: SparseAutoencoder, batches: Iterable[ActivationBatch]) -> Chain:
    """The chain of each feature of an autoencoder, whose threshold says which state its positions are in.

    Means and deviations are in units of the threshold and shrunk to those of all features, probabilities to the rate of
    all features, so that a feature that was never on has some too.

    Raises:
        UserError: the features are not pre-activations above a plain threshold.
    """
    held = sae.cfg.kind.release and bool((sae.release < sae.threshold).any())
    if held or not sae.cfg.kind.thresholded or sae.cfg.layer_norm != "none":
        raise UserError("The autoencoder has hysteresis or no threshold; name a run without (sae.release_ratio 1).")
    unit = sae.threshold.double().clamp(min=1e-30)
    sums = torch.zeros(
        2, 3, sae.cfg.d_sae, dtype=torch.float64
    )  # state; positions, sum and square sum of z / threshold
    moves = torch.zeros(2, 2, sae.cfg.d_sae, dtype=torch.float64)  # from state; pairs, and those that end on
    for x, segments in batches:
        z = (sae.pre_activation(x) + sae.b_enc).double() / unit
        kept, joined = segments >= 0, segments[:, 1:] == segments[:, :-1]
        joined = joined & kept[:, 1:]
        on = z > 1
        for state, inside in enumerate((~on & kept[..., None], on & kept[..., None])):
            for power in range(3):
                sums[state, power] += torch.where(inside, z**power, 0).sum(dim=(0, 1))
            pairs = inside[:, :-1] & joined[..., None]
            moves[state, 0] += pairs.sum(dim=(0, 1))
            moves[state, 1] += (pairs & on[:, 1:]).sum(dim=(0, 1))
    pooled = sums.sum(-1, keepdim=True)
    sums += PRIOR * pooled / pooled[:, :1].clamp(min=1)
    mean = sums[:, 1] / sums[:, 0]
    std = (sums[:, 2] / sums[:, 0] - mean.square()).clamp(min=1e-6).sqrt()
    rate = (moves[:, 1].sum(-1) + 0.5) / (moves[:, 0].sum(-1) + 1)
    after = (moves[:, 1] + rate[:, None]) / (moves[:, 0] + 1)
    density = after[0] / (after[0] + 1 - after[1])  # stationary
    return Chain(
        tuple((mean * unit).float()),
        tuple((std * unit).float()),
        *(each.float() for each in (density, after[0], after[1])),
    )


def log_odds(z: Tensor, chain: Chain, segments: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """log P(on | z) / P(off | z) of every position given its segment, or with ``causal`` given what came before and it.

    z: (B, T, d_sae); segments: (B, T) or None
    out: (B, T, d_sae); at excluded positions no statement
    """
    off, on = (torch.distributions.Normal(mean, std).log_prob(z) for mean, std in zip(*chain[:2], strict=True))
    ratio = on - off
    tokens = z.shape[1]
    joined = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    if segments is not None:
        joined[:, 1:] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    filtered = torch.empty_like(ratio)
    for t in range(tokens):
        before = chain.density.expand_as(ratio[:, t])
        if t > 0:
            p = filtered[:, t - 1].sigmoid()
            before = torch.where(joined[:, t, None], p * chain.on_after_on + (1 - p) * chain.on_after_off, before)
        filtered[:, t] = before.logit(1e-12) + ratio[:, t]
    if causal:
        return filtered
    # log of P(what follows | on) / P(what follows | off)
    behind = torch.zeros_like(ratio)
    for t in range(tokens - 2, -1, -1):
        later = ratio[:, t + 1] + behind[:, t + 1]
        terms = [torch.logaddexp(torch.log1p(-p), p.log() + later) for p in (chain.on_after_on, chain.on_after_off)]
        behind[:, t] = torch.where(joined[:, t + 1, None], terms[0] - terms[1], 0.0)
    return filtered + behind


class HiddenMarkov(nn.Module):
    """An autoencoder of which a feature keeps its value where the chain is more likely on than off."""

    def __init__(self, sae: SparseAutoencoder, chain: Chain, *, causal: bool = False) -> None:
        super().__init__()
        self.sae, self.chain, self.causal = sae, chain, causal

    def encode(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Features (B, T, d_sae) of activations (B, T, d)."""
        z = self.sae.pre_activation(x) + self.sae.b_enc
        return z.relu() * (log_odds(z, self.chain, segments, causal=self.causal) > 0)

    def decode(self, h: Tensor) -> Tensor:
        """Reconstruction (B, T, d)."""
        return self.sae.decode(h)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """``decode(encode(x))``."""
        return self.decode(self.encode(x, segments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--causal", action="store_true", help="the forward pass alone")
    parser.add_argument("--json", type=Path, help="write the metrics into this file")
    arguments = parser.parse_args()
    kind, found = "filter" if arguments.causal else "hmm", {}
    for run in arguments.runs:
        subject = open_run(run)
        lm = subject.load_lm()
        chain = fit(subject.sae, training_sample(subject.config, lm))
        module = HiddenMarkov(subject.sae, chain, causal=arguments.causal)
        name = f"{run.absolute().name}@{kind}"
        found |= measure({name: module}, subject.config, lm)
        bits = found[name]["temporal"]
        print(
            f"{name}: explained variance {found[name]['explained_variance']:.4f}, L0 {found[name]['l0']:.1f}, "
            f"support bits {bits['support_bits']:.1f}, total bits {bits['total_bits']:.1f}"
        )
    if arguments.json:
        to_json(found, arguments.json, f"neighbours-{kind}")


if __name__ == "__main__":
    main()
