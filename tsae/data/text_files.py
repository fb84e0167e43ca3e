"""Text from local files or folders: .txt, .jsonl, .csv (also compressed), .parquet, and saved datasets."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tsae.config import TextConfig
from tsae.data.chats import parse_chat
from tsae.data.columns import SAMPLE, TEXT, Kind, choose_column, guess, listed, lookup, merge
from tsae.data.documents import Document, cut
from tsae.data.encodings import pieces, row_text
from tsae.data.folders import ARROW, PARQUET, TXT, find_files, has_suffix
from tsae.data.rows import kinds_of_columns, read_rows
from tsae.data.saved_datasets import is_saved_dataset, saved_files
from tsae.errors import UserError
from tsae.utils.notices import warn_once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextFiles:
    """The files of a source that hold its text.

    paths: sorted.
    column: the text column of all those that have rows; None if none has.
    guessed: whether the column was neither named nor is called "text".
    chats: whether the column holds chats.
    """

    paths: list[Path]
    column: str | None = None
    guessed: bool = False
    chats: bool = False


def source_files(source: Path, split: str) -> list[Path]:
    """The files of a local source: of a saved dataset those of the split, else what `find_files` finds."""
    return saved_files(source, split) if is_saved_dataset(source) else find_files(source)


def choose_files(source: Path, requested: str | None, split: str = TextConfig.split) -> TextFiles:
    """The files of a source (see `source_files`), and their text column.

    A folder has one text column: the requested one, or "text", or, if there are no other files, the only column of
    strings in it (see `choose_column`). If there is other text in the folder, files without that column are left out,
    but some file must have one that was requested.
    A warning names the column that was not requested, and the files left out. The first rows of each file decide.

    split: of a saved dataset.
    Raises UserError if a file cannot be read, or if there is no text column.
    """
    paths = source_files(source, split)
    tables = {path: _columns(path, requested or TEXT) for path in paths if not has_suffix(path, TXT)}
    plain = [path for path in paths if path not in tables]
    for path in plain:
        _check_start(path)
    column, chosen = requested or TEXT, [path for path, columns in tables.items() if _can_read(columns, requested)]
    for path in chosen:
        if requested is not None:
            choose_column(tables[path], requested, repr(str(path)))  # refuses one that holds something else
    is_named = requested not in (None, TEXT)  # on purpose: presets for the hub name "text"
    guessed = not chosen and any(tables.values()) and (is_named or not any(path.stat().st_size for path in plain))
    if guessed:  # or refused
        column = _guess_column(tables, requested, repr(str(source)))
        chosen = [path for path, columns in tables.items() if column in columns]
    for path, columns in tables.items():
        if path not in chosen and columns:
            why = f"it has no text in a column {column!r}, only {listed(columns)}"
            warn_once(log, f"ignored {str(path)!r}, because {why}")
    if is_named and not tables:
        warn_once(log, f"the column {requested!r} is not looked for in {str(source)!r}, which is plain text")
    chats = any(tables[path].get(column) == Kind.CHAT for path in chosen)
    return TextFiles(sorted([*plain, *chosen]), column if chosen else None, guessed, chats)


def _can_read(columns: dict[str, Kind], requested: str | None) -> bool:
    """Whether a file has the requested column, or one called "text" that can be read."""
    return requested in columns if requested is not None else columns.get(TEXT, Kind.OTHER).is_text


def _guess_column(tables: dict[Path, dict[str, Kind]], requested: str | None, source: str) -> str:
    """The column of files that have none called "text"; refuses a requested one, which none of them has."""
    together: dict[str, Kind] = {}
    for columns in tables.values():
        merge(together, columns)
    if not all(has_suffix(path, (*PARQUET, *ARROW)) for path in tables):  # which have a schema
        source += f" (its first {SAMPLE:,} rows)"
    column = choose_column(together, requested, source)
    warn_once(log, guess(column, together[column], source))
    return column


def read_files(files: TextFiles) -> Iterator[Document]:
    """The non-blank documents of the files, in order: passages of .txt files, rows of the others.

    Raises UserError for an unreadable file, or a row whose text column holds something else.
    """
    for path in files.paths:
        with _readable(path):
            for document in _read(path, files):
                if document.text and not document.text.isspace():
                    yield document


def _read(path: Path, files: TextFiles) -> Iterator[Document]:
    if has_suffix(path, TXT):
        for i, passage in enumerate(cut(pieces(path))):
            yield Document(f"{path}#{i}", passage)
        return
    assert files.column is not None
    for number, row in read_rows(path, [files.column]):
        text = lookup(row, files.column)[1]
        if files.guessed and isinstance(row.get(TEXT), str):
            raise UserError(
                f"row {number} of {str(path)!r} has a column {TEXT!r}, unlike the first {SAMPLE:,}: "
                f"name {files.column!r} as the column to read that, or put a row with {TEXT!r} first"
            )
        if files.chats:
            chat = parse_chat(text, f"line {number} of {str(path)!r}")
            if chat is not None:
                yield Document(f"{path}#{number}", chat.text, chat)
            continue
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"line {number} of {str(path)!r}: the column {files.column!r} does not hold text")
        yield Document(f"{path}#{number}", row_text(text, repr(str(path))))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of reading a file, also those of gzip and zstd, as UserError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}") from error


def _columns(path: Path, wanted: str) -> dict[str, Kind]:
    """The kinds of a file's columns, from its schema or first rows; maybe not all if `wanted` is among them."""
    with _readable(path):
        status = path.stat()
        return _columns_of(path, status.st_size, status.st_mtime_ns, wanted)


@lru_cache(maxsize=100_000)
def _columns_of(path: Path, size: int, modified: int, wanted: str) -> dict[str, Kind]:
    """`_columns`, for a state of the file; a folder is opened several times in a run."""
    return kinds_of_columns(path, wanted)


def _check_start(path: Path) -> None:
    """Raise UserError unless a text file begins with text."""
    with _readable(path):
        status = path.stat()
        _check_start_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _check_start_of(path: Path, size: int, modified: int) -> None:
    next(pieces(path), None)
