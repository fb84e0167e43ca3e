"""A trained autoencoder with another release ratio at the same L0, or with another kind of hysteresis."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tsae.config import SAEConfig
from tsae.errors import UserError
from tsae.sae.hysteresis import switch_on_levels
from tsae.sae.kinds import KINDS
from tsae.sae.model import SparseAutoencoder


class AdjustedRelease(NamedTuple):
    """The result of `with_release_ratio`.

    sae: the new autoencoder
    factor: on all switch-on thresholds
    l0: mean L0 of the original autoencoder on the batches
    """

    sae: SparseAutoencoder
    factor: float
    l0: float


def check_has_thresholds(cfg: SAEConfig) -> None:
    """Raise `UserError` unless the features of ``cfg`` are its pre-activations above stored thresholds."""
    if not cfg.kind.thresholded or cfg.layer_norm == "post":
        usable = ", ".join(name for name, kind in KINDS.items() if kind.thresholded)
        raise UserError(
            f"The autoencoder's activation is {cfg.activation!r} (layer_norm {cfg.layer_norm!r}); a release ratio "
            f"needs one with thresholds ({usable}) and no layer normalization after it."
        )


def with_hysteresis(sae: SparseAutoencoder, hysteresis: str) -> SparseAutoencoder:
    """``sae`` with the same tensors and another kind of hysteresis, as in `SAEConfig.hysteresis`.

    Raises:
        UserError: its activation does not have that kind.
    """
    if not sae.cfg.kind.steered:
        raise UserError(
            f"The autoencoder's activation is {sae.cfg.activation!r}; only schmitt and rate have hysteresis."
        )
    change: dict[str, Any] = {"hysteresis": hysteresis}
    change |= {} if hysteresis == "causal" else {"gate_gradient": 0.0}  # which only causal training has
    out = SparseAutoencoder(dataclasses.replace(sae.cfg, **change)).to(sae.b_dec.device)
    out.metadata = dict(sae.metadata)
    out.load_state_dict(sae.state_dict())
    return out.train(sae.training)


@torch.no_grad()
def with_release_ratio(
    sae: SparseAutoencoder, ratio: float, batches: Sequence[tuple[Tensor, Tensor]]
) -> AdjustedRelease:
    """``sae`` as a Schmitt trigger with releases at ``ratio`` times its switch-on thresholds, at the same L0.

    A lower release at the same thresholds would activate more features. So all thresholds are multiplied by the factor
    at which as many features are active on ``batches`` as before, an order statistic of
    `tsae.sae.hysteresis.switch_on_levels`. The own releases of `jumprelu_schmitt` are replaced.

    sae: with thresholds (`check_has_thresholds`); not changed
    ratio: from 0 to 1; 1 removes hysteresis
    batches: activations (B, T, d_in) in the units of the autoencoder's input, and segments (B, T), on any device

    Raises:
        UserError: the activation has no thresholds.
    """
    cfg = sae.cfg
    check_has_thresholds(cfg)
    hysteresis = "causal" if cfg.hysteresis == "path" else cfg.hysteresis
    as_trigger = dataclasses.replace(
        cfg, activation="schmitt", release_ratio=ratio, hysteresis=hysteresis, support_bits=0.0
    )
    out = SparseAutoencoder(as_trigger).to(sae.b_dec.device)
    out.metadata = dict(sae.metadata)
    out.eval().load_state_dict(sae.state_dict(), strict=False)  # without learned thresholds' parameters and rates
    unit = sae.threshold.clamp(min=torch.finfo(torch.float32).tiny)
    batches = [(x.to(unit.device), segments.to(unit.device)) for x, segments in batches]
    active = sum(int((sae.encode(x, segments)[segments >= 0] > 0).sum()) for x, segments in batches)
    tokens = sum(int((segments >= 0).sum()) for _, segments in batches)
    highest = unit.new_empty(0)  # the active + 1 highest levels, as multiples of each feature's threshold
    for x, segments in batches:
        z = sae.pre_activation(x) + sae.b_enc
        if cfg.layer_norm == "pre":
            z = functional.layer_norm(z, (cfg.d_sae,))
        levels = switch_on_levels(z / unit, ratio, segments, two_sided=cfg.hysteresis == "two-sided")[segments >= 0]
        highest = torch.cat([highest, levels[levels > 0]])
        if len(highest) > active + 1:
            highest = highest.topk(active + 1, sorted=False).values
    factor = float(highest.min()) if len(highest) > active else 0.0
    out.threshold.copy_(factor * sae.threshold)
    out.release.copy_(ratio * out.threshold)
    return AdjustedRelease(out, factor, active / max(tokens, 1))
