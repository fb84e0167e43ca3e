"""The optimizer and what happens to gradients and weights around its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tsae.config import OptimizerConfig
from tsae.sae.model import SparseAutoencoder

__all__ = [
    "add_gradient_noise",
    "build_optimizer",
    "charge_for_activity",
    "project_decoder_gradient",
    "renormalize_decoder",
    "threshold_parameters",
]


def threshold_parameters(sae: SparseAutoencoder) -> list[torch.nn.Parameter]:
    """The learned thresholds: none, ``log_threshold``, or it and ``release_logit``."""
    return [p for p in (sae.log_threshold, sae.release_logit) if p is not None]


def build_optimizer(sae: SparseAutoencoder, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over the autoencoder's parameters, fused. Weight decay leaves learned thresholds alone: they are
    logarithms, for which 0 is no natural value."""
    kind = torch.optim.AdamW if cfg.name == "adamw" else torch.optim.Adam
    extra = {"weight_decay": cfg.weight_decay} if cfg.name == "adamw" else {}
    parameters: Any = list(sae.parameters())
    learned = threshold_parameters(sae)
    if learned and extra:
        others = [p for p in parameters if all(p is not q for q in learned)]
        parameters = [{"params": others}, {"params": learned, "weight_decay": 0.0}]
    return kind(parameters, lr=cfg.lr, betas=cfg.betas, fused=True, **extra)


@torch.no_grad()
def charge_for_activity(sae: SparseAutoencoder, l0_gradients: Sequence[Tensor]) -> None:
    """Add the L0 penalty's gradient to the learned thresholds' at the price that leaves their common factor alone.

    Where a controller holds the mean L0, the thresholds' common factor is not the loss's to choose, and the weight of
    the L0 penalty not a free number: it is the Lagrange multiplier ``lambda >= 0`` with

        sum_j (dL / dlog theta_j + lambda dL0 / dlog theta_j) = 0

    the worth of one more active feature at the margin. A threshold then falls where its feature is worth more than
    that, and rises where it is worth less.

    l0_gradients: dL0 / dp for each of `threshold_parameters`, whose ``grad`` holds dL / dp
    """
    parameters = threshold_parameters(sae)
    loss, count = parameters[0].grad, l0_gradients[0].sum()
    if loss is None:
        return
    price = torch.where(count < 0, -loss.sum() / count.clamp(max=-1e-30), 0.0).clamp(min=0.0)
    for parameter, gradient in zip(parameters, l0_gradients, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(price * gradient)


@torch.no_grad()
def add_gradient_noise(parameters: list[Tensor], std: float, generator: torch.Generator) -> None:
    """Add N(0, (std * RMS of that parameter's gradient)^2) to every gradient (Neelakantan et al. 2015).

    ``std`` is relative: `tsae.sae.schedules.noise_std`.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        noise = torch.randn(parameter.grad.shape, generator=generator).to(parameter.grad)
        parameter.grad.add_(noise * parameter.grad.square().mean().sqrt(), alpha=std)


@torch.no_grad()
def project_decoder_gradient(sae: SparseAutoencoder) -> None:
    """Take the component along each decoder row out of its gradient (TC-SAE section 4, unit-norm constraint)."""
    grad = sae.W_dec.grad
    if grad is not None:
        direction = torch.nn.functional.normalize(sae.W_dec, dim=1)
        grad.sub_((grad * direction).sum(1, keepdim=True) * direction)


@torch.no_grad()
def renormalize_decoder(sae: SparseAutoencoder) -> None:
    """Scale each decoder row to norm 1."""
    sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
