"""Autoencoders on the Hugging Face hub: only the files that a format consists of are downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from tsae.data.hub import hub_is_reachable
from tsae.errors import UserError

__all__ = ["download", "is_hub_id"]

_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w][\w.-]*)(?P<folder>(/[\w][\w.=+ -]*)*)(@(?P<revision>[\w./-]+))?")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` can be `OWNER/NAME`, `OWNER/NAME/FOLDER...`, either with `@REVISION`."""
    return _ID.fullmatch(source) is not None


def download(source: str, files: tuple[str, ...]) -> Path:
    """The folder, in the hub's cache, with those of ``files`` that the repository has in that place.

    source: `OWNER/NAME[/FOLDER...][@REVISION]`

    Raises:
        UserError: there is no such repository or folder, or the hub cannot be reached and has not cached it.
    """
    import huggingface_hub

    match = _ID.fullmatch(source)
    if match is None:
        raise UserError(f"{source!r} is not the name of a repository on the hub; OWNER/NAME/FOLDER is wanted.")
    repo, folder, revision = match["repo"], match["folder"].strip("/"), match["revision"]
    offline = not hub_is_reachable()
    try:
        root = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[f"{folder}/{name}" if folder else name for name in files],
            local_files_only=offline,
        )
    except Exception as error:  # of the hub's client, of its HTTP library, of the file system
        if offline:
            raise UserError(
                f"There is no {source!r} on this machine, and the Hugging Face hub cannot be reached; connect to the "
                "network, or name a local directory."
            ) from error
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{source!r} cannot be read from the hub: {reason[0] if reason else type(error).__name__}"
        ) from error
    return Path(root) / folder
