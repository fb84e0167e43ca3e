"""`python -m tsae.reproduce tcsae|tsae`: a paper's experiments, each literally and fixed, beside its figures."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.rundir import layout
from tsae.utils.cli import RESUME, only_options, parse, report_errors
from tsae.utils.config_json import from_dict, load_json


@dataclass
class Arguments:
    """Run a paper's experiments again, on one pass of the language model: each literally (raw activations) and fixed
    (centred and scaled). Ends with the paper's figures beside ours: results.json, results.md and figure1.png."""

    paper: Annotated[Literal["tcsae", "tsae"], tyro.conf.Positional]
    """Which paper: tcsae (Pythia-70m, runs 0 to 4) or tsae (Gemma-2-2B, its variants)."""
    model: str = "gemma-3-270m"
    """Language model; the papers' own are EleutherAI/pythia-70m and google/gemma-2-2b."""
    layer: int | None = None
    """Block whose output is encoded; the paper's or the demo's by default."""
    data: str | None = None
    """Text; the paper's for its own model, else python-docs."""
    steps: int | None = None
    """Optimizer steps; 20,000 for the paper's own model, else 500 (tcsae) or 400 (tsae)."""
    d_sae: int | None = None
    """Features; the paper's for its own model, else 640, the demo model's width."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """Directory; default runs/reproduce-PAPER/TIMESTAMP."""
    overwrite: bool = False
    """Replace what --out already holds."""
    resume: Path | None = None
    """Continue this directory from its last checkpoint, with its own configuration."""


PROG = "python -m tsae.reproduce"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    with report_errors(RESUME) as status:
        asked = parse(Arguments, argv, None, PROG)
        _reproduce(asked, argv)
    return status.code


def _reproduce(asked: Arguments, argv: list[str]) -> None:
    began = time.perf_counter()
    # Imported here, so that --help and a misspelt option answer at once.
    from tsae.lm.loading import load_language_model
    from tsae.reproduce.figure import write_figure
    from tsae.reproduce.papers import PAPERS, configurations
    from tsae.reproduce.results import collect, explained_variance, markdown, print_results
    from tsae.sae.model import SparseAutoencoder
    from tsae.training.assemble import evaluation_batches, resolve_device
    from tsae.training.job import Job
    from tsae.training.sweep import resume_sweep, run_sweep, sweep_directory
    from tsae.utils.atomic import atomic_write, write_json
    from tsae.utils.progress import console

    paper = PAPERS[asked.paper]
    if asked.resume is not None:
        directory = asked.resume
        _check_resumable(directory, asked.paper, argv)
        resume_sweep(directory)
    else:
        for name in ("steps", "d_sae"):
            value = getattr(asked, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
        cfgs = configurations(
            paper,
            model=asked.model,
            layer=asked.layer,
            data=asked.data,
            steps=asked.steps,
            d_sae=asked.d_sae,
            seed=asked.seed,
            device=asked.device,
        )
        directory = sweep_directory(f"reproduce-{asked.paper}", asked.out, overwrite=asked.overwrite)
        run_sweep(Job(cfgs, directory))
    runs = load_json(directory / layout.SWEEP)["runs"]
    cfg = from_dict(TrainConfig, next(iter(runs.values()))["config"])
    lm = load_language_model(cfg.model, device=resolve_device(cfg.device), dtype=cfg.lm_dtype, revision=cfg.revision)
    batches = evaluation_batches(cfg, lm, cfg.evaluation.sequences)
    finished = [name for name, run in runs.items() if run["metrics"]]
    saes = {name: SparseAutoencoder.load(directory / name / layout.AUTOENCODER, device=lm.device) for name in finished}
    explained = explained_variance(saes, lm, batches, cfg.layer, cfg.buffer.harvest_batch)
    seconds = None if asked.resume is not None else time.perf_counter() - began
    results = collect(paper, cfg, runs, explained, seconds)
    write_json(directory / layout.REPRODUCTION, results)
    with atomic_write(directory / layout.REPRODUCTION_TABLE) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    write_figure(results, directory)
    print_results(results)
    console.print(f"Written: {directory}", soft_wrap=True)


def _check_resumable(directory: Path, paper: str, argv: list[str]) -> None:
    from tsae.reproduce.papers import INPUTS, PAPERS

    only_options(argv, ("--resume",), "--resume takes the directory's own configuration")
    if not (directory / layout.SWEEP).is_file():
        raise UserError(f"{directory} holds nothing to resume; it has no {layout.SWEEP}.")
    wanted = {f"{name}-{given}" for name in PAPERS[paper].experiments for given in INPUTS}
    if set(load_json(directory / layout.SWEEP).get("runs", {})) != wanted:
        raise UserError(f"{directory} does not hold the experiments of {paper}; name the directory of such a run.")


if __name__ == "__main__":
    sys.exit(main())
