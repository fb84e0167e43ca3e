"""Run, or resume, a paper's experiments as one sweep, then measure and report them beside the paper's figures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.evaluation.held_out import evaluation_batches
from tsae.evaluation.subject import Subject
from tsae.reproduce.figure import write_figure
from tsae.reproduce.papers import INPUTS, PAPERS, configurations
from tsae.reproduce.results import collect, explained_variance, markdown, print_results
from tsae.rundir import layout
from tsae.sae.model import SparseAutoencoder
from tsae.training.job import Job
from tsae.training.run import owning_on_rank0
from tsae.training.sweep import read_runs, run_sweep, sweep_directory
from tsae.utils.atomic import atomic_write, write_json
from tsae.utils.cli import check_counts, deliver
from tsae.utils.config_json import from_dict, load_json
from tsae.utils.output import say


def reproduce(paper: str, out: Path | None, overwrite: bool, resume: Path | None, **options: Any) -> None:
    """Run the experiments of a paper and write results.json, results.md and figure1.png.

    paper: a key of `PAPERS`
    out, overwrite, resume: the directory, as on the command line
    options: of `tsae.reproduce.papers.configurations`

    Raises:
        UserError: bad options, a model or text that cannot be read, or a directory that cannot be used.
    """
    began = time.perf_counter()
    if resume is None:
        check_counts(steps=options["steps"], d_sae=options["d_sae"])
        job = Job(configurations(PAPERS[paper], **options), _new_directory(paper, out, overwrite))
    else:
        _check_resumable(resume, paper)
        job = Job(read_runs(resume), resume)
    directory = job.directory
    with owning_on_rank0(directory):
        if resume is None and out is not None:
            _new_directory(paper, out, overwrite)  # again: another process may have made it since
        run_sweep(job, resume=resume is not None)
        runs = load_json(directory / layout.SWEEP)["runs"]
        cfg = from_dict(TrainConfig, next(iter(runs.values()))["config"])
        explained = _explained_variance(directory, cfg, [name for name, run in runs.items() if run["metrics"]])
        seconds = None if resume is not None else time.perf_counter() - began
        results = collect(PAPERS[paper], cfg, runs, explained, seconds)
        deliver(
            lambda: write_json(directory / layout.REPRODUCTION, results),
            lambda: _write_table(results, directory),
            lambda: write_figure(results, directory),
            show=lambda *_: print_results(results),
        )
    say(f"Written: {directory}")


def _new_directory(paper: str, out: Path | None, overwrite: bool) -> Path:
    return sweep_directory(f"reproduce-{paper}", out, overwrite=overwrite)


def _write_table(results: dict[str, Any], directory: Path) -> None:
    with atomic_write(directory / layout.REPRODUCTION_TABLE) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8", errors="replace")


def _explained_variance(directory: Path, cfg: TrainConfig, finished: list[str]) -> dict[str, Any]:
    """The explained variance of the finished runs, with and without BOS."""
    saes = {name: SparseAutoencoder.load(directory / name / layout.AUTOENCODER) for name in finished}
    subject = Subject(saes, cfg, dict.fromkeys(finished, cfg))
    lm = subject.load_lm()
    return explained_variance(saes, lm, evaluation_batches(cfg, lm, cfg.evaluation.sequences), cfg.layer)


def _check_resumable(directory: Path, paper: str) -> None:
    if not (directory / layout.SWEEP).is_file():
        raise UserError(f"{directory} holds nothing to resume; it has no {layout.SWEEP}.")
    wanted = {f"{name}-{given}" for name in PAPERS[paper].experiments for given in INPUTS}
    if set(load_json(directory / layout.SWEEP).get("runs", {})) != wanted:
        raise UserError(f"{directory} does not hold the experiments of {paper}; name the directory of such a run.")
