"""Steering and ablation: forward passes with features of an autoencoder added to, or taken out of, the activations.

Both act where the autoencoder encodes, on every forward pass within a block of `with`, whoever runs the model. Nested
blocks apply from the outermost to the innermost: each sees what those around it have left. The first position, the
prefix (BOS), which no autoencoder sees, is never changed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.lm.hooks import replacing
from tsae.lm.loading import LanguageModel
from tsae.lm.site import Site
from tsae.sae.model import SparseAutoencoder

Positions = slice | Iterable[int] | None
"""Tokens to change, counted from 0 at the first token after the prefix; generated tokens count on. None: all."""


@contextmanager
def steering(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    layer: int | Site,
    strengths: Mapping[int, float],
    positions: Positions = None,
) -> Iterator[None]:
    """Within the block, ``x + sum_j strength_j d_j`` stands for the activations x, with d_j feature j's decoder row.

    It is the change of the reconstruction if every feature j were larger by ``strength_j``, whose unit is therefore
    that of the features: for most autoencoders, whose decoder rows have norm 1, a length in the space of activations.

    sae: on the device of ``lm``
    layer: the block whose output it encodes, or another place; of a transcoder its target
    strengths: by feature; may be negative
    positions: see `Positions`

    Raises:
        UserError: there is no such feature or block, a strength is not finite, or a position is negative.
    """
    if not isinstance(strengths, Mapping):
        raise UserError(
            f"The features to steer are {strengths!r}; give a dictionary of strengths by feature, {{5: 4.0}}."
        )
    chosen = _checked(strengths, sae)
    if bad := [value for value in strengths.values() if not math.isfinite(value)]:
        raise UserError(f"A feature is steered by {bad[0]}; name a finite number.")
    values = torch.tensor([float(value) for value in strengths.values()], device=sae.W_dec.device)
    direction = sae.cfg.input_scale * (values @ sae.W_dec.detach()[chosen])  # [d_in]
    among = _among(positions)

    def add(x: Tensor, start: int) -> Tensor:  # [N, T, d_in]
        return x + torch.where(among(start, x)[:, None], direction.to(x), 0.0)

    with replacing(lm, layer, add):
        yield


@contextmanager
def ablation(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    layer: int | Site,
    features: Iterable[int],
    positions: Positions = None,
) -> Iterator[None]:
    """Within the block, ``x + decode(h') - decode(h)`` stands for the activations x, where h are their features and h'
    the same with ``features`` at 0: what the autoencoder does not reconstruct stays.

    Features with hysteresis, or of the activation `persistent`, depend on all earlier tokens, which the model does not
    pass on with a key-value cache. Within the block `generate` then uses none, and a forward pass that continues a
    cache is refused.

    sae, layer, positions: as in `steering`
    features: to take out

    Raises:
        UserError: there is no such feature or block, or a position is negative. In a forward pass: it continues a
            cache and the features depend on earlier tokens.
    """
    chosen = list(dict.fromkeys(_checked(features, sae)))
    stateful = sae.cfg.kind.keeps_state
    rows = sae.cfg.input_scale * sae.W_dec.detach()[chosen]  # [n, d_in]
    among = _among(positions)

    def remove(x: Tensor, start: int) -> Tensor:  # [N, T, d_in]
        if stateful and start > 0:
            raise UserError(
                "A feature that depends on all earlier tokens cannot be ablated where a forward pass "
                "continues a key-value cache; generate with use_cache=False."
            )
        prefix = int(start == 0)
        out = x.clone()
        with torch.no_grad():
            h = sae.encode(x[:, prefix:].to(rows))[..., chosen]  # [N, T - prefix, n]
        part = (h @ rows).to(x)
        out[:, prefix:] -= torch.where(among(start, x)[prefix:, None], part, 0.0)
        return out

    with _without_cache(lm) if stateful else _nothing(), replacing(lm, layer, remove):
        yield


def _checked(features: Iterable[int], sae: SparseAutoencoder) -> list[int]:
    """The features as Python's numbers, in their order; NumPy's integers and tensors of one integer count as such."""
    chosen = []
    for feature in features:
        try:
            number = -1 if isinstance(feature, bool) else operator.index(feature)
        except TypeError:
            number = -1
        if not 0 <= number < sae.cfg.d_sae:
            raise UserError(
                f"There is no feature {feature!r}; the autoencoder has {sae.cfg.d_sae}, 0 to {sae.cfg.d_sae - 1}."
            )
        chosen.append(number)
    return chosen


def _among(positions: Positions) -> Callable[[int, Tensor], Tensor]:
    """A function from the column of the first token of x [N, T, d] to which of its tokens are changed, [T] bool."""
    bounds = (positions.start, positions.stop, positions.step) if isinstance(positions, slice) else ()
    listed = None if positions is None or bounds else torch.tensor(sorted({int(p) for p in positions}))  # type: ignore[union-attr]
    negative = [value for value in bounds if value is not None and value < 0]
    if negative or (listed is not None and len(listed) and int(listed[0]) < 0):
        raise UserError("A position is negative; they count from 0, at the first token after BOS.")

    def among(start: int, x: Tensor) -> Tensor:
        places = torch.arange(start - 1, start - 1 + x.shape[1])  # the prefix is at -1
        if listed is not None:
            chosen = torch.isin(places, listed)
        elif bounds:
            low, high, step = bounds[0] or 0, bounds[1], bounds[2] or 1
            chosen = (places >= low) & ((places - low) % step == 0)
            chosen &= torch.ones_like(chosen) if high is None else places < high
        else:
            chosen = places >= 0
        return (chosen & (places >= 0)).to(x.device)

    return among


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _without_cache(lm: LanguageModel) -> Iterator[None]:
    """Within the block `generate` uses no key-value cache unless it is asked to."""
    config = getattr(lm.model, "generation_config", None)
    if config is None:
        yield
        return
    before, config.use_cache = config.use_cache, False
    try:
        yield
    finally:
        config.use_cache = before
