"""Sweeps: their directory, their runs, and the table that compares them. `sweep_file` reads the YAML file."""

from __future__ import annotations

from pathlib import Path

from tsae.config import TrainConfig
from tsae.errors import UserError, WriteError
from tsae.reports.table import print_comparison
from tsae.rundir import layout
from tsae.rundir.directory import new_directory, start_run
from tsae.training.job import Job
from tsae.training.loop import Outcome
from tsae.training.run import owning_on_rank0, run_job
from tsae.utils.atomic import write_json
from tsae.utils.config_json import from_dict, load_json
from tsae.utils.torchrun import is_rank0


def sweep_directory(name: str, out: Path | None, *, overwrite: bool) -> Path:
    """Where a new sweep goes: ``out``, or `runs/sweep-<name>/<timestamp>`; see `new_directory`."""
    return new_directory(f"sweep-{name}", out, overwrite=overwrite, marker=layout.SWEEP, what="sweep")


def run_sweep(job: Job, *, resume: bool = False) -> dict[str, Outcome]:
    """Train, evaluate and compare; `sweep.json` gets the steps, the metrics and the error of every run.

    job: its directory comes from `sweep_directory`, or with ``resume`` is that of an existing sweep

    Raises:
        WriteError: a file could not be written; the metrics have been printed.
    """
    with owning_on_rank0(job.directory):
        if resume and is_rank0():
            for name, cfg in job.runs.items():  # a start that was killed may not have reached all of them
                if not (job.directory / name / layout.CONFIG).exists():
                    start_run(job.directory / name, cfg)
        outcomes = run_job(job, resume=resume)
        if is_rank0():
            _write(job, outcomes)
    return outcomes


def _write(job: Job, outcomes: dict[str, Outcome]) -> None:
    old = load_json(job.directory / layout.SWEEP)["runs"]
    rows = {
        name: {
            "config": old[name]["config"],
            "steps": outcome.steps,
            "error": None if outcome.error is None else str(outcome.error),
            "metrics": None if outcome.evaluation is None else outcome.evaluation.metrics,
        }
        for name, outcome in outcomes.items()
    }
    unwritten = [outcome.error for outcome in outcomes.values() if isinstance(outcome.error, WriteError)]
    try:
        write_json(job.directory / layout.SWEEP, {"runs": rows})
    except WriteError as error:
        unwritten.insert(0, error)
    if unwritten:
        print_comparison(rows)
        raise unwritten[0]


def read_runs(directory: Path) -> dict[str, TrainConfig]:
    """The configurations of the sweep in ``directory``, by name."""
    runs = load_json(directory / layout.SWEEP).get("runs")
    if not isinstance(runs, dict) or not runs:
        raise UserError(f"{directory / layout.SWEEP} names no runs; start the sweep again.")
    for name, values in runs.items():
        if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
            raise UserError(
                f"{directory / layout.SWEEP} has no configuration for the run {name!r}; start the sweep again."
            )
    return {name: from_dict(TrainConfig, values["config"]) for name, values in runs.items()}


def resume_sweep(directory: Path) -> dict[str, Outcome]:
    """Continue the sweep in ``directory`` from its last checkpoint, with its own configurations."""
    return run_sweep(Job(read_runs(directory), directory), resume=True)


def print_sweep(directory: Path) -> None:
    """Print the table of a finished sweep.

    Raises:
        UserError: no run was completed.
    """
    runs = load_json(directory / layout.SWEEP)["runs"]
    print_comparison(runs)
    if all(run["error"] for run in runs.values()):
        raise UserError(f"No run of {directory} was completed; {layout.SWEEP} there says why.")
