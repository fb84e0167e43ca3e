"""`python -m tsae.view RUN [--out FILE.html] [--tokens N]`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tsae.config import LENGTH
from tsae.errors import UserError
from tsae.rundir import layout
from tsae.utils.cli import parse, report_errors


@dataclass
class Arguments:
    """Write a page to look at a run's features: one HTML file that needs no network and no server."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run directory."""
    out: Path | None = None
    """The file to write; default RUN/view.html."""
    tokens: int | None = None
    """Tokens of held-out text to run the features over. Default: as in the run's evaluation."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    with report_errors() as status:
        arguments = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.view")
        out = arguments.run / layout.PAGE if arguments.out is None else arguments.out
        if arguments.out is not None and not out.absolute().parent.is_dir():
            raise UserError(f"There is no directory {out.parent} for the page; make it, or name another file.")
        # Imported here, so that --help and a misspelt option answer at once.
        from tsae.utils.progress import bar, console
        from tsae.view.data import collect
        from tsae.view.page import write_page

        total = None if arguments.tokens is None else math.ceil(arguments.tokens / LENGTH) * LENGTH  # whole rows
        with bar("Features", total) as advance:
            data = collect(arguments.run, arguments.tokens, advance)
        size = write_page(data, out)
        console.print(f"Written: {out} ({size / 1e6:.1f} MB)", soft_wrap=True)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
