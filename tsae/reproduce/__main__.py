"""`python -m tsae.reproduce tcsae|tsae`: run a paper's experiments, each literally and fixed, beside its figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tsae.utils.cli import RESUME, given_options, only_options, parse, report_errors


@dataclass
class Arguments:
    """Run a paper's experiments in one pass of the language model, each literally (raw activations) and fixed (centred
    and scaled). Writes the paper's figures beside ours: results.json, results.md and figure1.png."""

    paper: Annotated[Literal["tcsae", "tsae"], tyro.conf.Positional]
    """Paper: tcsae (Pythia-70m, runs 0 to 4) or tsae (Gemma-2-2B and its variants)."""
    model: str = "gemma-3-270m"
    """Language model; the papers' own are EleutherAI/pythia-70m and google/gemma-2-2b."""
    layer: int | None = None
    """Block whose output is encoded. Default: the paper's or the demo's."""
    data: str | None = None
    """Text. Default: the paper's for its own model, else python-docs."""
    steps: int | None = None
    """Optimizer steps. Default: 20,000 for the paper's own model, else 500 (tcsae) or 400 (tsae)."""
    d_sae: int | None = None
    """Features. Default: the paper's for its own model, else 640, the demo model's width."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """Directory. Default: runs/reproduce-PAPER/TIMESTAMP."""
    overwrite: bool = False
    """Replace the contents of --out."""
    resume: Path | None = None
    """Continue this directory from its last checkpoint, with its own configuration."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    with report_errors(RESUME) as status:
        asked = parse(Arguments, argv, None, "python -m tsae.reproduce")
        if asked.resume is not None:
            only_options(given_options(argv), ("resume",), "--resume takes the directory's own configuration")
        from tsae.reproduce.command import reproduce  # after parsing, so that --help is fast

        reproduce(**vars(asked))
    return status.code


if __name__ == "__main__":
    sys.exit(main())
