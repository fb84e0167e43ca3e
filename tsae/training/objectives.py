"""The training objective: a function of `LossInputs`, the step and the configuration, without state.

TSAE (equation 2) and TC-SAE (equation 4) share the form

    L = w(step) mean_t |x_t - xhat_t|^2 + l1 mean_t |h_t|_1 + ramp(step) weight L_temp + aux_weight L_aux

and differ in the temporal term. L_aux is AuxK times the reconstruction loss, detached. Learned thresholds add an L0
penalty, l0 mean_t |h_t|_0; with Matryoshka groups the first term is the mean over the prefixes of the dictionary. Means
run over non-excluded positions.

With several processes x, xhat, h and the statistics are shards of the batch and of the dictionary. Every term is that
of the full batch and dictionary, the same on all processes; `tsae.parallel.axis` says what happens to gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.config import ObjectiveConfig
from tsae.parallel.axis import SINGLE_PROCESS, Axis, Ranks
from tsae.parallel.selection import keep_k_largest_per_row
from tsae.training.feature_lists import FeatureLists
from tsae.training.own_terms import own_term
from tsae.training.schedules import LossWeights, loss_weights
from tsae.training.temporal_objectives import (
    MaskedPairs,
    Pairs,
    WindowEdges,
    contrastive_loss,
    count_pairs,
    find_window_edges,
    slow_loss,
    window_loss,
    window_loss_of_lists,
)
from tsae.utils.device import runs_behind
from tsae_kernels import TemporalStats, count_positions, temporal_loss_from_stats, window_consistency


@dataclass(kw_only=True)
class FeatureBatch:
    """The features of a batch, and what the temporal terms need beside them."""

    h: Tensor | FeatureLists
    """(B, T, d_sae)"""
    stats: TemporalStats
    """Of ``h`` over `bands_for` (cfg)."""
    segments: Tensor | None = None
    """(B, T); positions with a negative id are excluded. None: each row is one segment."""
    variance: Tensor | None = None
    """(d_sae), the temporal buffer; for `multiscale`. None: the variance within this batch's sequences."""
    pairs: Pairs | MaskedPairs | None = None
    """For `contrastive`: `draw_pairs` of the full batch."""
    edges: WindowEdges | None = None
    """For `window`: `find_window_edges` of these sequences. None: found here, or on a GPU not needed."""
    ranks: Ranks = SINGLE_PROCESS
    first: int = 0
    """Index in the full batch of the first sequence of ``h``."""


@dataclass(kw_only=True)
class LossInputs(FeatureBatch):
    """What the loss of a step is computed from."""

    x: Tensor
    """(B, T, d_in), normalized activations."""
    xhat: Tensor
    """(B, T, d_in), their reconstruction."""
    prefixes: Sequence[Tensor] = ()
    """Like ``xhat``: reconstructions from the smaller Matryoshka prefixes."""
    auxiliary: Tensor | None = None
    """`auxk_loss`."""
    l0: Tensor | None = None
    """Mean number of active features, with its gradient to learned thresholds; used if ``cfg.l0`` is above 0."""
    weights: LossWeights | None = None
    """The factors that change with the step. None: `loss_weights`."""


class LossTerms(NamedTuple):
    """The scalar terms of a step: ``total`` is minimised, the others are unweighted.

    ``reconstruction`` is that of the full dictionary, ``sparsity`` the L1 norm.
    """

    total: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    temporal: Tensor
    auxiliary: Tensor


def kept_positions(segments: Tensor | None, x: Tensor, ranks: Ranks = SINGLE_PROCESS) -> Tensor:
    """Number of non-excluded positions of the full batch, a float32 scalar tensor of at least 1."""
    if segments is None:
        return ranks.data.sum_no_grad(torch.tensor(float(x.shape[0] * x.shape[1]), device=x.device))
    return ranks.data.sum_no_grad((segments >= 0).sum(dtype=torch.float32)).clamp(min=1.0)


def prefix_share(groups: Sequence[int]) -> Tensor:
    """Share of the Matryoshka prefixes that contain each feature, (d_sae); groups: their sizes."""
    ends = torch.tensor(groups)
    return (torch.arange(groups[-1])[:, None] < ends).float().mean(1)


def reconstruction_loss(
    x: Tensor, xhat: Tensor, segments: Tensor | None = None, ranks: Ranks = SINGLE_PROCESS
) -> Tensor:
    """``mean_t |x_t - xhat_t|^2``, summed over the width; x and xhat: (B, T, d_in), segments: (B, T)."""
    error = (x - xhat.to(x.dtype)).square().sum(-1)  # [B, T]
    return _mean(error, segments, ranks, ranks.data)


def l1_norm(h: Tensor | FeatureLists, segments: Tensor | None = None, ranks: Ranks = SINGLE_PROCESS) -> Tensor:
    """``mean_t |h_t|_1``; h: (B, T, d_sae), segments: (B, T)."""
    if isinstance(h, FeatureLists):
        return _mean(h.l1(), segments, ranks, ranks.world)
    norm = h.abs().sum(-1, dtype=h.dtype if h.dtype == torch.float64 else torch.float32)  # [B, T]
    return _mean(norm, segments, ranks, ranks.world)


