"""Training as asked for by a `Request`: new runs and sweeps, resumed ones, and dry runs. Prints no result."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.parallel.processes import broadcast_from_rank0, processes
from tsae.rundir import layout
from tsae.rundir.directory import new_directory
from tsae.training.dry_run import Estimate, dry_run
from tsae.training.fill_cache import Filled, fill_cache
from tsae.training.init_from import adopted, field_names
from tsae.training.job import Job
from tsae.training.loop import Outcome
from tsae.training.request import Request
from tsae.training.run import owning_on_rank0, run_job
from tsae.training.sweep import read_runs, run_sweep, sweep_directory
from tsae.training.sweep_file import read_sweep
from tsae.utils.calling import option
from tsae.utils.cli import only_options
from tsae.utils.config_json import from_dict, load_json
from tsae.utils.nested import flatten
from tsae.utils.torchrun import world_size

PARALLEL = ("parallel.features", "parallel.timeout")  # what a resumed run may change


@dataclass
class Trained:
    """What came of a request."""

    job: Job
    outcomes: dict[str, Outcome]
    """Of the runs, by name; empty after a dry run."""
    estimate: Estimate | None = None
    """Of a dry run."""
    filled: Filled | None = None
    """The cache that ``harvest_only`` filled."""


def train(cfg: TrainConfig, asked: Request, given: Collection[str]) -> Trained:
    """Train; or with ``asked.dry_run`` estimate, or with ``asked.harvest_only`` fill the cache.

    Errors of single runs, such as divergence, are in their outcomes.

    cfg: the configuration of a new run
    asked: what else is asked for; with ``resume`` also the options of `PARALLEL`, and with ``sweep`` the file
    given: dotted names of the options that the user gave

    Raises:
        UserError: options that do not go together, or a model or text that cannot be used.
    """
    runs = _runs(cfg, asked, given)
    if asked.harvest_only and (other := next((n for n in ("out", "overwrite", "dry_run") if n in given), None)):
        raise UserError(f"--harvest-only writes the cache and no run; leave --{other.replace('_', '-')} out.")
    with processes(max(each.parallel.timeout for each in runs.values())):
        job = Job(runs, asked.resume or broadcast_from_rank0(lambda: _new_directory(cfg, asked)))
        if asked.dry_run:
            return Trained(job, {}, dry_run(job))
        if asked.harvest_only:
            return Trained(job, {}, filled=fill_cache(job))
        with owning_on_rank0(job.directory):
            broadcast_from_rank0(lambda: _check_as_before(job, cfg, asked, given))
            outcomes = (run_sweep if job.is_sweep else run_job)(job, resume=asked.resume is not None)
    return Trained(job, outcomes)


def _check_as_before(job: Job, cfg: TrainConfig, asked: Request, given: Collection[str]) -> None:
    """Raise `UserError` if the directory, which this process now owns, is not as it was when the command was read."""
    if asked.resume is None:
        if asked.out is not None:
            _new_directory(cfg, asked)
    elif _runs(cfg, asked, given) != job.runs:
        raise UserError(f"Another process has just changed the run {job.directory}; start again.")


def _runs(cfg: TrainConfig, asked: Request, given: Collection[str]) -> dict[str, TrainConfig]:
    """The configurations to train, by name: those of a sweep, or one with the name ""."""
    if asked.resume is not None and _is_sweep(asked.resume):
        only_options(given, ("resume", *PARALLEL), "--resume takes the sweep's own configuration")
        return {name: _on_other_processes(each, asked, given) for name, each in read_runs(asked.resume).items()}
    if asked.sweep is not None:
        only_options(
            given, ("sweep", "out", "overwrite", "dry_run", "harvest_only"), "The options of a sweep are in its file"
        )
        return read_sweep(asked.sweep)
    if asked.resume is not None:
        return {"": _resumed(asked.resume, asked, given)}
    in_file = {} if asked.config is None else flatten(load_json(asked.config))
    return {"": adopted(cfg, field_names(given) | set(in_file))}


def _new_directory(cfg: TrainConfig, asked: Request) -> Path:
    if asked.sweep is not None:
        return sweep_directory(asked.sweep.stem, asked.out, overwrite=asked.overwrite)
    return new_directory(cfg.preset, asked.out, overwrite=asked.overwrite)


def _resumed(directory: Path, asked: Request, given: Collection[str]) -> TrainConfig:
    only_options(given, ("resume", *PARALLEL), "--resume takes the run's own configuration")
    if not (directory / layout.CONFIG).is_file():
        raise UserError(f"{directory} holds no run to resume; it has no config.json.")
    if _is_sweep(directory.resolve().parent):
        sweep = option("resume", directory.resolve().parent)
        raise UserError(f"{directory} is part of a sweep; resume the sweep, {sweep}.")
    cfg = from_dict(TrainConfig, load_json(directory / layout.CONFIG))
    if asked.preset not in ("", cfg.preset):
        raise UserError(f"{directory} is a run of the preset {cfg.preset!r}, not {asked.preset!r}; leave the name out.")
    return _on_other_processes(cfg, asked, given)


def _on_other_processes(cfg: TrainConfig, asked: Request, given: Collection[str]) -> TrainConfig:
    """The configuration of a resumed run, with the ``given`` options in ``PARALLEL``.

    A sharded dictionary becomes a complete one on a single process.
    """
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
