"""What `tsae.train` is asked for: a new run or sweep, one to continue, or an estimate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from tsae.config import TrainConfig
from tsae.presets import PRESETS, preset
from tsae.utils.config_json import from_dict, load_json


@dataclass
class Request(TrainConfig):
    """Train a temporal sparse autoencoder on a language model's activations.

    PRESET is a named configuration; every other option overrides one of its values.
    """

    preset: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PRESET", help=f"Configuration to start from: {', '.join(PRESETS)}."),
    ] = "demo"
    config: Path | None = None
    """Start from this JSON file instead, such as the config.json of a run."""
    out: Path | None = None
    """Run directory; default runs/PRESET/TIMESTAMP."""
    overwrite: bool = False
    """Replace an existing run in --out."""
    resume: Path | None = None
    """Resume the run or the sweep in this directory from its last checkpoint, with its own configuration."""
    dry_run: bool = False
    """Estimate memory, disk space and time, print them, and stop; writes nothing."""
    harvest_only: bool = False
    """Fill the cache (`--cache`) with the activations that the run or the sweep reads, and stop; trains nothing. Goes
    on with a cache that was begun (docs/cache.md)."""
    sweep: Path | None = None
    """Train every run of this YAML file on one stream of activations, into --out or runs/sweep-NAME/TIMESTAMP."""

    @classmethod
    def of(cls, base: TrainConfig) -> Request:
        """A new run with the values of ``base``."""
        return cls(**{f.name: getattr(base, f.name) for f in dataclasses.fields(TrainConfig)})

    @property
    def run(self) -> TrainConfig:
        """The configuration of a new run."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)})


def base_of(name: str, config: Path | None) -> TrainConfig:
    """What options override: a configuration file if there is one, else the preset ``name`` ("" is demo).

    Raises:
        UserError: there is no such preset or file, or the file is no configuration.
    """
    if config is None:
        return preset(name or "demo")
    base: TrainConfig = from_dict(TrainConfig, load_json(config))
    return replace(base, text=replace(base.text, threshold=None))  # the split of that run's text
