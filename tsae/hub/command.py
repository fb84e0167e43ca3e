"""From a run to the hub, or to a folder of the files that would be uploaded."""

from __future__ import annotations

from pathlib import Path

from tsae.errors import UserError
from tsae.hub.transfer import prepare, push
from tsae.rundir import layout
from tsae.rundir.ownership import check_output_directory, owning_runs
from tsae.sae.model import SparseAutoencoder
from tsae.utils.atomic import atomic_directory
from tsae.utils.output import say


def publish(
    run: Path,
    repo: str,
    private: bool = False,
    license: str | None = None,
    revision: str | None = None,
    folder: Path | None = None,
) -> None:
    """Upload a run's autoencoder, or with ``folder`` write the files there; the options of the command line.

    run, repo, license, revision: as for `tsae.hub.push`
    private: make a new repository private
    folder: new or empty

    Raises:
        UserError: the directory is not a run's, another process uses it, the folder is not empty, is in the place of a
            run's file or cannot be written, or the hub refuses.
    """
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; name a new one.")
    if folder is not None:
        check_output_directory(folder)
    with owning_runs(run):
        sae = SparseAutoencoder.load(run / layout.AUTOENCODER)
        if folder is None:
            where = push(sae, repo, run=run, private=private or None, license=license, revision=revision)
            said = f"Uploaded: {where}"
        else:
            with atomic_directory(folder) as temporary:
                prepare(sae, temporary, repo, run=run, license=license)
            said = f"Written: {folder}"
    say(said)
