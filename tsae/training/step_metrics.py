"""What a training step measures: the loss terms, explained variance and correlations of a line of metrics.jsonl."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae.parallel.axis import Ranks
from tsae.training.feature_lists import FeatureLists
from tsae.training.objectives import LossTerms
from tsae_kernels import TemporalStats


class Piece(NamedTuple):
    """What a step keeps of a piece of its batch, all without gradient.

    weight: the piece's share of the positions of the batch
    h: (b, T, d_sae), dense or lists, kept for the last piece only
    transitions: of activations with rates, the counts of `CountedStats`
    l0_gradients: of the mean L0 to the learned thresholds, times ``weight``
    """

    weight: float | Tensor
    x: Tensor
    h: Tensor | FeatureLists | None
    segments: Tensor
    stats: TemporalStats
    transitions: Tensor | None
    variance: Tensor
    terms: LossTerms
    l0: Tensor
    l0_gradients: tuple[Tensor, ...]


def loss_metrics(pieces: list[Piece], ranks: Ranks) -> dict[str, float]:
    """The loss and its terms over the full batch, and the explained variance (centred)."""
    terms = {name: sum(piece.weight * getattr(piece.terms, name) for piece in pieces) for name in LossTerms._fields}
    x = torch.cat([piece.x[piece.segments >= 0] for piece in pieces])  # [n, d_in]
    data = ranks.data
    n = data.sum_no_grad(torch.tensor(float(len(x)), device=x.device)).clamp(min=1.0)
    variance = data.sum_no_grad((x - data.sum_no_grad(x.sum(0)) / n).square().sum()) / n
    out = {"loss": terms["total"].item()}
    out |= {name: terms[name].item() for name in LossTerms._fields[1:]}
    return out | {"explained_variance": 1.0 - out["reconstruction"] / max(variance.item(), 1e-12)}


def correlation_metrics(correlation: Tensor, last: Piece, ranks: Ranks) -> dict[str, float]:
    """Mean and quantiles over the features that fire in the piece ``last`` of its lag-1 ``correlation`` (d_sae)."""
    assert last.h is not None
    if isinstance(last.h, FeatureLists):
        fired = ranks.data.any((last.stats.square > 0).any(0))
    else:
        fired = ranks.data.any((last.h[last.segments >= 0] > 0).any(0))
    alive = ranks.features.all_gather(correlation)[ranks.features.all_gather(fired.to(torch.uint8)).bool()]
    if not alive.numel():
        alive = correlation.new_zeros(1)
    quantiles = alive.quantile(torch.tensor([0.1, 0.5, 0.9], device=alive.device))
    out = {"lag1_correlation": alive.mean().item()}
    return out | {f"lag1_correlation_p{p}": q.item() for p, q in zip((10, 50, 90), quantiles, strict=True)}