def _mean(values: Tensor, segments: Tensor | None, ranks: Ranks, over: Axis) -> Tensor:
    """The mean over the positions of the full batch of values (B, T) that differ between the processes of ``over``."""
    total = values.sum() if segments is None else (values * (segments >= 0)).sum()
    return over.sum_identity_grad(total) / kept_positions(segments, values, ranks)


def bands_for(cfg: ObjectiveConfig) -> tuple[tuple[int, int], ...]:
    """The offset bands, ascending and disjoint, whose statistics the objective needs from the activation's pass.

    `multiscale` needs ``cfg.bands``, `slow` (1, ``cfg.offset``), `window` and functions of the user's (1, 1). For
    several terms these bands are split at each other's ends, so that every term's bands are unions of those returned.
    """
    wanted: list[tuple[int, int]] = []
    if "multiscale" in cfg.terms:
        wanted += [(low, high) for low, high in cfg.bands]
    if "slow" in cfg.terms:
        wanted.append((1, cfg.offset))
    if "window" in cfg.terms or cfg.own_terms:
        wanted.append((1, 1))
    edges = sorted({low for low, _ in wanted} | {high + 1 for _, high in wanted})
    pieces = ((low, end - 1) for low, end in pairwise(edges))
    found = tuple(piece for piece in pieces if any(low <= piece[0] <= high for low, high in wanted))
    return found or ((1, 1),)


def temporal_term(batch: FeatureBatch, cfg: ObjectiveConfig) -> Tensor:
    """L_temp of the first ``cfg.group`` features (0: all), before its ramp and ``cfg.weight``, a scalar.

    The sum of the terms in ``cfg.temporal``. `multiscale`: TSAE equations 2 and 3, from the statistics over
    ``cfg.bands``. `window`: ``cfg.window_weight`` times TC-SAE equation 3. `contrastive`: ``cfg.contrastive_weight``
    times `contrastive_loss`. `slow`: ``cfg.slow_weight`` times `slow_loss`.

    Raises:
        ValueError: the contrastive term is asked for and ``batch.pairs`` is None.
    """
    h, ranks = batch.h, batch.ranks
    width = _group_width(cfg.group, h.shape[-1], ranks)
    terms = []
    if "contrastive" in cfg.terms:
        terms.append(cfg.contrastive_weight * _contrastive(batch, cfg, width))
    segments = batch.segments
    if segments is None:
        segments = torch.zeros(h.shape[:2], dtype=torch.int32, device=h.device)
    if "window" in cfg.terms:
        terms.append(cfg.window_weight * ranks.world.sum_identity_grad(_window(batch, segments, cfg.window, width)))
    stats, variance = batch.stats, batch.variance
    if width < h.shape[-1]:
        stats = TemporalStats(*(each[..., :width] for each in stats))
        variance = None if variance is None else variance[:width]
    if "multiscale" in cfg.terms:
        terms.append(_multiscale(stats, cfg, count_positions(segments), variance, ranks))
    if "slow" in cfg.terms:
        near = sum(high <= cfg.offset for _, high in bands_for(cfg))  # the first bands make up (1, offset)
        stats = stats._replace(differences=stats.differences[:, :near].sum(1, keepdim=True))
        positions = ranks.data.sum_no_grad(count_positions(segments).sum())
        slow = slow_loss(stats, positions, ranks.data.sum_no_grad(count_pairs(segments, cfg.offset)), ranks)
        terms.append(cfg.slow_weight * slow)
    return functools.reduce(torch.add, terms) if terms else torch.zeros((), device=h.device)


def _window(batch: FeatureBatch, segments: Tensor, window: int, width: int) -> Tensor:
    """The window term of this process's first ``width`` features. Only the CPU lists the pairs at segments' ends."""
    h = batch.h
    if isinstance(h, FeatureLists):
        return window_loss_of_lists(h, segments, window, group=width)
    if batch.edges is None and runs_behind(h.device):
        return window_consistency(h[..., :width], window, segments)
    edges = batch.edges or WindowEdges(*(part.to(h.device) for part in find_window_edges(segments, window)))
    return window_loss(h, batch.stats, edges, group=width)


def _group_width(group: int, here: int, ranks: Ranks) -> int:
    """How many of the ``here`` features of this process are among the first ``group``; 0 takes all."""
    return here if group == 0 else min(max(group - ranks.features.rank * here, 0), here)


def _contrastive(batch: FeatureBatch, cfg: ObjectiveConfig, width: int) -> Tensor:
    if batch.pairs is None:
        raise ValueError("pairs is None; the contrastive objective needs those of draw_pairs")
    return contrastive_loss(
        batch.h,
        batch.pairs,
        cfg.temperature,
        group=width,
        other_sequences=cfg.negatives == "other-sequences",
        ranks=batch.ranks,
        first=batch.first,
    )


