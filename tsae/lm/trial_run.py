"""The place that is encoded: how wide it is, and whether the model can be run there.

A forward pass of a few made-up tokens finds both before any text goes through the model. The width is not always that
of the embedding: some models project between the two (OPT-350m, Electra).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from tsae.errors import UserError, reason
from tsae.lm.hooks import activations, check_context, check_layer, logits_with, reading, replacing
from tsae.lm.loading import LanguageModel
from tsae.lm.readout import made_up
from tsae.lm.site import Site, as_site

log = logging.getLogger(__name__)

_PROBE = (2, 3)  # sequences and tokens, so that shapes with other orders of axes differ


def site_width(lm: LanguageModel, place: int | Site) -> int:
    """Width d of the activations at a place, from a forward pass of a few tokens, made once for each place.

    place: a block, for its output, or a `Site`
    Raises UserError if the place does not exist, the model cannot be run, or there is anything else than activations
    [N, T, d].
    """
    site = as_site(place)
    if _key(site) not in lm.widths:
        _probe(lm, site, *_PROBE)
    return lm.widths[_key(site)]


def _key(site: Site) -> int | Site:
    """A block's number for its output, as in `LanguageModel.widths`."""
    return site.number if site.kind == "resid_post" else site


def width(lm: LanguageModel, place: int | Site, target: Site | None = None) -> int:
    """Width of the activations at a place, and of those at a target beside them (`tsae.data.harvest`)."""
    return site_width(lm, place) + (0 if target is None else site_width(lm, target))


def check_order(lm: LanguageModel, place: Site, target: Site) -> None:
    """Raise UserError if a forward pass computes the target before the place that it is to be predicted from."""
    ids = made_up(lm, *_PROBE, varied=True)
    try:
        with reading(lm, place) as seen, replacing(lm, target, lambda y, start: _after(seen, y)):
            activations(lm, ids, target)
    except LookupError:
        raise UserError(
            f"the target {target.name} of {lm.name} is computed before the site {place.name}; exchange them."
        ) from None


def _after(seen: list[Tensor], y: Tensor) -> Tensor:
    if not seen:
        raise LookupError
    return y


def check_site(lm: LanguageModel, place: int | Site, tokens: int, *, predictions: bool = False) -> None:
    """Raise UserError, one sentence, unless the model can be run on sequences of `tokens` tokens up to a place.

    place:       a block, for its output, or a `Site`
    tokens:      the prefix (BOS) included
    predictions: also run it to the end, for its logits
    """
    site = as_site(place)
    if site.layer is not None:
        check_layer(lm, site.layer)
    check_context(lm, tokens)
    _probe(lm, site, _PROBE[0], tokens)
    if predictions:
        _check_predictions(lm, site)


def _probe(lm: LanguageModel, site: Site, sequences: int, tokens: int) -> None:
    ids = made_up(lm, sequences, tokens)
    ids[-1, -1] += 1  # changes what a causal model puts out at the last position alone
    try:
        x = activations(lm, ids, site)
    except UserError:
        raise
    except Exception as error:  # any module of the model may fail, for instance on a bad value of its config.json
        raise _cannot_run(lm, f"up to {site.described} on {sequences} sequences of {tokens} tokens", error) from error
    what = f"Block {site.layer} of {lm.name} puts out" if site.kind == "resid_post" else f"{lm.name} has at {site.name}"
    _check_finite(lm, f"{what} activations", x)
    causal = torch.allclose(x[0, :-1].float(), x[-1, :-1].float(), rtol=0.05, equal_nan=True)
    if _key(site) not in lm.widths and not causal:
        log.warning(
            "%s is not causal: a token's activations depend on later tokens, so its cross-entropy is no prediction "
            "(a model of BERT's kind needs is_decoder in its config.json)",
            lm.name,
        )
    lm.widths[_key(site)] = x.shape[-1]


def _check_predictions(lm: LanguageModel, site: Site) -> None:
    ids = made_up(lm, *_PROBE)
    try:
        logits = logits_with(lm, ids, site, lambda x: x)
    except UserError:
        raise
    except Exception as error:
        raise _cannot_run(lm, "to its predictions", error) from error
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        found = f"logits {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"{lm.name} puts out {found} for {list(ids.shape)} tokens, but cross-entropy needs logits [N, T, "
            "vocabulary]; name a causal language model, or leave the evaluation out with --evaluation.no-final."
        )

    _check_finite(lm, f"{lm.name} puts out logits", logits)


def _check_finite(lm: LanguageModel, what: str, values: Tensor) -> None:
    """Raise UserError if no value at all is finite: single ones may be at the first position, which is dropped."""
    if not bool(values.isfinite().any()):
        dtype = str(lm.dtype).removeprefix("torch.")
        raise UserError(f"{what} that are not finite in {dtype}; check its weights, or take another --lm-dtype.")


def _cannot_run(lm: LanguageModel, how: str, error: Exception) -> UserError:
    return UserError(
        f"{lm.name} cannot be run {how}: {type(error).__name__}: {reason(error)}; check its config.json and weights, "
        "and that it takes nothing but tokens."
    )
