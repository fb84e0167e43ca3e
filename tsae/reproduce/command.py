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
from tsae.training.sweep import resume_sweep, run_sweep, sweep_directory
from tsae.utils.atomic import atomic_write, write_json
from tsae.utils.cli import check_counts
from tsae.utils.config_json import from_dict, load_json
from tsae.utils.progress import console


def reproduce(paper: str, out: Path | None, overwrite: bool, resume: Path | None, **options: Any) -> None:
    """Run the experiments of a paper and write results.json, results.md and figure1.png.

    paper: a key of `PAPERS`
    out, overwrite, resume: the directory, as on the command line
    options: of `tsae.reproduce.papers.configurations`

    Raises:
        UserError: bad options, a model or text that cannot be read, or a directory that cannot be used.
    """
    began = time.perf_counter()
    if resume is not None:
        _check_resumable(resume, paper)
        resume_sweep(resume)
        directory = resume
    else:
        check_counts(steps=options["steps"], d_sae=options["d_sae"])
        cfgs = configurations(PAPERS[paper], **options)
        directory = sweep_directory(f"reproduce-{paper}", out, overwrite=overwrite)
        run_sweep(Job(cfgs, directory))
    runs = load_json(directory / layout.SWEEP)["runs"]
    cfg = from_dict(TrainConfig, next(iter(runs.values()))["config"])
    explained = _explained_variance(directory, cfg, [name for name, run in runs.items() if run["metrics"]])
    seconds = None if resume is not None else time.perf_counter() - began
    results = collect(PAPERS[paper], cfg, runs, explained, seconds)
    write_json(directory / layout.REPRODUCTION, results)
    with atomic_write(directory / layout.REPRODUCTION_TABLE) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    write_figure(results, directory)
    print_results(results)
    console.print(f"Written: {directory}", soft_wrap=True)


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
