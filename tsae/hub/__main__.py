"""`python -m tsae.hub RUN REPO`: a run's autoencoder to the Hugging Face hub, with a model card."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tsae.errors import UserError
from tsae.rundir import layout
from tsae.utils.cli import parse, report_errors


@dataclass
class Arguments:
    """Upload a run's autoencoder to the Hugging Face hub, with its metrics, configuration, figure and a model card."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run directory."""
    repo: Annotated[str, tyro.conf.Positional]
    """Where to: `name` or `owner/name`; created unless it exists."""
    private: bool = False
    """Make a new repository private."""
    license: str | None = None
    """The hub's name of the license, such as `apache-2.0`; the card states none otherwise."""
    revision: str | None = None
    """A branch that exists. Default: the main one."""
    folder: Path | None = None
    """Write the files here to look at them, and upload nothing."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    with report_errors() as status:
        arguments = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.hub")
        # Imported here, so that --help and a misspelt option answer at once.
        from tsae.hub.transfer import prepare, push
        from tsae.sae.model import SparseAutoencoder
        from tsae.utils.progress import console

        sae = SparseAutoencoder.load(arguments.run / layout.AUTOENCODER)
        if arguments.folder is not None:
            if arguments.folder.exists() and (not arguments.folder.is_dir() or any(arguments.folder.iterdir())):
                raise UserError(f"{arguments.folder} is not an empty folder; name a new one.")
            prepare(sae, arguments.folder, arguments.repo, run=arguments.run, license=arguments.license)
            console.print(f"Written: {arguments.folder}", soft_wrap=True)
        else:
            where = push(
                sae,
                arguments.repo,
                run=arguments.run,
                private=arguments.private or None,
                license=arguments.license,
                revision=arguments.revision,
            )
            console.print(f"Uploaded: {where}", soft_wrap=True)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
