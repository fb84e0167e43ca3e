"""The text files of a folder: at any depth, through links, each once."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path

from tsae.errors import UserError
from tsae.utils.notices import warn_once

log = logging.getLogger(__name__)

TXT = (".txt", ".txt.gz", ".txt.zst")
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
SUFFIXES = (*TXT, *JSONL, *PARQUET)
CSV = (".csv", ".csv.gz", ".csv.zst")
SECOND = (*CSV, ".json.gz", ".json.zst")
"""Tables that often stand beside a text and describe it: of a folder they are read if it has nothing else."""
ARROW = (".arrow",)  # of saved datasets alone
NAMED = (*SUFFIXES, *SECOND, ".json")
"""What a file that is named itself may end in."""


def has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends in one of the suffixes, in upper or lower case."""
    return path.name.lower().endswith(suffixes)


def find_files(source: Path) -> list[Path]:
    """The text files in a folder and its subfolders, except hidden ones, sorted; or the single file named.

    Files that end in one of `SECOND` are left out if there are others.
    Links are followed. A folder or file that can be reached in several ways counts once, by a path without links if
    there is one. A warning names what is ignored.

    Raises UserError if there are none, or if a subfolder or a linked text file cannot be read.
    """
    kinds = ", ".join((*SUFFIXES, *SECOND))
    if source.is_file():
        if not has_suffix(source, NAMED):
            raise UserError(f"cannot read text from {str(source)!r}: expected a file that ends in one of {kinds}")
        return [source]
    if not source.is_dir():
        raise UserError(f"cannot read text from {str(source)!r}: it is neither a file nor a folder")
    found, second, ignored = [], [], Counter[str]()
    for path, mode in _walk(source):
        if stat.S_ISREG(mode) and has_suffix(path, SUFFIXES):
            found.append(path)
        elif stat.S_ISREG(mode) and has_suffix(path, SECOND):
            second.append(path)
        elif stat.S_ISREG(mode):
            ignored[path.suffix or "without a suffix"] += 1
        elif not mode and has_suffix(path, SUFFIXES):
            raise UserError(f"cannot read {str(path)!r}: it is a link that leads nowhere")
        else:
            what = "neither a file nor a folder" if mode else "a link that leads nowhere"
            warn_once(log, f"ignored {str(path)!r}, because it is {what}")
    if found:
        ignored.update(path.suffix for path in second)
    found = found or second
    if not found:
        raise UserError(f"no text files in the folder {str(source)!r}: expected files that end in one of {kinds}")
    if ignored:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in ignored.most_common(8))
        more = f", and {len(ignored) - 8} other kinds" if len(ignored) > 8 else ""
        warn_once(log, f"ignored in {str(source)!r}, because they are not text files: {counts}{more}")
    return sorted(found)


def _walk(root: Path) -> Iterator[tuple[Path, int]]:
    """Path and mode of every entry below `root` that is no folder, each real one once; mode 0 for a broken link.

    Links wait until all that is reachable without them has been visited.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = deque([root]), deque[Path]()

    def is_new(status: os.stat_result) -> bool:
        identity = (status.st_dev, status.st_ino)
        is_known = identity in seen
        seen.add(identity)
        return not is_known

    while folders or links:
        if folders:
            for path, status in _entries(folders.popleft(), is_new):
                if stat.S_ISLNK(status.st_mode):
                    links.append(path)
                elif stat.S_ISDIR(status.st_mode):
                    folders.append(path)
                elif is_new(status):
                    yield path, status.st_mode
            continue
        link = links.popleft()
        try:
            status = link.stat()
        except OSError:  # nothing there, or a link to itself
            yield link, 0
            continue
        if stat.S_ISDIR(status.st_mode):
            folders.append(link)
        elif is_new(status):
            yield link, status.st_mode


def _entries(folder: Path, is_new: Callable[[os.stat_result], bool]) -> list[tuple[Path, os.stat_result]]:
    """The entries of a new folder that are not hidden, by name, with their own status, not a link target's."""
    try:
        if not is_new(folder.stat()):
            return []
        return [(path, path.lstat()) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {str(folder)!r}: {error.strerror or error}") from error
