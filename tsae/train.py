"""`python -m tsae.train [preset] [--options]`: the main job."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from tsae.config import TrainConfig
from tsae.presets import PRESETS, at_length, preset
from tsae.utils.cli import RESUME, parse, report_errors
from tsae.utils.config_json import from_dict, load_json


@dataclass
class Command(TrainConfig):
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
    sweep: Path | None = None
    """Train every run of this YAML file on one stream of activations, into --out or runs/sweep-NAME/TIMESTAMP."""


PROG = "python -m tsae.train"


def command(argv: list[str]) -> tuple[TrainConfig, Command]:
    """The configuration of the run, and the command line itself (preset "" if none is given).

    Options override the file of ``--config``, which overrides the preset; either is taken `at_length`.
    """
    # The first pass finds what to start from, so that --help can show its values.
    without_help = [a for a in argv if a not in ("-h", "--help")]
    start = parse(Command, without_help, replace(_default(preset("demo")), preset="", length=0), PROG)
    if start.config is not None:
        base = from_dict(TrainConfig, load_json(start.config))
        base = replace(base, text=replace(base.text, threshold=None))  # the split of that run's text
    else:
        base = preset(start.preset or "demo")
    if start.length:  # given
        base = at_length(base, start.length)
    # --help alone: tyro leaves arguments that are given out of the help.
    asked = parse(Command, argv if without_help == argv else ["--help"], _default(base), PROG)
    values = {f.name: getattr(asked, f.name) for f in dataclasses.fields(TrainConfig)}
    return TrainConfig(**values | {"preset": base.preset}), replace(asked, preset=start.preset)


def _default(base: TrainConfig) -> Command:
    return Command(**{f.name: getattr(base, f.name) for f in dataclasses.fields(TrainConfig)})


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    with report_errors(RESUME) as status:
        cfg, asked = command(argv)
        from tsae.training.command import train  # here, so that --help and a misspelt option answer at once

        train(cfg, asked, argv)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
