"""Text from local files or folders: .txt and .jsonl (also compressed with gzip or zstd) and .parquet."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tsae.data.columns import SAMPLE, TEXT, Kind, choose_column, guess, kind_of_arrow, listed, merge, sample
from tsae.data.documents import Document, cut
from tsae.data.encodings import lines, pieces, row_text
from tsae.data.folders import PARQUET, TXT, find_files, has_suffix
from tsae.errors import UserError
from tsae.utils.notices import warn_once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextFiles:
    """The files of a source that hold its text.

    paths: sorted.
    column: the text column of all those that have rows; None if none has.
    guessed: whether the column was neither named nor is called "text".
    """

    paths: list[Path]
    column: str | None = None
    guessed: bool = False


def choose_files(source: Path, requested: str | None) -> TextFiles:
    """The files of a source (see `tsae.data.folders.find_files`), and their text column.

    A folder has one text column: the requested one, or "text", or, if there are no other files, the only column of
    strings in it (see `choose_column`). If there is other text in the folder, files without that column are left out,
    but some file must have one that was requested.
    A warning names the column that was not requested, and the files left out. The first rows of each file decide.

    Raises UserError if a file cannot be read, or if there is no text column.
    """
    paths = find_files(source)
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
    return TextFiles(sorted([*plain, *chosen]), column if chosen else None, guessed)


def _can_read(columns: dict[str, Kind], requested: str | None) -> bool:
    """Whether a file has the requested column, or one called "text" that can be read."""
    return requested in columns if requested is not None else columns.get(TEXT, Kind.OTHER).is_text


def _guess_column(tables: dict[Path, dict[str, Kind]], requested: str | None, source: str) -> str:
    """The column of files that have none called "text"; refuses a requested one, which none of them has."""
    together: dict[str, Kind] = {}
    for columns in tables.values():
        merge(together, columns)
    if not all(has_suffix(path, PARQUET) for path in tables):  # which have a schema
        source += f" (its first {SAMPLE:,} rows)"
    column = choose_column(together, requested, source)
    warn_once(log, guess(column, source))
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
    rows = _parquet_rows(path, [files.column]) if has_suffix(path, PARQUET) else _jsonl_rows(path)
    for number, row in rows:
        text = row.get(files.column)
        if files.guessed and isinstance(row.get(TEXT), str):
            raise UserError(
                f"row {number} of {str(path)!r} has a column {TEXT!r}, unlike the first {SAMPLE:,}: "
                f"name {files.column!r} as the column to read that, or put a row with {TEXT!r} first"
            )
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
    if not has_suffix(path, PARQUET):
        return sample((row for _, row in _jsonl_rows(path)), wanted)
    with _open_parquet(path) as file:
        columns = {field.name: kind_of_arrow(field.type) for field in file.schema_arrow}
    strings = [name for name, kind in columns.items() if kind == Kind.TEXT]
    if wanted not in columns and strings:  # perhaps ids or blank
        columns |= sample((row for _, row in _parquet_rows(path, strings)), wanted)
    return columns


def _check_start(path: Path) -> None:
    """Raise UserError unless a text file begins with text."""
    with _readable(path):
        status = path.stat()
        _check_start_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _check_start_of(path: Path, size: int, modified: int) -> None:
    next(pieces(path), None)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .jsonl file with their line numbers, from 1."""
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {str(path)!r} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {str(path)!r} is not a JSON object with a text column")
        yield number, row


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; its errors as UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # if the file has checksums
            yield file
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {str(path)!r} as parquet: {error}") from error


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .parquet file with their numbers, from 0, and these columns of them."""
    number = 0
    with _open_parquet(path) as file:
        for name in columns:
            if len(file.schema_arrow.get_all_field_indices(name)) != 1:
                raise UserError(f"{str(path)!r} has several columns {name!r}: give them different names")
        # Asked for "text", pyarrow also gives "text.length".
        for batch in file.iter_batches(SAMPLE, columns=columns):
            values = [batch.column(name).to_pylist() for name in columns]
            for row in zip(*values, strict=True):
                yield number, dict(zip(columns, row, strict=True))
                number += 1
