"""`python -m tsae.view RUN [--out FILE.html] [--tokens N]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tsae.utils.cli import parse, report_errors


@dataclass
class Arguments:
    """Write a page for browsing a run's features: one HTML file that needs no network and no server."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run directory."""
    out: Path | None = None
    """The file to write. Default: RUN/view.html."""
    tokens: int | None = None
    """Tokens of held-out text to compute the features on. Default: as in the run's evaluation."""
    length: int | None = None
    """Tokens per sequence, 2 to 4096. Default: the run's."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    with report_errors() as status:
        arguments = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.view")
        from tsae.view.command import view  # after parsing, so that --help is fast

        view(**vars(arguments))
    return status.code


if __name__ == "__main__":
    sys.exit(main())
