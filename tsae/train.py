"""`python -m tsae.train [preset] [--options]`: the main job."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.presets import preset
from tsae.rundir import layout
from tsae.utils.cli import RESUME, only_options, parse, report_errors
from tsae.utils.config_json import from_dict, load_json
from tsae.utils.torchrun import world_size

if TYPE_CHECKING:
    from tsae.training.job import Job


@dataclass
class Command(TrainConfig):
    """Train a temporal sparse autoencoder on a language model's activations.

    PRESET is demo, tsae-gemma-2-2b or tcsae-pythia-70m; every other option overrides one of its values.
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")] = "demo"
    """Configuration to start from: demo, tsae-gemma-2-2b or tcsae-pythia-70m."""
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
PARALLEL = ("--parallel.features", "--parallel.timeout")  # what --resume may change


def command(argv: list[str]) -> tuple[TrainConfig, Command]:
    """The configuration of the run, and the command line itself (preset "" if none is given).

    Options override the file of ``--config``, which overrides the preset.
    """
    # The first pass finds what to start from, so that --help can show its values.
    without_help = [a for a in argv if a not in ("-h", "--help")]
    start = parse(Command, without_help, replace(_default(preset("demo")), preset=""), PROG)
    if start.config is not None:
        base = from_dict(TrainConfig, load_json(start.config))
        base = replace(base, text=replace(base.text, threshold=None))  # the split of that run's text
    else:
        base = preset(start.preset or "demo")
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
        # Imported here, so that --help and a misspelt option answer at once.
        from tsae.parallel.processes import broadcast_from_rank0, processes
        from tsae.training.job import Job
        from tsae.utils.progress import console

        runs = _runs(cfg, asked, argv)
        with processes(max(each.parallel.timeout for each in runs.values())):
            job = Job(runs, asked.resume or broadcast_from_rank0(lambda: _new_directory(cfg, asked)))
            if asked.dry_run:
                from tsae.training.dry_run import dry_run, print_estimate

                print_estimate(dry_run(job), job)
            else:
                _train(job, resume=asked.resume is not None)
                console.print(f"Written: {job.directory}", soft_wrap=True)
    return status.code


def _runs(cfg: TrainConfig, asked: Command, argv: list[str]) -> dict[str, TrainConfig]:
    """The configurations to train, by name: those of a sweep, or one with the name ""."""
    from tsae.training.sweep import read_runs
    from tsae.training.sweep_file import read_sweep

    if asked.resume is not None and _is_sweep(asked.resume):
        only_options(argv, ("--resume", *PARALLEL), "--resume takes the sweep's own configuration")
        return {name: _on_other_processes(each, asked, argv) for name, each in read_runs(asked.resume).items()}
    if asked.sweep is not None:
        only_options(argv, ("--sweep", "--out", "--overwrite", "--dry-run"), "The options of a sweep are in its file")
        return read_sweep(asked.sweep)
    return {"": cfg if asked.resume is None else _resumed(asked.resume, asked, argv)}


def _new_directory(cfg: TrainConfig, asked: Command) -> Path:
    from tsae.rundir.directory import new_directory
    from tsae.training.sweep import sweep_directory

    if asked.sweep is not None:
        return sweep_directory(asked.sweep.stem, asked.out, overwrite=asked.overwrite)
    return new_directory(cfg.preset, asked.out, overwrite=asked.overwrite)


def _train(job: Job, *, resume: bool) -> None:
    """Train, and print the metrics."""
    from tsae.reports.table import print_table
    from tsae.training.run import run
    from tsae.training.sweep import print_sweep, run_sweep
    from tsae.utils.torchrun import is_rank0

    if job.is_sweep:
        run_sweep(job, resume=resume)
        if is_rank0():
            print_sweep(job.directory)
    else:
        result = run(job.shared, job.directory, resume=resume)
        if result is not None:
            print_table(result.metrics)


def _resumed(directory: Path, asked: Command, argv: list[str]) -> TrainConfig:
    only_options(argv, ("--resume", *PARALLEL), "--resume takes the run's own configuration")
    if not (directory / layout.CONFIG).is_file():
        raise UserError(f"{directory} holds no run to resume; it has no config.json.")
    if _is_sweep(directory.resolve().parent):
        raise UserError(f"{directory} is part of a sweep; resume the sweep, --resume {directory.resolve().parent}.")
    cfg = from_dict(TrainConfig, load_json(directory / layout.CONFIG))
    if asked.preset not in ("", cfg.preset):
        raise UserError(f"{directory} is a run of the preset {cfg.preset!r}, not {asked.preset!r}; leave the name out.")
    return _on_other_processes(cfg, asked, argv)


def _on_other_processes(cfg: TrainConfig, asked: Command, argv: list[str]) -> TrainConfig:
    """The configuration of a resumed run, with the options of ``argv`` in ``PARALLEL``.

    A sharded dictionary becomes a complete one on a single process.
    """
    given = {name.split("=")[0] for name in argv}
    parallel = cfg.parallel
    for name in PARALLEL:
        if name in given:
            field = name.split(".")[1]
            parallel = replace(parallel, **{field: getattr(asked.parallel, field)})
    if PARALLEL[0] not in given and world_size() == 1:
        parallel = replace(parallel, features=1)
    return replace(cfg, parallel=parallel)


def _is_sweep(directory: Path) -> bool:
    return (directory / layout.SWEEP).is_file()


if __name__ == "__main__":
    sys.exit(main())
