"""The place that is encoded, a block's output: how wide it is, and whether the model can be run there.

A forward pass of a few made-up tokens finds both before any text goes through the model. The width is not always that
of the embedding: some models project between the two (OPT-350m, Electra).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from tsae.errors import UserError, reason
from tsae.lm.hooks import activations, check_context, check_layer, logits_with
from tsae.lm.loading import LanguageModel

log = logging.getLogger(__name__)

_PROBE = (2, 3)  # sequences and tokens, so that shapes with other orders of axes differ


def site_width(lm: LanguageModel, layer: int) -> int:
    """Width d of the output of block `layer`, from a forward pass of a few tokens, made once for each layer.

    Raises UserError if the layer does not exist, the model cannot be run, or its block puts out anything else than
    activations [N, T, d].
    """
    if layer not in lm.widths:
        _probe(lm, layer, *_PROBE)
    return lm.widths[layer]


def check_site(lm: LanguageModel, layer: int, tokens: int, *, predictions: bool = False) -> None:
    """Raise UserError, one sentence, unless the model can be run on sequences of `tokens` tokens up to block `layer`.

    layer:       counted from 0
    tokens:      the prefix (BOS) included
    predictions: also run it to the end, for its logits
    """
    check_layer(lm, layer)
    check_context(lm, tokens)
    _probe(lm, layer, _PROBE[0], tokens)
    if predictions:
        _check_predictions(lm, layer)


def _probe(lm: LanguageModel, layer: int, sequences: int, tokens: int) -> None:
    made_up = _made_up(lm, sequences, tokens)
    made_up[-1, -1] += 1  # changes what a causal model puts out at the last position alone
    try:
        x = activations(lm, made_up, layer)
    except UserError:
        raise
    except Exception as error:  # any module of the model may fail, for instance on a bad value of its config.json
        raise _cannot_run(lm, f"up to layer {layer} on {sequences} sequences of {tokens} tokens", error) from error
    _check_finite(lm, f"Block {layer} of {lm.name} puts out activations", x)
    if layer not in lm.widths and not torch.allclose(x[0, :-1].float(), x[-1, :-1].float(), rtol=0.05, equal_nan=True):
        log.warning(
            "%s is not causal: a token's activations depend on later tokens, so its cross-entropy is no prediction "
            "(a model of BERT's kind needs is_decoder in its config.json)",
            lm.name,
        )
    lm.widths[layer] = x.shape[-1]


def _check_predictions(lm: LanguageModel, layer: int) -> None:
    made_up = _made_up(lm, *_PROBE)
    try:
        logits = logits_with(lm, made_up, layer, lambda x: x)
    except UserError:
        raise
    except Exception as error:
        raise _cannot_run(lm, "to its predictions", error) from error
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != made_up.shape:
        found = f"logits {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"{lm.name} puts out {found} for {list(made_up.shape)} tokens, but cross-entropy needs logits [N, T, "
            "vocabulary]; name a causal language model, or leave the evaluation out with --evaluation.no-final."
        )

    _check_finite(lm, f"{lm.name} puts out logits", logits)


def _check_finite(lm: LanguageModel, what: str, values: Tensor) -> None:
    """Raise UserError if no value at all is finite: single ones may be at the first position, which is dropped."""
    if not bool(values.isfinite().any()):
        dtype = str(lm.dtype).removeprefix("torch.")
        raise UserError(f"{what} that are not finite in {dtype}; check its weights, or take another --lm-dtype.")


def _made_up(lm: LanguageModel, sequences: int, tokens: int) -> Tensor:
    """Token 0, or 1 where 0 is the padding token: RoBERTa counts no position for that."""
    padding = getattr(getattr(lm.model, "config", None), "pad_token_id", None)
    return torch.full((sequences, tokens), int(padding == 0), dtype=torch.int64)


def _cannot_run(lm: LanguageModel, how: str, error: Exception) -> UserError:
    return UserError(
        f"{lm.name} cannot be run {how}: {type(error).__name__}: {reason(error)}; check its config.json and weights, "
        "and that it takes nothing but tokens."
    )
