"""Shared by the tests against other libraries: activations with a large mean, and our autoencoders, randomized."""

from __future__ import annotations

from typing import Any

import torch

from tsae.config import SAEConfig
from tsae.sae.model import SparseAutoencoder

D_IN, D_SAE, K = 16, 64, 6


def activations(rows: int = 4, tokens: int = 32, mean: float = 600.0, scale: float = 25.0) -> torch.Tensor:
    """[rows, tokens, D_IN], with a mean many times the spread, as in residual streams."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, tokens, D_IN, generator=generator) * scale + mean


def randomize(sae: SparseAutoencoder, seed: int = 0) -> SparseAutoencoder:
    """Random biases, and for learned thresholds a different threshold per feature."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * torch.randn(D_SAE, generator=generator))
        sae.b_dec.copy_(torch.randn(D_IN, generator=generator))
        sae.threshold.fill_(0.4)
        if sae.thresholds_learned:
            sae.threshold.mul_(torch.rand(D_SAE, generator=generator) + 0.5)
        sae.release.copy_(0.3 * sae.threshold)
        sae.update_threshold_parameters()
    return sae


def trained(activation: str, **options: object) -> SparseAutoencoder:
    """An autoencoder as a run saves it, with the mean and scale of the activations folded in."""
    cfg = SAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, activation=activation, **options)  # type: ignore[arg-type]
    sae = randomize(SparseAutoencoder(cfg, generator=torch.Generator().manual_seed(0)).eval())
    return sae.folded(torch.full((D_IN,), 600.0), 25.0)


def same_to(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The same entries are 0, and the others differ by at most ``tolerance`` times the largest."""
    assert a.shape == b.shape
    assert torch.equal(a == 0, b == 0)
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@torch.no_grad()
def same_outputs(a: Any, b: Any, x: torch.Tensor) -> None:
    """Two autoencoders give the same features and reconstruction, as `same_to` says."""
    same_to(a.encode(x), b.encode(x))
    same_to(a(x), b(x))
