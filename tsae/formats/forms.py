"""Which of our autoencoders other libraries can compute, and hysteresis replaced by a plain threshold."""

from __future__ import annotations

import dataclasses

import torch

from tsae.errors import UserError
from tsae.sae.model import SparseAutoencoder


def common_architecture(sae: SparseAutoencoder, library: str) -> str:
    """`standard`, `topk` or `jumprelu`: the architecture with which ``library`` computes the same as ``sae``.

    Raises:
        UserError: there is none, with the reason.
    """
    cfg = sae.cfg
    if cfg.d_out and (library == "dictionary_learning" or cfg.kind.saelens == "topk"):
        missing = "a transcoder" if library == "dictionary_learning" else f"a transcoder with {cfg.activation}"
    elif cfg.layer_norm != "none":
        missing = f"layer normalization on features (sae.layer_norm '{cfg.layer_norm}')"
    elif cfg.kind.saelens is None and not cfg.kind.release:
        missing = f"the activation {cfg.activation}"
    elif cfg.input_scale != 1.0:
        missing = f"a scaled input (sae.input_scale {cfg.input_scale:g})"
    elif cfg.kind.release and (cfg.hysteresis == "path" or bool((sae.release < sae.threshold).any())):
        raise UserError(
            f"{library} has no hysteresis (sae.activation '{cfg.activation}'); --drop-hysteresis exports the plain "
            "threshold with the same mean L0, and evaluates it again."
        )
    else:
        return cfg.kind.saelens or "jumprelu"
    raise UserError(f"{library} has no equivalent of {missing}, so this autoencoder cannot be exported.")


@torch.no_grad()
def without_hysteresis(sae: SparseAutoencoder, factor: float = 1.0) -> SparseAutoencoder:
    """A `jumprelu` autoencoder with the switch-on thresholds of ``sae`` times ``factor``.

    An autoencoder without hysteresis is returned unchanged.
    """
    if not sae.cfg.kind.release:
        return sae
    cfg = dataclasses.replace(
        sae.cfg, activation="jumprelu", hysteresis="causal", steering="controller", support_bits=0.0
    )
    plain = SparseAutoencoder(cfg).to(sae.b_dec.device).eval()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(plain, name).copy_(getattr(sae, name))
    plain.threshold.copy_(sae.threshold * factor)
    plain.update_threshold_parameters()
    plain.metadata = dict(sae.metadata)
    return plain
