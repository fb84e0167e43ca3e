"""The training objective: a pure function of (x, xhat, h, stats, step).

TSAE (equation 2) and TC-SAE (equation 4) share the form

    L = w(step) mean_t |x_t - xhat_t|^2 + l1 mean_t |h_t|_1 + ramp(step) L_temp + aux_weight L_aux

and differ in the temporal term. Means run over the positions that are not excluded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae.config import ObjectiveConfig
from tsae.sae.schedules import reconstruction_weight, temporal_ramp
from tsae_kernels import TemporalStats, count_positions, temporal_loss_from_stats, window_consistency

__all__ = [
    "LossTerms",
    "auxk_loss",
    "bands_for",
    "l1_norm",
    "objective",
    "reconstruction_loss",
    "temporal_term",
]


class LossTerms(NamedTuple):
    """The terms of one step, scalars; ``total`` is what is minimised, the others are unweighted."""

    total: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    temporal: Tensor
    auxiliary: Tensor


def kept_positions(segments: Tensor | None, x: Tensor) -> Tensor:
    """Number of positions that are not excluded, a float32 scalar tensor of at least 1."""
    if segments is None:
        return torch.tensor(float(x.shape[0] * x.shape[1]), device=x.device)
    return (segments >= 0).sum(dtype=torch.float32).clamp(min=1.0)


def reconstruction_loss(x: Tensor, xhat: Tensor, segments: Tensor | None = None) -> Tensor:
    """``mean_t |x_t - xhat_t|^2``, summed over the width; x and xhat: (B, T, d_in), segments: (B, T)."""
    error = (x - xhat.to(x.dtype)).square().sum(-1)  # [B, T]
    if segments is None:
        return error.mean()
    return (error * (segments >= 0)).sum() / kept_positions(segments, x)


def l1_norm(h: Tensor, segments: Tensor | None = None) -> Tensor:
    """``mean_t |h_t|_1``; h: (B, T, d_sae), segments: (B, T)."""
    norm = h.abs().sum(-1, dtype=h.dtype if h.dtype == torch.float64 else torch.float32)  # [B, T]
    if segments is None:
        return norm.mean()
    return (norm * (segments >= 0)).sum() / kept_positions(segments, h)


def bands_for(cfg: ObjectiveConfig) -> tuple[tuple[int, int], ...]:
    """Offset bands whose statistics the objective needs from the activation's pass."""
    return tuple(tuple(band) for band in cfg.bands) if cfg.temporal == "multiscale" else ((1, 1),)  # type: ignore[misc]


def temporal_term(
    h: Tensor,
    stats: TemporalStats,
    cfg: ObjectiveConfig,
    segments: Tensor | None = None,
    variance: Tensor | None = None,
) -> Tensor:
    """L_temp before its ramp, a scalar.

    `multiscale`: TSAE equations 2 and 3, from ``stats`` over ``cfg.bands``; ``variance`` (d_sae) is the temporal
    buffer's. `window`: ``cfg.window_weight`` times TC-SAE equation 3.
    """
    if cfg.temporal == "none":
        return h.new_zeros((), dtype=torch.float32)
    if cfg.temporal == "window":
        return cfg.window_weight * window_consistency(h, cfg.window, segments)
    positions = h.shape[1] if segments is None else count_positions(segments)
    if not cfg.adaptive:
        # Every feature alike: omega = 1 / d_sae, so that the weights mean the same as with equation 3.
        variance = torch.ones(h.shape[-1], device=h.device)
    return temporal_loss_from_stats(
        stats,
        positions,
        cfg.weights,
        variance=variance,
        min_variance=cfg.min_variance if cfg.adaptive else 0.0,
    )


def auxk_loss(residual: Tensor, dead_pre: Tensor, dead_W_dec: Tensor, k: int, segments: Tensor | None = None) -> Tensor:
    """AuxK (Gao et al. 2024, appendix A.2): dead features reconstruct what the live ones left.

    residual: ``x - xhat`` (B, T, d_in), taken as a constant
    dead_pre: pre-activations of the n dead features, bias included (B, T, n)
    dead_W_dec: (n, d_in)
    k: dead features used per token
    out: ``sum |e - ehat|^2 / sum |e|^2`` over positions that are not excluded, a scalar
    """
    residual = residual.detach()
    if k < dead_pre.shape[-1]:
        values, indices = dead_pre.topk(k, dim=-1)
        dead_pre = torch.zeros_like(dead_pre).scatter(-1, indices, values)
    error = residual - (dead_pre.relu() @ dead_W_dec).to(residual.dtype)
    if segments is not None:
        kept = (segments >= 0)[..., None]
        residual, error = residual * kept, error * kept
    return error.square().sum() / residual.square().sum().clamp(min=1e-12)


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
) -> LossTerms:
    """The loss of one step.

    x, xhat: (B, T, d_in), normalized activations and their reconstruction
    h: (B, T, d_sae); stats: of ``h`` over `bands_for` (cfg)
    segments: (B, T) or None; variance: (d_sae), the temporal buffer; auxiliary: `auxk_loss` or None
    """
    reconstruction = reconstruction_loss(x, xhat, segments)
    total = reconstruction_weight(step, cfg) * reconstruction
    zero = torch.zeros((), device=x.device)
    sparsity, temporal = zero, zero
    if cfg.l1 > 0:
        sparsity = l1_norm(h, segments)
        total = total + cfg.l1 * sparsity
    ramp = temporal_ramp(step, cfg)
    if cfg.temporal != "none" and ramp > 0:
        temporal = temporal_term(h, stats, cfg, segments, variance)
        total = total + ramp * temporal
    if auxiliary is not None:
        # Relative to the residual, so it is put back on the reconstruction's scale.
        total = total + cfg.aux_weight * auxiliary * reconstruction.detach()
    return LossTerms(
        total,
        *(term.detach() for term in (reconstruction, sparsity, temporal, zero if auxiliary is None else auxiliary)),
    )
