"""A `SparseAutoencoder` from another library's tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tsae.config import SAEConfig
from tsae.errors import UserError
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
    transcoder: bool = False,
) -> SparseAutoencoder:
    """An autoencoder in ``eval()`` mode from float32 tensors whose shapes have been checked.

    W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in), b_dec (d_in); threshold (d_sae) or scalar
    k: features per token, which topk keeps and batchtopk kept in training
    subtract_b_dec: subtract ``b_dec`` from the input first
    groups: Matryoshka groups as in `SAEConfig`
    transcoder: W_dec is (d_sae, d_out) and b_dec (d_out), of other activations than the input
    """
    d_in, d_sae = W_enc.shape
    sae = SparseAutoencoder(
        SAEConfig(
            d_in=d_in,
            d_out=W_dec.shape[1] if transcoder else 0,
            d_sae=d_sae,
            activation=activation,
            k=min(32, d_sae) if k is None else k,
            groups=groups,
            unit_norm_decoder=False,
            apply_b_dec_to_input=subtract_b_dec and not transcoder,
        )
    ).eval()
    for name, value in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
        getattr(sae, name).copy_(value)
    if threshold is not None:
        # Every format applies a ReLU first. What is not finite stays, to be found by `not_finite`.
        positive = torch.where(threshold.isfinite(), threshold.clamp(min=0.0), threshold)
        sae.threshold.copy_(positive.expand(d_sae))
        sae.update_threshold_parameters()
    return sae


def ungated(path: Path, W_enc: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder, bias and threshold of the JumpReLU autoencoder that a gated one is (`tsae.formats.saelens`).

    W_enc (d_in, d_sae), the others (d_sae), float32

    Raises:
        UserError: a bias is not finite, or ``exp(r_mag)`` is 0 or infinite, so that gate and magnitude are no functions
            of one number.
    """
    gain = r_mag.exp()
    if not (b_gate.isfinite() & b_mag.isfinite() & gain.isfinite() & (gain > 0)).all():
        raise UserError(
            f"{path}: the gate's biases or exp(r_mag) are not finite, or exp(r_mag) is 0; the training diverged, or "
            "the file is damaged."
        )
    return W_enc * gain, b_mag, b_mag - gain * b_gate
