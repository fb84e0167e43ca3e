"""Which of our autoencoders other libraries have a form for, and the threshold that takes hysteresis's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.sae.model import SCHMITT, SparseAutoencoder

__all__ = ["matching_factor", "plain_form", "without_hysteresis"]


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
    plain = SparseAutoencoder(dataclasses.replace(sae.cfg, activation="jumprelu")).to(sae.b_dec.device).eval()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(plain, name).copy_(getattr(sae, name))
    plain.threshold.copy_(sae.threshold * factor)
    plain.adopt_thresholds()
    return plain


@torch.no_grad()
def matching_factor(sae: SparseAutoencoder, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The factor on the switch-on thresholds with which they alone keep as many features as hysteresis does.

    Without hysteresis nothing stays on below its threshold, so L0 falls; a factor below 1 brings it back. Exact on the
    given activations, ties apart: with ``r = pre / threshold``, and n the features that hysteresis keeps, it is the
    (n + 1)-th largest r.

    batches: pairs of activations (N, T, d_in) and segments (N, T); positions of negative id do not count
    """
    unit = sae.threshold.clamp(min=torch.finfo(torch.float32).tiny)
    kept = sum(int((sae.encode(x, segments)[segments >= 0] > 0).sum()) for x, segments in batches)
    largest = unit.new_empty(0)
    for x, segments in batches:
        r = (sae.pre_activation(x)[segments >= 0] + sae.b_enc) / unit
        largest = torch.cat([largest, r[r > 0]])
        if len(largest) > kept + 1:
            largest = largest.topk(kept + 1, sorted=False).values
    if kept == 0:
        raise UserError("No feature is active on the run's training text, so no threshold can be found; check the run.")
    return float(largest.min()) if len(largest) > kept else 0.0
