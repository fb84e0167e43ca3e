"""Autoencoders on the Hugging Face hub: only the files of a known format are downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from tsae.errors import UserError, reason
from tsae.utils.hub import hub_is_reachable

_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w][\w.-]*)(?P<folder>(/[\w][\w.=+ -]*)*)(@(?P<revision>[\w./-]+))?")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` has the form `OWNER/NAME[/FOLDER...][@REVISION]`."""
    return _ID.fullmatch(source) is not None


def download(
    source: str, files: tuple[str, ...], *, revision: str | None, local_files_only: bool, **options: Any
) -> Path:
    """The folder in the hub's cache that holds ``files``, as far as the repository has them.

    source: `OWNER/NAME[/FOLDER...][@REVISION]`
    revision, local_files_only: as in `tsae.load`
    options: ``token`` and ``cache_dir``

    Raises:
        UserError: there is no such repository, or it is not in the cache and the hub cannot be reached.
    """
    match = _ID.fullmatch(source)
    if match is None:
        raise UserError(f"{source!r} is not a repository on the hub; name one as OWNER/NAME/FOLDER.")
    repo, folder, named = match["repo"], match["folder"].strip("/"), match["revision"]
    if None not in (named, revision) and named != revision:
        raise UserError(f"{source} and revision={revision!r} name different revisions; name one of them.")
    try:
        root = huggingface_hub.snapshot_download(
            repo,
            revision=named or revision,
            allow_patterns=[f"{folder}/{name}" if folder else name for name in files],
            local_files_only=local_files_only or not hub_is_reachable(),
            **options,
        )
    except LocalEntryNotFoundError as error:
        why = "may not be used (local_files_only)" if local_files_only else "cannot be reached"
        raise UserError(
            f"{source} is neither a local directory nor in the cache, and the Hugging Face hub {why}; name a "
            "directory, or connect."
        ) from error
    except Exception as error:  # raised by the client, its HTTP library or the file system
        raise UserError(f"{source} cannot be read from the hub: {reason(error)}.") from error
    return Path(root) / folder
