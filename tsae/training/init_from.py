"""`--init-from`: training starts from an existing autoencoder of any known format (`tsae.formats`).

The source takes raw activations, and training runs on centred and scaled ones. `warm_start` is the inverse of
`SparseAutoencoder.folded`: before the first step, the run's autoencoder has the features and the reconstructions of the
source. docs/howto/fine-tune.md says which options come from the source, and when features differ from its.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsae.config import SAEConfig, TrainConfig
from tsae.errors import UserError
from tsae.evaluation.places import stated_site, warnings_about
from tsae.formats import load
from tsae.sae.kinds import KINDS
from tsae.sae.model import SparseAutoencoder
from tsae.sae.normalization import InputNormalizer
from tsae.utils.paths import expanded

log = logging.getLogger(__name__)

_UNIT = 5e-3  # distance of a norm from 1 that counts as none: weights stored in bfloat16 are off by 0.2 %
_INFINITE = 1e30  # in the place of an infinite threshold, whose logarithm could not be trained


@dataclass(frozen=True)
class WarmStart:
    """What a `tsae.training.trainer.Trainer` starts from.

    sae: on the CPU, with the run's configuration, on normalized activations
    normalizer: centring and scaling of the input
    theta: where the controller of thresholds starts; None: at the first batch's
    """

    sae: SparseAutoencoder
    normalizer: InputNormalizer
    theta: float | None


def absolute_init(source: str | None) -> str | None:
    """The source in a form that is valid in every working directory."""
    if source is None:
        return None
    path = expanded(source)
    return str(path.absolute()) if path.exists() else source


def open_source(cfg: TrainConfig, directory: Path | None = None) -> SparseAutoencoder:
    """The autoencoder that ``cfg.init_from`` names.

    directory: of the new run

    Raises:
        UserError: it cannot be read, or is in ``directory``, where it would be replaced.
    """
    assert cfg.init_from is not None
    path = expanded(cfg.init_from)
    if directory is not None and path.exists() and directory.resolve() in (path.resolve(), *path.resolve().parents):
        raise UserError(
            f"init_from is {cfg.init_from}, which the run in {directory} would replace; name another --out."
        )
    return load(cfg.init_from)


def adopted(cfg: TrainConfig, given: Collection[str]) -> TrainConfig:
    """``cfg`` with the architecture of the autoencoder that it starts from, but for the options in ``given``.

    given: dotted names of options that were asked for
    out: ``cfg`` itself without `init_from`

    Raises:
        UserError: the source cannot be read, an option does not fit it, or sae.k is needed and the source has none.
    """
    if cfg.init_from is None:
        return cfg
    source = open_source(cfg)
    own, activation = source.cfg, cfg.sae.activation if "sae.activation" in given else source.cfg.activation
    ours, kind = "trained_with" in source.metadata, KINDS[activation]
    for name, value in (("init", "tied"), ("encoder_scale", 1.0)):
        if f"sae.{name}" in given and getattr(cfg.sae, name) != value:
            raise UserError(
                f"sae.{name} is {getattr(cfg.sae, name)!r} with init_from {cfg.init_from}, whose weights the run "
                "starts from; leave one of them out."
            )
    values: dict[str, Any] = {"init": "tied", "encoder_scale": 1.0, "activation": activation}
    values |= {name: getattr(own, name) for name in ("d_in", "d_sae", "groups", "layer_norm", "apply_b_dec_to_input")}
    values |= {"input_scale": _input_scale(cfg, own)}
    values |= {"unit_norm_decoder": cfg.sae.unit_norm_decoder and _has_unit_rows(source)}
    if own.kind.threshold in ("token", "batch") or (ours and own.kind.k_sparse):
        values |= {"k": own.k}
    elif kind.k_sparse and "sae.k" not in given and not (kind.learned and cfg.objective.l0 > 0):
        raise UserError(
            f"{cfg.init_from} does not say how many of its features are active per token, and {activation} is trained "
            "to sae.k of them; give --sae.k."
        )
    values |= {"release_ratio": own.release_ratio} if own.kind.release else {}
    values |= {"bandwidth": own.bandwidth} if ours and own.kind.learned else {}
    if own.kind.rates and kind.rates:
        values |= {name: getattr(own, name) for name in ("support_bits", "amplitude_bits")}
    values |= {"hysteresis": "causal", "steering": "controller"}
    if kind.steered and own.kind.steered:
        values |= {"hysteresis": own.hysteresis if kind.rates or own.hysteresis != "path" else "causal"}
        values |= {"steering": "controller" if kind.rates else own.steering}
    values |= {"gate_gradient": own.gate_gradient if ours and own.kind.steered else 0.0}
    sae = replace(cfg.sae, **{name: value for name, value in values.items() if f"sae.{name}" not in given})
    out = replace(cfg, sae=sae)
    check_fits(out, source)
    return out


def field_names(given: Iterable[str]) -> set[str]:
    """The dotted names of fields of options given: `--sae.no-unit-norm-decoder` is for `sae.unit_norm_decoder`."""
    return {name.replace(".no_", ".") for name in given}


def _input_scale(cfg: TrainConfig, own: SAEConfig) -> float:
    """`sae.input_scale` in training: the source's, unless the run's normalization is to divide by it (`warm_start`)."""
    return own.input_scale if _is_homogeneous(own) or not cfg.normalize else 1.0


def _is_homogeneous(sae: SAEConfig) -> bool:
    return sae.kind.homogeneous and sae.layer_norm == "none"


def _has_unit_rows(source: SparseAutoencoder) -> bool:
    return bool(((source.W_dec.norm(dim=1) - 1).abs() < _UNIT).all())


def _is_uniform(threshold: Tensor) -> bool:
    return bool(torch.isclose(threshold, threshold[0], rtol=1e-4).all())


def check_fits(cfg: TrainConfig, source: SparseAutoencoder) -> None:
    """Raise `UserError`, one sentence, unless a run of ``cfg`` can start with the weights of ``source``."""
    sae, own = cfg.sae, source.cfg
    if cfg.target is not None or own.d_out:
        what = "the run" if cfg.target is not None else cfg.init_from
        raise UserError(f"{what} is a transcoder, which training starts from random weights; leave out init_from.")
    for name in ("d_in", "d_sae", "layer_norm"):
        here, there = getattr(sae, name), getattr(own, name)
        if here != there and (name, here) != ("d_in", 0):
            raise UserError(f"sae.{name} is {here!r}, but {cfg.init_from} has {there!r}; leave sae.{name} out.")
    if sae.kind.nonlinearity != own.kind.nonlinearity:
        raise UserError(
            f"sae.activation is {sae.activation!r}, but {cfg.init_from} has {own.activation!r}, whose features have "
            "another nonlinearity; leave sae.activation out."
        )
    if own.kind.recurrent and not sae.kind.recurrent:
        raise UserError(
            f"sae.activation is {sae.activation!r}, but {cfg.init_from} has {own.activation!r}, whose features are a "
            "recurrence along the sequence; leave sae.activation out."
        )
    if sae.input_scale != _input_scale(cfg, own):
        raise UserError(
            f"sae.input_scale is {sae.input_scale:g}, but {cfg.init_from} needs {_input_scale(cfg, own):g}; leave it "
            "out."
        )
    if sae.unit_norm_decoder and not _has_unit_rows(source):
        one_by_one = sae.kind.rescalable and not (sae.kind.shares_threshold or sae.kind.rates)
        if not one_by_one or sae.layer_norm != "none":
            raise UserError(
                f"sae.unit_norm_decoder is on, but decoder rows of {cfg.init_from} have other norms, and with "
                f"{sae.activation} features cannot be rescaled one by one; use "
                + ("another activation." if sae.kind.rates else "--sae.no-unit-norm-decoder.")
            )
        if zero := int((source.W_dec.norm(dim=1) == 0).sum()):
            raise UserError(
                f"sae.unit_norm_decoder is on, but {zero} decoder rows of {cfg.init_from} are 0; use "
                "--sae.no-unit-norm-decoder."
            )
    if sae.kind.steered and own.kind.release and not (sae.kind.rates and own.kind.rates):
        ratios = source.release / source.threshold.clamp(min=1e-30)
        if not _is_uniform(source.threshold) or not _is_uniform(ratios):
            raise UserError(
                f"{cfg.init_from} has a threshold for each feature, and {sae.activation} begins with one; use "
                "--sae.activation jumprelu_schmitt."
            )


def place_warnings(cfg: TrainConfig, source: SparseAutoencoder) -> Iterator[str]:
    """Guesses and differences about model and layer, as sentences.

    Raises:
        UserError: the source encodes another place than the run.
    """
    name = cfg.init_from or ""
    site, warnings = stated_site(name, source)
    yield from warnings
    place = cfg.place
    what = f"the output of block {cfg.layer}" if place.kind == "resid_post" else place.name
    if site is None:
        yield f"{name} does not say which layer it encodes; taken as {what}"
    elif site.key != place.key and None not in (site.block, place.block):
        advice = f"--layer {site.block}" + ("" if place.kind == "resid_post" else " --site resid_post")
        raise UserError(
            f"{name} encodes the output of block {site.block}, not of block {place.block}; train with {advice}."
        )
    elif site.key != place.key:
        raise UserError(
            f"{name} encodes {site.hook_name}, not {what}; train with --layer {site.layer} --site {site.option}."
        )
    if "model_name" not in source.metadata:
        yield f"{name} does not say which model it was trained on; taken as {cfg.model}"
    yield from warnings_about(name, source.metadata, cfg.model, done="fine-tuned")


def bos_warnings(cfg: TrainConfig, source: SparseAutoencoder, prefix: int | None) -> Iterator[str]:
    """Whether the source's sequences began otherwise, as a sentence.

    prefix: the token that begins the run's sequences; None if they begin with text
    """
    said, fed = source.metadata.get("prepend_bos"), prefix is not None
    if said is not None and said != fed:
        ways = ("without", "with")
        yield f"{cfg.init_from} was trained {ways[said]} BOS, and is fine-tuned {ways[fed]} it (text.prepend_bos)"


def open_checked(cfg: TrainConfig, directory: Path | None = None) -> SparseAutoencoder:
    """The autoencoder that ``cfg`` starts from, after all checks; warnings are logged.

    Raises:
        UserError: as `open_source`, `check_fits` and `place_warnings`.
    """
    source = open_source(cfg, directory)
    check_fits(cfg, source)
    for warning in place_warnings(cfg, source):
        log.warning("%s.", warning)
    return source


def differences(cfg: TrainConfig, source: SparseAutoencoder) -> list[str]:
    """The options that make features at step 0 differ from the source's, with both values; empty if none does."""
    sae, own = cfg.sae, source.cfg
    names = ["activation"]
    names += ["k"] if sae.kind.threshold == "token" else []
    names += ["release_ratio"] if sae.kind.release and own.kind.release else []
    names += ["hysteresis"] if sae.kind.steered and own.kind.steered else []
    names += ["amplitude_bits"] if sae.kind.rates and own.kind.rates else []
    pairs = [(name, getattr(sae, name), getattr(own, name)) for name in names]
    return [f"sae.{name} is {here} and was {there}" for name, here, there in pairs if here != there]


