"""What a command measures: autoencoders of one layer, and the language model whose activations they encode.

Every command opens its subject here, so that all make the same checks in the same order: first the files, then, with
the language model loaded, its layer, its context and the widths. No text goes through the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tsae.config import LENGTH, TrainConfig
from tsae.errors import UserError
from tsae.formats import load
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.lm.site import check_site, site_width
from tsae.rundir import layout
from tsae.rundir.directory import read_config
from tsae.sae.model import SparseAutoencoder
from tsae.utils.device import resolve_device
from tsae.utils.paths import expanded

Place = TypeVar("Place", str, Path)


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

        device: as on the command line; None takes the configuration's

        Raises:
            UserError: the model or the device cannot be used, the model has no such layer, cannot be run there or
                takes fewer tokens, or a width differs.
        """
        config = self.config
        if device is None:
            device = config.device if config.lm_device == "auto" else config.lm_device
        where = resolve_device(device)
        lm = load_language_model(config.model, device=where, dtype=config.lm_dtype, revision=config.revision)
        check_site(lm, config.layer, 1 + LENGTH)
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
    return Subject({name: SparseAutoencoder.load(run / layout.AUTOENCODER)}, config, {name: config})


def open_autoencoders(sources: Sequence[str], model: str | None = None, layer: int | None = None) -> Subject:
    """Autoencoders in any known format, named by the last part of their paths, or by all of it where two share that.

    sources: run directories, other directories, or `OWNER/NAME/FOLDER` on the hub
    model, layer: what they encode; None takes the value of the runs among them

    Raises:
        UserError: an autoencoder is named twice or cannot be read, or what they encode is unknown or differs.
    """
    if len(set(sources)) < len(sources):
        raise UserError(f"{next(s for s in sources if sources.count(s) > 1)} is named twice; name each once.")
    places = by_name(sources, [Path(source).absolute().name for source in sources])
    saes = {name: load(source) for name, source in places.items()}
    found = {name: _config_of(source) for name, source in places.items()}
    runs = {name: config for name, config in found.items() if config is not None}
    given = {name: value for name, value in (("model", model), ("layer", layer)) if value is not None}
    missing = {"model", "layer"} - given.keys()
    if missing and not runs:
        wanted = " and ".join(f"--{name}" for name in ("model", "layer") if name in missing)
        raise UserError(f"{sources[0]} is not a run, so it does not say what it encodes; name it with {wanted}.")
    for field in missing:
        values = {name: getattr(config, field) for name, config in runs.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise UserError(f"The runs differ in their {field} ({said}); compare only runs with the same {field}.")
    config = replace(next(iter(runs.values()), TrainConfig()), **given)
    return Subject(saes, config if model is None else replace(config, revision=None), runs)


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
