"""What a command measures: autoencoders of one place, and the language model whose activations they encode.

Every command opens its subject here, so that all make the same checks in the same order: first the files, then, with
the language model loaded, its layer, its context and the widths. No text goes through the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.evaluation.places import (
    bos_warnings,
    called,
    common_site,
    length_warnings,
    stated_site,
    use_bos,
    warnings_about,
)
from tsae.formats import load
from tsae.lm.hook_points import find
from tsae.lm.loading import LanguageModel, absolute_name, load_language_model
from tsae.lm.site import KINDS, Site, as_site, from_hook_name, from_option
from tsae.lm.trial_run import check_order, check_site, site_width
from tsae.rundir import layout
from tsae.rundir.directory import read_config
from tsae.sae.metadata import site_of, target_of
from tsae.sae.model import SparseAutoencoder
from tsae.utils.device import resolve_device
from tsae.utils.paths import expanded

Place = TypeVar("Place", str, Path)
logger = logging.getLogger(__name__)


@dataclass
class Subject:
    """Autoencoders of one place in one language model."""

    saes: dict[str, SparseAutoencoder]
    """By name, in `eval()` mode."""
    config: TrainConfig
    """The language model, place, text and sizes to measure with."""
    runs: dict[str, TrainConfig]
    """The configurations of those that are runs, by the same names."""

    @property
    def sae(self) -> SparseAutoencoder:
        """The one autoencoder."""
        (sae,) = self.saes.values()
        return sae

    def load_lm(self, device: str | None = None) -> LanguageModel:
        """Load the language model, check that the autoencoders fit it, and move them to its device.

        device: as on the command line; None takes the configuration's, and its `lm_device_map`

        Raises:
            UserError: the model or the device cannot be used, the model has no such place, cannot be run there or
                takes fewer tokens, or a width differs.
        """
        config = self.config
        if device is not None:
            config = replace(config, lm_device_map="none")
        else:
            device = config.device if config.lm_device == "auto" else config.lm_device
        where = resolve_device(device)
        lm = load_language_model(config.model, device=where, prepend_bos=use_bos(self.saes), **config.lm_options)
        check_site(lm, config.place, 1 + config.length)
        if config.target_place is not None:
            check_order(lm, config.place, config.target_place)
        others = {name: sae for name, sae in self.saes.items() if name not in self.runs}
        _warn([*bos_warnings(self.saes, lm.prefix_id, lm.name), *length_warnings(others, config.length)])
        for name, sae in self.saes.items():
            check_module(name, sae, lm, config.place, config.target_place)
            check_width(sae, lm, config.place, name, config.target_place)
            sae.to(lm.device)
        return lm


def open_run(run: Path) -> Subject:
    """The autoencoder of a run, named after its directory.

    Raises:
        UserError: the directory is not a run's, or training has not finished.
    """
    if not run.is_dir():
        raise UserError(f"There is no run directory {run}; name the directory that training wrote.")
    if not (run / layout.CONFIG).is_file():
        if (run / layout.SWEEP).is_file():
            raise UserError(f"{run} is a sweep's directory; name one of the runs in it.")
        raise UserError(
            f"{run} is not a run directory (it has no config.json); name the directory that training wrote, or pass "
            "another autoencoder to python -m tsae.evaluate with --model and --layer."
        )
    config = read_config(run)
    if not layout.has_autoencoder(run):
        raise UserError(f"{run} has no trained autoencoder in sae/; let training finish, or resume it.")
    name = run.absolute().name
    saes = {name: SparseAutoencoder.load(run / layout.AUTOENCODER)}
    return _subject(saes, config, {name: config}, config.place)


def _subject(
    saes: dict[str, SparseAutoencoder],
    config: TrainConfig,
    runs: dict[str, TrainConfig],
    asked: Site | None = None,
    layer: int | None = None,
) -> Subject:
    """A subject measured at ``asked``, or where the autoencoders say, after a comparison with what they say.

    layer: `--layer` without `--site`
    """
    sites: dict[str, Site | None] = {}
    for name, sae in saes.items():
        sites[name], warnings = stated_site(name, sae)
        _warn(warnings)
        if sites[name] is None and name in runs:
            sites[name] = runs[name].place
    if asked is None and layer is None and all(site is None for site in sites.values()):
        raise UserError(f"{next(iter(saes))} does not say which layer it encodes; name it with --layer.")
    site = common_site(sites, saes, asked, layer)
    config = replace(config, layer=site.number, site=site.option, target=_common_target(saes, runs))
    if asked is None and (layer is None or site.kind != "resid_post"):
        silent = [name for name, said in sites.items() if said is None]
        taken = config.layer if site.kind == "resid_post" else site.described
        _warn(f"{name} does not say which layer it encodes; taken as {taken}, as the others" for name in silent)
    for name, sae in saes.items():
        _warn(warnings_about(name, sae.metadata, config.model))
    return Subject(saes, config, runs)


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        logger.warning("%s.", warning)


def open_autoencoders(
    sources: Sequence[str], model: str | None = None, layer: int | None = None, site: str | None = None
) -> Subject:
    """Autoencoders in any known format, named by the last part of their paths, or by all of it where two share that.

    sources: run directories, other directories, or `OWNER/NAME/FOLDER` on the hub
    model, layer, site: what they encode, as `--model`, `--layer` and `--site`; None takes the model of the runs among
        them, and the place that they name; a layer without a site, the place in it that they name

    Raises:
        UserError: an autoencoder is named twice or cannot be read, what they encode is unknown or differs, it is no
            place of a decoder block, or it is another one than was asked for.
    """
    if len(set(sources)) < len(sources):
        raise UserError(f"{next(s for s in sources if sources.count(s) > 1)} is named twice; name each once.")
    places = by_name(sources, [Path(source).absolute().name for source in sources])
    saes = {name: load(source, finite=False) for name, source in places.items()}
    found = {name: _config_of(source) for name, source in places.items()}
    runs = {name: config for name, config in found.items() if config is not None}
    if model is None and not runs:
        said = next(iter(saes.values())).metadata.get("model_name")  # of sources[0]
        hint = f" (its file says {said})" if said else ""
        raise UserError(f"{sources[0]} is not a run, so its model is not known; name it with --model{hint}.")
    models = {name: config.model for name, config in runs.items()}
    if model is None and len(set(models.values())) > 1:
        each = ", ".join(f"{name}: {value}" for name, value in models.items())
        raise UserError(f"The runs differ in their model ({each}); compare only runs with the same model.")
    config = next(iter(runs.values()), TrainConfig())
    if model is not None:
        trusted = config.trust_remote_code and absolute_name(model) == absolute_name(config.model)
        config = replace(config, model=model, revision=None, trust_remote_code=trusted)
    return _subject(saes, config, runs, _asked(site, layer, saes), layer)


def _common_target(saes: dict[str, SparseAutoencoder], runs: dict[str, TrainConfig]) -> str | None:
    """What the transcoders among ``saes`` predict, as `TrainConfig.target`; None if all are autoencoders.

    Raises:
        UserError: they predict different places, only some are transcoders, or one does not say what it predicts.
    """
    targets: dict[str, Site | None] = {}
    for name, sae in saes.items():
        targets[name] = None
        if sae.cfg.d_out:
            target = target_of(sae.metadata) or (runs[name].target_place if name in runs else None)
            if target is None:
                raise UserError(f"{called(name)} is a transcoder that does not say what it predicts (hook_name_out).")
            if not target.locatable:
                raise UserError(f"{called(name)} predicts {target.name}, which this version cannot measure.")
            targets[name] = target
    if len({None if target is None else target.key for target in targets.values()}) > 1:
        each = ", ".join(f"{name}: {'nothing else' if t is None else t.name}" for name, t in targets.items())
        raise UserError(f"The autoencoders predict different places ({each}); measure those of one place at a time.")
    common = next(iter(targets.values()))
    return None if common is None else common.written


def _asked(site: str | None, layer: int | None, saes: dict[str, SparseAutoencoder]) -> Site | None:
    """The place that `--site` and `--layer` name; without `--layer` in the block that the path or the first file names.

    None without `--site`.
    """
    if site is None:
        return None
    if layer is None and site not in KINDS:
        layer = from_hook_name(site).layer
    if layer is None:
        said = site_of(next(iter(saes.values())).metadata)
        layer = None if said is None else said.layer
    if layer is None:
        raise UserError(f"--site {site} names no block; add --layer.")
    return from_option(site, layer)


def check_module(
    name: str,
    sae: SparseAutoencoder,
    lm: LanguageModel,
    place: Site,
    target: Site | None = None,
    advice: str = "measure them one at a time",
) -> None:
    """Raise `UserError` if a place that an autoencoder names is another tensor of this model than ``place``.

    Names of the same kind may differ: in Gemma `model.layers.3.mlp` is not what the MLP adds to the residual stream.

    target: what a transcoder is to predict
    advice: what to do
    """
    pairs = [("encodes", site_of(sae.metadata), place)]
    pairs += [] if target is None else [("predicts", target_of(sae.metadata), target)]
    for does, said, wanted in pairs:
        if said is None or said.kind == "mlp_in" or said.block is not None:
            continue
        if not find(lm, said).same(find(lm, wanted)):
            raise UserError(
                f"{called(name)} {does} {said.name}, which in {lm.name} is another tensor than {wanted.name}; {advice}."
            )


def by_name(places: Sequence[Place], names: Sequence[str]) -> dict[str, Place]:
    """Places by their short names, or by their full paths where two share a name."""
    return {name if names.count(name) == 1 else str(place): place for place, name in zip(places, names, strict=True)}


def _config_of(source: str) -> TrainConfig | None:
    """The configuration of the run that ``source``, or its parent directory, is; None if neither is a run."""
    place = expanded(source)
    for run in (place, place.parent):
        if (run / layout.CONFIG).is_file() and layout.has_autoencoder(run):
            return read_config(run)
    return None


def check_width(
    sae: SparseAutoencoder, lm: LanguageModel, place: int | Site, name: str, target: Site | None = None
) -> None:
    """Raise `UserError` unless the autoencoder has the width of the activations at a place of the language model.

    place: a block, for its output, or a `Site`
    name: of the autoencoder, for the message; may be empty
    target: of a transcoder, whose output must have that width
    """
    width, site = site_width(lm, place), as_site(place)
    if sae.cfg.d_in != width:
        where = f"the blocks of {lm.name} put out" if site.kind == "resid_post" else f"{site.name} of {lm.name} has"
        raise UserError(
            f"{f'The autoencoder {name}'.strip()} takes activations of width {sae.cfg.d_in}, but "
            f"{where} {width}; name the model that it was trained on."
        )
    if (target is None) != (sae.cfg.d_out == 0):
        what = "a transcoder, and no target is named" if sae.cfg.d_out else "no transcoder, but a target is named"
        raise UserError(f"{called(name)} is {what}; measure transcoders of one site and target together, alone.")
    if target is not None and sae.cfg.d_out != site_width(lm, target):
        raise UserError(
            f"{called(name)} predicts activations of width {sae.cfg.d_out}, but {target.name} of {lm.name} has "
            f"{site_width(lm, target)}; name the model that it was trained on."
        )