@torch.no_grad()
def warm_start(cfg: TrainConfig, source: SparseAutoencoder, normalizer: InputNormalizer) -> WarmStart:
    """The start of a run whose normalized autoencoder computes what ``source`` computes on raw activations.

    With ``x = c y + m`` the source's ``(x - b_dec) / s W_enc + b_enc`` is ``c`` times
    ``(y - b) / s W_enc + b_enc / c`` with ``b = (b_dec - m) / c``: biases and thresholds are divided by ``c``, and so
    are features. A nonlinearity that is not homogeneous (gelu, layer normalization) allows only ``c = s``, so the run's
    scale is then the source's `input_scale`; its features keep their units.

    cfg: checked by `check_fits`
    normalizer: mean m (d_in) and scale c, as estimated, or the identity
    """
    own, sae = source.cfg, SparseAutoencoder(cfg.sae)
    if cfg.normalize and not _is_homogeneous(own):
        normalizer = InputNormalizer(normalizer.mean, own.input_scale)
    mean, scale = normalizer.mean.double().cpu(), normalizer.scale
    gain = scale if _is_homogeneous(own) else 1.0
    old = source.b_dec.double()
    new = (old - mean) / scale
    b_enc = source.b_enc.double()
    if not (own.apply_b_dec_to_input and cfg.sae.apply_b_dec_to_input):
        shift = (mean + scale * new if cfg.sae.apply_b_dec_to_input else mean) - own.apply_b_dec_to_input * old
        b_enc = b_enc + (shift / own.input_scale) @ source.W_enc.double()
    norms = torch.ones(own.d_sae, dtype=torch.float64)
    if cfg.sae.unit_norm_decoder and not _has_unit_rows(source):
        norms = source.W_dec.double().norm(dim=1)
    sae.W_enc.copy_(source.W_enc * norms)
    sae.b_enc.copy_(b_enc * norms / gain)
    sae.W_dec.copy_(source.W_dec / norms[:, None])
    sae.b_dec.copy_(new)
    if own.kind.recurrent:
        sae.decay.copy_(source.decay)
        sae.update_threshold_parameters()
    return WarmStart(sae, normalizer, _set_thresholds(sae, source, norms / gain))


