"""What `tsae.train` does once its command line is parsed: new runs and sweeps, resumed ones, and dry runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.parallel.processes import broadcast_from_rank0, processes
from tsae.reports.table import print_table
from tsae.rundir import layout
from tsae.rundir.directory import new_directory
from tsae.training.dry_run import dry_run, print_estimate
from tsae.training.init_from import adopted, given_options
from tsae.training.job import Job
from tsae.training.run import owning_on_rank0, run_job
from tsae.training.sweep import print_sweep, read_runs, run_sweep, sweep_directory
from tsae.training.sweep_file import read_sweep
from tsae.utils.cli import only_options
from tsae.utils.config_json import from_dict, load_json
from tsae.utils.nested import flatten
from tsae.utils.output import say
from tsae.utils.torchrun import is_rank0, world_size

if TYPE_CHECKING:
    from tsae.train import Command

PARALLEL = ("--parallel.features", "--parallel.timeout")  # what --resume may change


def train(cfg: TrainConfig, asked: Command, argv: list[str]) -> None:
    """Train, or with ``--dry-run`` estimate, and print the metrics.

    cfg, asked, argv: the configuration, the parsed command line, and its words

    Raises:
        UserError: options that do not go together, or a model or text that cannot be used.
    """
    runs = _runs(cfg, asked, argv)
    with processes(max(each.parallel.timeout for each in runs.values())):
        job = Job(runs, asked.resume or broadcast_from_rank0(lambda: _new_directory(cfg, asked)))
        if asked.dry_run:
            print_estimate(dry_run(job), job)
            return
        with owning_on_rank0(job.directory):
            broadcast_from_rank0(lambda: _check_as_before(job, cfg, asked, argv))
            _train(job, resume=asked.resume is not None)
    say(f"Written: {job.directory}")


def _check_as_before(job: Job, cfg: TrainConfig, asked: Command, argv: list[str]) -> None:
    """Raise `UserError` if the directory, which this process now owns, is not as it was when the command was read."""
    if asked.resume is None:
        if asked.out is not None:
            _new_directory(cfg, asked)
    elif _runs(cfg, asked, argv) != job.runs:
        raise UserError(f"Another process has just changed the run {job.directory}; start again.")


def _train(job: Job, *, resume: bool) -> None:
    """Train and evaluate, then print; metrics that cannot be written are printed before the error is raised."""
    if job.is_sweep:
        run_sweep(job, resume=resume)
        if is_rank0():
            print_sweep(job.directory)
        return
    outcome = run_job(job, resume=resume)[""]
    if not is_rank0():
        return
    if outcome.evaluation is not None:
        print_table(outcome.evaluation.metrics)
    if outcome.error is not None:
        raise outcome.error


def _runs(cfg: TrainConfig, asked: Command, argv: list[str]) -> dict[str, TrainConfig]:
    """The configurations to train, by name: those of a sweep, or one with the name ""."""
    if asked.resume is not None and _is_sweep(asked.resume):
        only_options(argv, ("--resume", *PARALLEL), "--resume takes the sweep's own configuration")
        return {name: _on_other_processes(each, asked, argv) for name, each in read_runs(asked.resume).items()}
    if asked.sweep is not None:
        only_options(argv, ("--sweep", "--out", "--overwrite", "--dry-run"), "The options of a sweep are in its file")
        return read_sweep(asked.sweep)
    if asked.resume is not None:
        return {"": _resumed(asked.resume, asked, argv)}
    in_file = {} if asked.config is None else flatten(load_json(asked.config))
    return {"": adopted(cfg, given_options(argv) | set(in_file))}


def _new_directory(cfg: TrainConfig, asked: Command) -> Path:
    if asked.sweep is not None:
        return sweep_directory(asked.sweep.stem, asked.out, overwrite=asked.overwrite)
    return new_directory(cfg.preset, asked.out, overwrite=asked.overwrite)


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
