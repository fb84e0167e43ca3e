"""A trained autoencoder with another release ratio, at the sparsity it had: hysteresis put on or off afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tsae.config import SAEConfig
from tsae.errors import UserError
from tsae.sae.hysteresis import switch_on_levels
from tsae.sae.model import THRESHOLDED, SparseAutoencoder


class Released(NamedTuple):
    """An autoencoder that `with_release_ratio` made, and what it took."""

    sae: SparseAutoencoder
    factor: float
    """All switch-on thresholds are multiplied by this."""
    l0: float
    """Mean L0 of the original on the text it was found on."""


def check_releasable(cfg: SAEConfig) -> None:
    """Raise `UserError` unless features of ``cfg`` have thresholds, and stay as the thresholds leave them."""
    if cfg.activation not in THRESHOLDED or cfg.layer_norm == "post":
        raise UserError(
            f"The autoencoder's activation is {cfg.activation!r} (layer_norm {cfg.layer_norm!r}); a release ratio "
            f"needs one with thresholds, of {', '.join(THRESHOLDED)}, and no layer normalization after it."
        )


@torch.no_grad()
def with_release_ratio(sae: SparseAutoencoder, ratio: float, batches: Sequence[tuple[Tensor, Tensor]]) -> Released:
    """``sae`` as a Schmitt trigger that releases at ``ratio`` times its switch-on thresholds.

    To go on releasing lower with the same thresholds would make more features active. So all thresholds are multiplied
    by the one factor with which as many are active on ``batches`` as before: an order statistic, see
    `tsae.sae.hysteresis.switch_on_levels`. A `jumprelu_schmitt`'s own releases are replaced.

    sae: with thresholds (`check_releasable`); left as it is
    ratio: from 0 to 1; 1 takes hysteresis away
    batches: activations (B, T, d_in), in the units of the autoencoder's input, and segments (B, T), on any device

    Raises:
        UserError: an activation that has no thresholds.
    """
    cfg = sae.cfg
    check_releasable(cfg)
    out = SparseAutoencoder(dataclasses.replace(cfg, activation="schmitt", release_ratio=ratio)).to(sae.b_dec.device)
    out.eval().load_state_dict(sae.state_dict(), strict=False)  # but for the logarithms of learned thresholds
    unit = sae.threshold.clamp(min=torch.finfo(torch.float32).tiny)
    batches = [(x.to(unit.device), segments.to(unit.device)) for x, segments in batches]
    active = sum(int((sae.encode(x, segments)[segments >= 0] > 0).sum()) for x, segments in batches)
    tokens = sum(int((segments >= 0).sum()) for _, segments in batches)
    highest = unit.new_empty(0)  # of all levels, in units of each feature's threshold, those that can matter
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
    return Released(out, factor, active / max(tokens, 1))
