"""A `SparseAutoencoder` from another library's tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.config import SAEConfig
from tsae.sae.kinds import Activation
from tsae.sae.model import SparseAutoencoder


@torch.no_grad()
def build(
    activation: Activation,
    *,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    threshold: Tensor | None = None,
    k: int | None = None,
    subtract_b_dec: bool = True,
    groups: tuple[int, ...] = (),
) -> SparseAutoencoder:
    """An autoencoder in ``eval()`` mode from float32 tensors whose shapes have been checked.

    W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in), b_dec (d_in); threshold (d_sae) or scalar
    k: features per token, which topk keeps and batchtopk kept in training
    subtract_b_dec: subtract ``b_dec`` from the input first
    groups: Matryoshka groups as in `SAEConfig`
    """
    d_in, d_sae = W_enc.shape
    sae = SparseAutoencoder(
        SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            activation=activation,
            k=min(32, d_sae) if k is None else k,
            groups=groups,
            unit_norm_decoder=False,
            apply_b_dec_to_input=subtract_b_dec,
        )
    ).eval()
    for name, value in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
        getattr(sae, name).copy_(value)
    if threshold is not None:
        sae.threshold.copy_(threshold.clamp(min=0.0).expand(d_sae))  # every format applies a ReLU first
        sae.update_threshold_parameters()
    return sae
