"""`python -m tsae.train [preset] [--options]`: the main job."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tsae.cli import parse, report_errors
from tsae.config import TrainConfig, from_dict, load_json
from tsae.errors import UserError
from tsae.presets import preset

__all__ = ["main"]


@dataclass
class Command(TrainConfig):
    """Train a temporal sparse autoencoder on a language model's activations.

    PRESET is demo, tsae-gemma-2-2b or tcsae-pythia-70m; every other option overrides one of its values.
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")] = "demo"
    """Configuration to start from: demo, tsae-gemma-2-2b, tcsae-pythia-70m."""
    config: Path | None = None
    """Start from this JSON file instead, such as a run's config.json."""
    out: Path | None = None
    """Run directory; default runs/PRESET/TIMESTAMP."""
    overwrite: bool = False
    """Replace the run that --out already holds."""
    resume: Path | None = None
    """Continue this run directory from its last checkpoint, with its own configuration."""


OWN_FIELDS = ("config", "out", "overwrite", "resume")
PROG = "python -m tsae.train"


def command(argv: list[str]) -> tuple[TrainConfig, Command]:
    """The configuration that the command line asks for, and the command itself.

    Options override the file of ``--config``, which overrides the preset.
    """
    asked = parse(Command, argv, _default(preset("demo")), PROG)
    if asked.config is not None:
        base = from_dict(TrainConfig, load_json(asked.config))
    elif asked.preset != "demo":
        base = preset(asked.preset)
    else:
        base = preset("demo")
    asked = parse(Command, argv, _default(base), PROG)
    values = {f.name: getattr(asked, f.name) for f in dataclasses.fields(TrainConfig)}
    return TrainConfig(**values | {"preset": base.preset}), asked


def _default(base: TrainConfig) -> Command:
    return Command(**{f.name: getattr(base, f.name) for f in dataclasses.fields(TrainConfig)})


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    with report_errors() as status:
        cfg, asked = command(argv)
        # Imported here, so that --help and a misspelt option answer at once.
        from tsae.directories import new_directory
        from tsae.progress import console
        from tsae.run import run
        from tsae.table import print_table

        if asked.resume is not None:
            cfg, directory = _resumed(asked, argv)
        else:
            directory = new_directory(cfg.preset, asked.out, overwrite=asked.overwrite)
        result = run(cfg, directory, resume=asked.resume is not None)
        if result is not None:
            print_table(result.metrics)
        console.print(f"Written: {directory}", soft_wrap=True)
    return status.code


def _resumed(asked: Command, argv: list[str]) -> tuple[TrainConfig, Path]:
    directory: Any = asked.resume
    others = [a for a in argv if a.startswith("-") and a.split("=")[0] != "--resume"]
    if others:
        raise UserError(f"--resume takes the run's own configuration; leave out {' '.join(others)}.")
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no run to resume; it has no config.json.")
    return from_dict(TrainConfig, load_json(directory / "config.json")), directory


if __name__ == "__main__":
    sys.exit(main())
