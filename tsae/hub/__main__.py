"""`python -m tsae.hub RUN REPO`: upload a run's autoencoder to the Hugging Face hub, with a model card."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tsae.utils.cli import parse, report_errors


@dataclass
class Arguments:
    """Upload a run's autoencoder to the Hugging Face hub, with its metrics, configuration, figure and a model card."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run directory."""
    repo: Annotated[str, tyro.conf.Positional]
    """Repository, `name` or `owner/name`; created if it does not exist."""
    private: bool = False
    """Make a new repository private."""
    license: str | None = None
    """License by the hub's name for it, such as `apache-2.0`. Default: the card states none."""
    revision: str | None = None
    """An existing branch. Default: the main one."""
    folder: Path | None = None
    """Write the files to this folder for inspection, and upload nothing."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    with report_errors() as status:
        arguments = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.hub")
        from tsae.hub.command import publish  # after parsing, so that --help is fast

        publish(**vars(arguments))
    return status.code


if __name__ == "__main__":
    sys.exit(main())