def _set_thresholds(sae: SparseAutoencoder, source: SparseAutoencoder, factor: Tensor) -> float | None:
    """Set thresholds to the source's times ``factor`` (d_sae), if both have some; where the controller starts."""
    kind, own = sae.cfg.kind, source.cfg.kind
    if kind.rates and own.rates:
        sae.threshold.copy_(source.threshold * factor)
        sae.release.copy_(source.release * factor)
        sae.rates.copy_(source.rates)
        sae.bit_price.copy_(source.bit_price * factor[0] ** 2)  # a common factor (`check_fits`)
        return None
    if not kind.stores_threshold or not own.stores_threshold or (kind.steered and not _is_uniform(source.threshold)):
        return None
    threshold = (source.threshold * factor).clamp(max=_INFINITE)
    sae.threshold.copy_(threshold)
    if kind.release:
        kept = own.release and sae.cfg.release_ratio == source.cfg.release_ratio
        release = source.release * factor if kept else threshold * sae.cfg.release_ratio
        sae.release.copy_(release.clamp(max=_INFINITE))
    sae.update_threshold_parameters()
    if not kind.steered and not kind.learned:
        return None
    # Of learned thresholds the controller moves a common factor, so that where it starts is no matter.
    return float(threshold[0] if kind.steered else threshold.clamp(min=1e-30).log().mean().exp())
