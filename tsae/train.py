"""`python -m tsae.train [preset] [--options]`: the main job."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.presets import preset
from tsae.rundir import layout
from tsae.utils.cli import RESUME, only_options, parse, report_errors
from tsae.utils.config_json import from_dict, load_json


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
    """Continue this directory of a run or a sweep from its last checkpoint, with its own configuration."""
    dry_run: bool = False
    """Print what the run would take in memory, on disk and in time, and stop; nothing is written."""
    sweep: Path | None = None
    """Train every run of this YAML file on one stream of activations, into --out or runs/sweep-NAME/TIMESTAMP."""


PROG = "python -m tsae.train"
PARALLEL = ("--parallel.features", "--parallel.timeout")  # what a run can be gone on with otherwise


def command(argv: list[str]) -> tuple[TrainConfig, Command]:
    """The configuration that the command line asks for, and the command itself (its preset "" where none is named).

    Options override the file of ``--config``, which overrides the preset.
    """
    # First for what to start from, so that --help then shows its values.
    without_help = [a for a in argv if a not in ("-h", "--help")]
    start = parse(Command, without_help, replace(_default(preset("demo")), preset=""), PROG)
    if start.config is not None:
        base = from_dict(TrainConfig, load_json(start.config))
        base = replace(base, text=replace(base.text, threshold=None))  # of that run's text, which may not be this one's
    else:
        base = preset(start.preset or "demo")
    # Alone: tyro leaves an argument that it has seen out of the help.
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
        if asked.sweep is not None or _is_sweep(asked.resume):
            _sweep(asked, argv)
            return status.code
        # Imported here, so that --help and a misspelt option answer at once.
        from tsae.parallel.processes import broadcast_from_rank0, processes
        from tsae.reports.table import print_table
        from tsae.rundir.directory import new_directory
        from tsae.training.run import run
        from tsae.utils.progress import console

        if asked.resume is not None:
            cfg, directory = _resumed(asked, argv)
        with processes(cfg.parallel.timeout):
            if asked.resume is None:
                directory = broadcast_from_rank0(
                    lambda: new_directory(cfg.preset, asked.out, overwrite=asked.overwrite)
                )
            if asked.dry_run:
                _dry_run({"": cfg}, directory)
                return status.code
            result = run(cfg, directory, resume=asked.resume is not None)
            if result is not None:
                print_table(result.metrics)
            console.print(f"Written: {directory}", soft_wrap=True)
    return status.code


def _resumed(asked: Command, argv: list[str]) -> tuple[TrainConfig, Path]:
    directory: Any = asked.resume
    only_options(argv, ("--resume", *PARALLEL), "--resume takes the run's own configuration")
    if not (directory / layout.CONFIG).is_file():
        raise UserError(f"{directory} holds no run to resume; it has no config.json.")
    if _is_sweep(directory.resolve().parent):
        raise UserError(f"{directory} is part of a sweep; go on with all of it, --resume {directory.resolve().parent}.")
    cfg = from_dict(TrainConfig, load_json(directory / layout.CONFIG))
    if asked.preset not in ("", cfg.preset):
        raise UserError(f"{directory} is a run of the preset {cfg.preset!r}, not {asked.preset!r}; leave the name out.")
    return _on_other_processes(cfg, asked, argv), directory


def _on_other_processes(cfg: TrainConfig, asked: Command, argv: list[str]) -> TrainConfig:
    """The configuration of a run that is gone on with, with the options of ``argv`` in ``PARALLEL``.

    A dictionary that was split is whole again in one process.
    """
    from tsae.parallel.environment import world_size

    given = {name.split("=")[0] for name in argv}
    parallel = cfg.parallel
    for name in PARALLEL:
        if name in given:
            field = name.split(".")[1]
            parallel = replace(parallel, **{field: getattr(asked.parallel, field)})
    if PARALLEL[0] not in given and world_size() == 1:
        parallel = replace(parallel, features=1)
    return replace(cfg, parallel=parallel)


def _dry_run(cfgs: dict[str, TrainConfig], directory: Path) -> None:
    from tsae.parallel.environment import world_size
    from tsae.training.dry_run import dry_run, print_estimate

    if world_size() > 1:
        raise UserError("--dry-run reckons for one process; start it without torchrun.")

    print_estimate(dry_run(cfgs, directory), next(iter(cfgs.values())))


def _is_sweep(directory: Path | None) -> bool:
    return directory is not None and (directory / layout.SWEEP).is_file()


def _sweep(asked: Command, argv: list[str]) -> None:
    from tsae.parallel.environment import is_rank0
    from tsae.parallel.processes import broadcast_from_rank0, processes
    from tsae.training.sweep import print_sweep, read_runs, read_sweep, run_sweep, sweep_directory
    from tsae.utils.progress import console

    sweep, out = asked.sweep, asked.out
    if asked.resume is not None:
        only_options(argv, ("--resume", *PARALLEL), "--resume takes the sweep's own configuration")
        cfgs = {name: _on_other_processes(cfg, asked, argv) for name, cfg in read_runs(asked.resume).items()}
    else:
        assert sweep is not None
        only_options(argv, ("--sweep", "--out", "--overwrite", "--dry-run"), "The options of a sweep stand in its file")
        cfgs = read_sweep(sweep)
    with processes(next(iter(cfgs.values())).parallel.timeout):
        if asked.resume is not None:
            directory = asked.resume
        else:
            assert sweep is not None
            directory = broadcast_from_rank0(lambda: sweep_directory(sweep.stem, out, overwrite=asked.overwrite))
        if asked.dry_run:
            _dry_run(cfgs, directory)
            return
        run_sweep(cfgs, directory, resume=asked.resume is not None)
        if is_rank0():
            print_sweep(directory)
        console.print(f"Written: {directory}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