def _multiscale(
    stats: TemporalStats, cfg: ObjectiveConfig, positions: Tensor, variance: Tensor | None, ranks: Ranks
) -> Tensor:
    if not cfg.adaptive:
        # Every feature alike: omega = 1 / d_sae, so that the weights mean the same as with equation 3.
        variance = torch.ones(stats.total.shape[-1], device=stats.total.device)
    min_variance = cfg.min_variance if cfg.adaptive else 0.0
    scales = list(zip(cfg.bands, cfg.weights, strict=True))
    weights = [sum(weight for (low, high), weight in scales if low <= first <= high) for first, _ in bands_for(cfg)]
    own = temporal_loss_from_stats(stats, positions, weights, variance=variance, min_variance=min_variance)
    if variance is None:  # from this batch, so on one process
        return own
    # Divided by the positions of this shard, and by the sum of omega_j over its features: undo both.
    n = positions.sum().clamp(min=1)
    mass = torch.where(variance >= min_variance, variance, 0.0).sum()
    full_mass = ranks.features.sum_no_grad(mass)
    share = torch.where(full_mass > 0, mass / torch.where(full_mass > 0, full_mass, 1.0), 0.0)
    share = share * (n / ranks.data.sum_no_grad(positions.sum()).clamp(min=1))
    return ranks.world.sum_identity_grad(own * share)


def auxk_loss(
    residual: Tensor,
    dead_pre: Tensor,
    dead_W_dec: Tensor,
    k: int,
    segments: Tensor | None = None,
    *,
    through_zero: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    used: Tensor | None = None,
) -> Tensor:
    """AuxK (Gao et al. 2024, appendix A.2): dead features reconstruct the residual of the live ones.

    residual: ``x - xhat`` (B, T, d_in), taken as a constant
    dead_pre: pre-activations of the n dead features, bias included (B, T, n)
    dead_W_dec: (n, d_in)
    k: dead features used per token
    through_zero: the gradient passes straight through the relu of the selected features. Without a threshold a dead
        feature is below 0 at every token, where the relu passes no gradient that could revive it.
    used: (n) bool, False for places that hold no dead feature; with none used the result is 0. On one process.
    out: ``sum |e - ehat|^2 / sum |e|^2`` over non-excluded positions, a scalar
    """
    residual = residual.detach()
    dead = dead_pre.shape[-1]
    if ranks.features.size > 1:
        dead = int(ranks.features.sum_no_grad(torch.tensor(dead)))
    if used is not None:
        # The lowest finite value, not -inf, whose gradient times 0 would be NaN.
        lowest = torch.finfo(dead_pre.dtype).min
        chosen = dead_pre.detach().masked_fill(~used, lowest).topk(min(k, dead), dim=-1).indices
        kept = torch.zeros_like(dead_pre, dtype=torch.bool).scatter(-1, chosen, True) & used
        dead_pre = torch.where(kept, dead_pre, 0.0)
    elif k < dead:
        dead_pre = keep_k_largest_per_row(dead_pre, k, ranks.features)
    features = dead_pre.relu()
    if through_zero:
        features = features.detach() + (dead_pre - dead_pre.detach())
    product = ranks.features.sum_identity_grad(features @ dead_W_dec, torch.float32)
    error = residual - product.to(residual.dtype)
    if segments is not None:
        kept = (segments >= 0)[..., None]
        residual, error = residual * kept, error * kept
    data = ranks.data
    share = data.sum_identity_grad(error.square().sum()) / data.sum_no_grad(residual.square().sum()).clamp(min=1e-12)
    return share if used is None else torch.where(used.any(), share, 0.0)


def objective(inputs: LossInputs, step: int, cfg: ObjectiveConfig) -> LossTerms:
    """The loss of one step; ``step`` counts from 0."""
    weights = inputs.weights or loss_weights(step, cfg)
    segments, ranks = inputs.segments, inputs.ranks
    reconstruction = reconstruction_loss(inputs.x, inputs.xhat, segments, ranks)
    nested = reconstruction
    if inputs.prefixes:
        parts = [reconstruction_loss(inputs.x, prefix, segments, ranks) for prefix in inputs.prefixes]
        nested = (reconstruction + sum(parts)) / (1 + len(parts))
    total = weights.reconstruction * nested
    zero = torch.zeros((), device=inputs.x.device)
    sparsity, temporal = zero, zero
    if cfg.l1 > 0:
        sparsity = l1_norm(inputs.h, segments, ranks)
        total = total + cfg.l1 * sparsity
    if cfg.l0 > 0 and inputs.l0 is not None:
        total = total + cfg.l0 * inputs.l0
    if weights.temporal is not None:
        temporal = temporal_term(inputs, cfg)
        for name in cfg.own_terms:
            temporal = temporal + own_term(name, inputs, step, cfg)
        total = total + weights.temporal * temporal
    auxiliary = zero if inputs.auxiliary is None else inputs.auxiliary
    if inputs.auxiliary is not None:
        # It is relative to the residual: put it back on the scale of the reconstruction.
        total = total + cfg.aux_weight * auxiliary * reconstruction.detach()
    return LossTerms(total, *(term.detach() for term in (reconstruction, sparsity, temporal, auxiliary)))
