"""Autoencoders on the Hugging Face hub: only the files that a format consists of are downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from tsae.errors import UserError, reason
from tsae.utils.hub import hub_is_reachable

_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w][\w.-]*)(?P<folder>(/[\w][\w.=+ -]*)*)(@(?P<revision>[\w./-]+))?")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` can be `OWNER/NAME`, `OWNER/NAME/FOLDER...`, either with `@REVISION`."""
    return _ID.fullmatch(source) is not None


def download(
    source: str,
    files: tuple[str, ...],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder, in the hub's cache, with those of ``files`` that the repository has in that place.

    source: `OWNER/NAME[/FOLDER...][@REVISION]`
    revision, token, cache_dir, local_files_only: as `tsae.load` has them

    Raises:
        UserError: there is no such repository, or the hub cannot be asked and has not cached it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    match = _ID.fullmatch(source)
    if match is None:
        raise UserError(f"{source!r} is not the name of a repository on the hub; OWNER/NAME/FOLDER is wanted.")
    repo, folder, named = match["repo"], match["folder"].strip("/"), match["revision"]
    if None not in (named, revision) and named != revision:
        raise UserError(f"{source} is to be read at the revision {revision}, too; name one of the two.")
    offline = local_files_only or not hub_is_reachable()
    try:
        root = snapshot_download(
            repo,
            revision=named or revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=[f"{folder}/{name}" if folder else name for name in files],
            local_files_only=offline,
        )
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{source} is neither a local directory nor in the cache, and the Hugging Face hub "
            f"{'was not to be asked' if local_files_only else 'cannot be reached'}; name a directory, or connect."
        ) from error
    except Exception as error:  # of the client, of whichever HTTP library it is built on, of the file system
        raise UserError(f"{source} cannot be read from the hub: {reason(error)}.") from error
    return Path(root) / folder
