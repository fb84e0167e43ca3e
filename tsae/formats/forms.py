"""Which of our autoencoders other libraries have a form for, and what takes hysteresis's place."""

from __future__ import annotations

import dataclasses

import torch

from tsae.errors import UserError
from tsae.sae.model import SCHMITT, SparseAutoencoder


def plain_form(sae: SparseAutoencoder, library: str) -> str:
    """`standard`, `topk` or `jumprelu`: the form in which ``library`` computes what ``sae`` does.

    Raises:
        UserError: it has none, with the reason.
    """
    cfg = sae.cfg
    if cfg.layer_norm != "none":
        raise UserError(
            f"{library} has no form for layer normalization on features (sae.layer_norm '{cfg.layer_norm}'), so this "
            "autoencoder cannot be exported."
        )
    if cfg.activation == "gelu":
        raise UserError(f"{library} has no form for the activation gelu, so this autoencoder cannot be exported.")
    if cfg.input_scale != 1.0:
        raise UserError(
            f"{library} has no form for an input divided by a number (sae.input_scale {cfg.input_scale:g}), so this "
            "autoencoder cannot be exported."
        )
    if cfg.activation in SCHMITT and bool((sae.release < sae.threshold).any()):
        raise UserError(
            f"{library} has no form for hysteresis (sae.activation '{cfg.activation}'); --drop-hysteresis exports the "
            "plain threshold that gives the same mean L0, and measures its metrics anew."
        )
    return {"relu": "standard", "topk": "topk"}.get(cfg.activation, "jumprelu")


@torch.no_grad()
def without_hysteresis(sae: SparseAutoencoder, factor: float = 1.0) -> SparseAutoencoder:
    """``sae`` with its switch-on thresholds times ``factor`` as the only ones: a `jumprelu` autoencoder.

    Others than those with hysteresis come back as they are.
    """
    if sae.cfg.activation not in SCHMITT:
        return sae
    cfg = dataclasses.replace(sae.cfg, activation="jumprelu", hysteresis="causal", steering="controller")
    plain = SparseAutoencoder(cfg).to(sae.b_dec.device).eval()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(plain, name).copy_(getattr(sae, name))
    plain.threshold.copy_(sae.threshold * factor)
    plain.adopt_thresholds()
    return plain
