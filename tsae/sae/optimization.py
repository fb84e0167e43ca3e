"""The optimizer and what happens to gradients and weights around its step."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.config import OptimizerConfig
from tsae.sae.model import SparseAutoencoder

__all__ = ["add_gradient_noise", "build_optimizer", "project_decoder_gradient", "renormalize_decoder"]


def build_optimizer(sae: SparseAutoencoder, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over the autoencoder's parameters, fused."""
    kind = torch.optim.AdamW if cfg.name == "adamw" else torch.optim.Adam
    extra = {"weight_decay": cfg.weight_decay} if cfg.name == "adamw" else {}
    return kind(sae.parameters(), lr=cfg.lr, betas=cfg.betas, fused=True, **extra)


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
