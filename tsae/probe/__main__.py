"""`python -m tsae.probe RUN [RUN ...]`: sparse probes of the features of one or several runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tsae.utils.cli import parse, report_errors


@dataclass
class Arguments:
    """Probe features for the document, the section and the class of a token, and for labels that the text has, with 1,
    5 and 20 features per label, on text that the runs did not train on. Writes probes.json into each run and prints a
    table of the runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories with the same model, layer and text; the others are compared with the first."""
    data: str | None = None
    """Text to probe on, as for `python -m tsae.evaluate`. Default: the evaluation part of the runs' own text."""
    tokens: int | None = None
    """Tokens to probe on. Default: as in the first run's configuration."""
    seed: int | None = None
    """Seed of the text order, of the choice of training documents, and of the bootstrap. Default: the first run's."""
    device: str | None = None
    """Device: `auto`, `cpu`, `cuda`, ... Default: the first run's."""
    column: str | None = None
    """Column of the data set that holds the text. Default: the runs'."""
    length: int | None = None
    """Tokens per sequence, 2 to 4096. Default: the runs', which must then agree."""
    labels: tuple[str, ...] = ()
    """Columns of the text's rows, such as `language`, whose values are labels too, one problem for each column."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    with report_errors() as status:
        arguments = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.probe")
        from tsae.probe.command import probe_and_print  # after parsing, so that --help is fast

        probe_and_print(**vars(arguments))
    return status.code


if __name__ == "__main__":
    sys.exit(main())
