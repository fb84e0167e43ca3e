"""What a command measures: autoencoders of one layer, and the language model whose activations they encode.

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
    common_block,
    length_warnings,
    stated_block,
    use_bos,
    warnings_about,
)
from tsae.formats import load
from tsae.lm.loading import LanguageModel, absolute_name, load_language_model
from tsae.lm.trial_run import check_site, site_width
from tsae.rundir import layout
from tsae.rundir.directory import read_config
from tsae.sae.model import SparseAutoencoder
from tsae.utils.device import resolve_device
from tsae.utils.paths import expanded

Place = TypeVar("Place", str, Path)
logger = logging.getLogger(__name__)


@dataclass
class Subject:
    """Autoencoders of one layer of one language model."""

    saes: dict[str, SparseAutoencoder]
    """By name, in `eval()` mode."""
    config: TrainConfig
    """The language model, layer, text and sizes to measure with."""
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
            UserError: the model or the device cannot be used, the model has no such layer, cannot be run there or
                takes fewer tokens, or a width differs.
        """
        config = self.config
        if device is not None:
            config = replace(config, lm_device_map="none")
        else:
            device = config.device if config.lm_device == "auto" else config.lm_device
        where = resolve_device(device)
        lm = load_language_model(config.model, device=where, prepend_bos=use_bos(self.saes), **config.lm_options)
        check_site(lm, config.layer, 1 + config.length)
        others = {name: sae for name, sae in self.saes.items() if name not in self.runs}
        _warn([*bos_warnings(self.saes, lm.prefix_id, lm.name), *length_warnings(others, config.length)])
        for name, sae in self.saes.items():
            check_width(sae, lm, config.layer, name)
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
    return _subject(saes, config, {name: config}, config.layer)


def _subject(
    saes: dict[str, SparseAutoencoder], config: TrainConfig, runs: dict[str, TrainConfig], layer: int | None
) -> Subject:
    """A subject measured at ``layer``, or where the autoencoders say, after a comparison with what they say."""
    blocks: dict[str, int | None] = {}
    for name, sae in saes.items():
        blocks[name], warnings = stated_block(name, sae)
        _warn(warnings)
        if blocks[name] is None and name in runs:
            blocks[name] = runs[name].layer
    if layer is None and all(block is None for block in blocks.values()):
        raise UserError(f"{next(iter(saes))} does not say which layer it encodes; name it with --layer.")
    config = replace(config, layer=common_block(blocks, layer, saes))
    if layer is None:
        silent = [name for name, block in blocks.items() if block is None]
        _warn(f"{name} does not say which layer it encodes; taken as {config.layer}, as the others" for name in silent)
    for name, sae in saes.items():
        _warn(warnings_about(name, sae.metadata, config.model))
    return Subject(saes, config, runs)


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        logger.warning("%s.", warning)


def open_autoencoders(sources: Sequence[str], model: str | None = None, layer: int | None = None) -> Subject:
    """Autoencoders in any known format, named by the last part of their paths, or by all of it where two share that.

    sources: run directories, other directories, or `OWNER/NAME/FOLDER` on the hub
    model, layer: what they encode; None takes the model of the runs among them, and the layer that they name

    Raises:
        UserError: an autoencoder is named twice or cannot be read, what they encode is unknown or differs, it is no
            block's output, or it is another layer than was asked for.
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
    return _subject(saes, config, runs, layer)


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


def check_width(sae: SparseAutoencoder, lm: LanguageModel, layer: int, name: str) -> None:
    """Raise `UserError` unless the autoencoder has the width of what block ``layer`` of the language model puts out.

    name: of the autoencoder, for the message; may be empty
    """
    width = site_width(lm, layer)
    if sae.cfg.d_in != width:
        raise UserError(
            f"{f'The autoencoder {name}'.strip()} takes activations of width {sae.cfg.d_in}, but the blocks of "
            f"{lm.name} put out {width}; name the model that it was trained on."
        )
