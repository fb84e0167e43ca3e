"""A small autoencoder with made-up weights, for tests of its functions."""

from __future__ import annotations

import torch

from tsae.config import SAEConfig
from tsae.sae.model import SparseAutoencoder

D_IN, D_SAE = 12, 40


def make(**options: object) -> SparseAutoencoder:
    cfg = SAEConfig(**({"d_in": D_IN, "d_sae": D_SAE, "k": 5} | options))  # type: ignore[arg-type]
    sae = SparseAutoencoder(cfg, generator=torch.Generator().manual_seed(0)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(D_SAE, generator=generator) * 0.3)
        sae.b_dec.copy_(torch.randn(D_IN, generator=generator) * 0.3)
        sae.threshold.fill_(0.6)
        sae.release.fill_(0.2)
        sae.update_threshold_parameters()
    return sae
