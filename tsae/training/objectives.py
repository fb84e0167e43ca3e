"""The training objective: a pure function of (x, xhat, h, stats, step).

TSAE (equation 2) and TC-SAE (equation 4) share the form

    L = w(step) mean_t |x_t - xhat_t|^2 + l1 mean_t |h_t|_1 + ramp(step) weight L_temp + aux_weight L_aux

and differ in the temporal term. To this come the L0 penalty of learned thresholds (l0 mean_t |h_t|_0), and with
Matryoshka groups the first term is the mean over the prefixes of the dictionary. Means run over the positions that are
not excluded.

With several processes x, xhat, h and the statistics are a share of the batch and of the dictionary, and every term is
that of the whole, the same on all of them; see `tsae.parallel.axis` for what becomes of gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.config import ObjectiveConfig
from tsae.parallel.axis import SINGLE_PROCESS, Axis, Ranks
from tsae.parallel.selection import kth_largest_per_row
from tsae.training.schedules import reconstruction_weight, temporal_ramp
from tsae.training.temporal_objectives import (
    Pairs,
    WindowEdges,
    contrastive_loss,
    count_pairs,
    find_window_edges,
    slow_loss,
    window_loss,
)
from tsae_kernels import TemporalStats, count_positions, temporal_loss_from_stats


class LossTerms(NamedTuple):
    """The terms of one step, scalars; ``total`` is what is minimised, the others are unweighted.

    ``reconstruction`` is the whole dictionary's, ``sparsity`` the L1 norm.
    """

    total: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    temporal: Tensor
    auxiliary: Tensor


def kept_positions(segments: Tensor | None, x: Tensor, ranks: Ranks = SINGLE_PROCESS) -> Tensor:
    """Number of positions of the whole batch that are not excluded, a float32 scalar tensor of at least 1."""
    if segments is None:
        return ranks.data.total(torch.tensor(float(x.shape[0] * x.shape[1]), device=x.device))
    return ranks.data.total((segments >= 0).sum(dtype=torch.float32)).clamp(min=1.0)


def reconstruction_loss(
    x: Tensor, xhat: Tensor, segments: Tensor | None = None, ranks: Ranks = SINGLE_PROCESS
) -> Tensor:
    """``mean_t |x_t - xhat_t|^2``, summed over the width; x and xhat: (B, T, d_in), segments: (B, T)."""
    error = (x - xhat.to(x.dtype)).square().sum(-1)  # [B, T]
    return _mean(error, segments, ranks, ranks.data)


def l1_norm(h: Tensor, segments: Tensor | None = None, ranks: Ranks = SINGLE_PROCESS) -> Tensor:
    """``mean_t |h_t|_1``; h: (B, T, d_sae), segments: (B, T)."""
    norm = h.abs().sum(-1, dtype=h.dtype if h.dtype == torch.float64 else torch.float32)  # [B, T]
    return _mean(norm, segments, ranks, ranks.world)


def _mean(values: Tensor, segments: Tensor | None, ranks: Ranks, over: Axis) -> Tensor:
    """Over the positions of the batch; values: (B, T), of which processes along ``over`` have different ones."""
    if segments is None:
        return values.mean() if over.size == 1 else over.sum(values.sum()) / kept_positions(segments, values, ranks)
    return over.sum((values * (segments >= 0)).sum()) / kept_positions(segments, values, ranks)


def bands_for(cfg: ObjectiveConfig) -> tuple[tuple[int, int], ...]:
    """Offset bands whose statistics the objective needs from the activation's pass: ascending and disjoint.

    `multiscale` needs ``cfg.bands``, `slow` (1, ``cfg.offset``) and `window` (1, 1). For several at once they are the
    pieces that these cut each other into, so that what each needs is a sum of some of them.
    """
    wanted: list[tuple[int, int]] = []
    if "multiscale" in cfg.terms:
        wanted += [(low, high) for low, high in cfg.bands]
    if "slow" in cfg.terms:
        wanted.append((1, cfg.offset))
    if "window" in cfg.terms:
        wanted.append((1, 1))
    edges = sorted({low for low, _ in wanted} | {high + 1 for _, high in wanted})
    pieces = ((low, end - 1) for low, end in pairwise(edges))
    found = tuple(piece for piece in pieces if any(low <= piece[0] <= high for low, high in wanted))
    return found or ((1, 1),)


def temporal_term(
    h: Tensor,
    stats: TemporalStats,
    cfg: ObjectiveConfig,
    segments: Tensor | None = None,
    variance: Tensor | None = None,
    pairs: Pairs | None = None,
    edges: WindowEdges | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    first: int = 0,
) -> Tensor:
    """L_temp of the first ``cfg.group`` features (0: of all), before its ramp and ``cfg.weight``, a scalar.

    The sum of the terms that ``cfg.temporal`` names. `multiscale`: TSAE equations 2 and 3, from ``stats`` over
    ``cfg.bands``; ``variance`` (d_sae) is the temporal buffer's. `window`: ``cfg.window_weight`` times TC-SAE
    equation 3, from ``stats`` and ``edges``, which are looked for in ``segments`` if None. `contrastive`:
    ``cfg.contrastive_weight`` times `contrastive_loss` over ``pairs``. `slow`: ``cfg.slow_weight`` times `slow_loss`,
    from ``stats``.

    stats: of ``h`` over `bands_for` (cfg)
    pairs: of the whole batch; edges: of the sequences that are here
    first: the sequence of the batch that ``h`` begins with
    """
    terms = []
    width = _group_width(cfg.group, h.shape[-1], ranks)
    group: int | None = cfg.group if ranks.features.size == 1 else width or None
    if "contrastive" in cfg.terms:
        if pairs is None:
            raise ValueError("pairs is None; the contrastive objective needs those of draw_pairs")
        other = cfg.negatives == "other-sequences"
        contrast = contrastive_loss(
            h, pairs, cfg.temperature, group=group, other_sequences=other, ranks=ranks, first=first
        )
        terms.append(cfg.contrastive_weight * contrast)
    if segments is None:
        segments = torch.zeros(h.shape[:2], dtype=torch.int32, device=h.device)
    if "window" in cfg.terms:
        edges = edges or WindowEdges(*(part.to(h.device) for part in find_window_edges(segments, cfg.window)))
        consistency = stats.total.new_zeros(()) if group is None else window_loss(h, stats, edges, group=group)
        terms.append(cfg.window_weight * ranks.world.sum(consistency))
    if width < h.shape[-1]:
        stats = TemporalStats(*(s[..., :width] for s in stats))
        variance = None if variance is None else variance[:width]
    if "multiscale" in cfg.terms:
        terms.append(_multiscale(stats, cfg, count_positions(segments), variance, ranks))
    if "slow" in cfg.terms:
        near = sum(high <= cfg.offset for _, high in bands_for(cfg))  # the first so many bands are (1, offset)
        stats = stats._replace(differences=stats.differences[:, :near].sum(1, keepdim=True))
        positions = ranks.data.total(count_positions(segments).sum())
        slow = slow_loss(stats, positions, ranks.data.total(count_pairs(segments, cfg.offset)), ranks)
        terms.append(cfg.slow_weight * slow)
    return functools.reduce(torch.add, terms) if terms else h.new_zeros((), dtype=torch.float32)


def _group_width(group: int, here: int, ranks: Ranks) -> int:
    """How many of the ``here`` features of this process are among the first ``group``; 0 takes all."""
    return here if group == 0 else min(max(group - ranks.features.rank * here, 0), here)


def _multiscale(
    stats: TemporalStats, cfg: ObjectiveConfig, positions: Tensor, variance: Tensor | None, ranks: Ranks
) -> Tensor:
    if not cfg.adaptive:
        # Every feature alike: omega = 1 / d_sae, so that the weights mean the same as with equation 3.
        variance = torch.ones(stats.total.shape[-1], device=stats.total.device)
    scales = list(zip(cfg.bands, cfg.weights, strict=True))
    own = temporal_loss_from_stats(
        stats,
        positions,
        [sum(weight for (low, high), weight in scales if low <= first <= high) for first, _ in bands_for(cfg)],
        variance=variance,
        min_variance=cfg.min_variance if cfg.adaptive else 0.0,
    )
    if ranks.world.size == 1:
        return own
    # What is divided by the share's positions, and weighed by omega_j that sum to 1 over the share's features.
    n = positions.sum().clamp(min=1)
    mass = n.new_zeros((), dtype=own.dtype)
    if variance is not None:
        mass = torch.where(variance >= (cfg.min_variance if cfg.adaptive else 0.0), variance, 0.0).sum()
    all_mass = ranks.features.total(mass)
    share = torch.where(all_mass > 0, mass / torch.where(all_mass > 0, all_mass, 1.0), 0.0)
    return ranks.world.sum(own * (share * (n / ranks.data.total(positions.sum()).clamp(min=1))))


def auxk_loss(
    residual: Tensor,
    dead_pre: Tensor,
    dead_W_dec: Tensor,
    k: int,
    segments: Tensor | None = None,
    *,
    through_zero: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Tensor:
    """AuxK (Gao et al. 2024, appendix A.2): dead features reconstruct what the live ones left.

    residual: ``x - xhat`` (B, T, d_in), taken as a constant
    dead_pre: pre-activations of the n dead features, bias included (B, T, n)
    dead_W_dec: (n, d_in)
    k: dead features used per token
    through_zero: the gradient passes straight through the relu of the chosen features. Without a threshold a dead
        feature is below 0 on every token, where the relu would let nothing through that could revive it.
    out: ``sum |e - ehat|^2 / sum |e|^2`` over positions that are not excluded, a scalar
    """
    residual = residual.detach()
    if ranks.features.size > 1:
        dead_pre = _chosen_of_all(dead_pre, k, ranks.features)
    elif k < dead_pre.shape[-1]:
        values, indices = dead_pre.topk(k, dim=-1)
        dead_pre = torch.zeros_like(dead_pre).scatter(-1, indices, values)
    features = dead_pre.relu()
    if through_zero:
        features = features.detach() + (dead_pre - dead_pre.detach())
    product = features @ dead_W_dec
    if ranks.features.size > 1:
        product = ranks.features.sum(product.float())
    error = residual - product.to(residual.dtype)
    if segments is not None:
        kept = (segments >= 0)[..., None]
        residual, error = residual * kept, error * kept
    data = ranks.data
    return data.sum(error.square().sum()) / data.total(residual.square().sum()).clamp(min=1e-12)


def _chosen_of_all(dead_pre: Tensor, k: int, features: Axis) -> Tensor:
    """The k largest of each token among the dead features of all parts of the dictionary; 0 elsewhere."""
    dead = int(features.total(torch.tensor(dead_pre.shape[-1])))
    if k >= dead:
        return dead_pre
    return torch.where(dead_pre >= kth_largest_per_row(dead_pre, k, features), dead_pre, 0.0)


def objective(
    x: Tensor,
    xhat: Tensor,
    h: Tensor,
    stats: TemporalStats,
    step: int,
    cfg: ObjectiveConfig,
    *,
    segments: Tensor | None = None,
    variance: Tensor | None = None,
    auxiliary: Tensor | None = None,
    prefixes: Sequence[Tensor] = (),
    pairs: Pairs | None = None,
    edges: WindowEdges | None = None,
    l0: Tensor | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    first: int = 0,
) -> LossTerms:
    """The loss of one step.

    x, xhat: (B, T, d_in), normalized activations and their reconstruction
    h: (B, T, d_sae); stats: of ``h`` over `bands_for` (cfg)
    segments: (B, T) or None; variance: (d_sae), the temporal buffer; auxiliary: `auxk_loss` or None
    prefixes: like ``xhat``, the reconstructions by the smaller Matryoshka prefixes
    pairs: for the contrastive objective, from `draw_pairs`; edges: for the window, from `find_window_edges`
    l0: mean number of active features, with its gradient to learned thresholds; only with ``cfg.l0`` above 0
    first: the sequence of the batch that x begins with; ``pairs`` are those of the whole batch
    """
    reconstruction = reconstruction_loss(x, xhat, segments, ranks)
    nested = reconstruction
    if prefixes:
        parts = [reconstruction_loss(x, prefix, segments, ranks) for prefix in prefixes]
        nested = (reconstruction + sum(parts)) / (1 + len(parts))
    total = reconstruction_weight(step, cfg) * nested
    zero = torch.zeros((), device=x.device)
    sparsity, temporal = zero, zero
    if cfg.l1 > 0:
        sparsity = l1_norm(h, segments, ranks)
        total = total + cfg.l1 * sparsity
    if cfg.l0 > 0 and l0 is not None:
        total = total + cfg.l0 * l0
    ramp = temporal_ramp(step, cfg)
    if cfg.terms and ramp > 0:
        temporal = temporal_term(h, stats, cfg, segments, variance, pairs, edges, ranks, first)
        total = total + ramp * cfg.weight * temporal
    if auxiliary is not None:
        # Relative to the residual, so it is put back on the reconstruction's scale.
        total = total + cfg.aux_weight * auxiliary * reconstruction.detach()
    return LossTerms(
        total,
        *(term.detach() for term in (reconstruction, sparsity, temporal, zero if auxiliary is None else auxiliary)),
    )
