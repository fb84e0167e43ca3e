"""Rows of data files: .jsonl and .csv (also compressed), .parquet, and Arrow files of saved datasets."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsae.data.columns import SAMPLE, Kind, kinds_of_schema, lookup_arrow, sample
from tsae.data.encodings import lines
from tsae.data.folders import ARROW, CSV, PARQUET, has_suffix
from tsae.errors import UserError

Rows = Iterator[tuple[int, dict[str, Any]]]
"""Rows with their numbers: of a line from 1, of a row of a table from 0."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|true|false|nan|null|none", re.IGNORECASE)
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
_MOST = 1 << 30  # characters in a field of .csv; the csv module's own limit is 131,072


def read_rows(path: Path, columns: list[str]) -> Rows:
    """The rows of a file; of a table in columns (.parquet, .arrow) only these columns, as `lookup` finds them.

    Raises UserError where the file is damaged or has a row that is none.
    """
    if has_suffix(path, (*PARQUET, *ARROW)):
        return _table_rows(path, columns)
    return _csv_rows(path) if has_suffix(path, CSV) else _json_rows(path)


def kinds_of_columns(path: Path, wanted: str) -> dict[str, Kind]:
    """The kinds of a file's columns, from its schema or first rows; maybe not all if `wanted` is among them."""
    if has_suffix(path, CSV):
        return sample(({name: _typed(value) for name, value in row.items()} for _, row in _csv_rows(path)), wanted)
    if not has_suffix(path, (*PARQUET, *ARROW)):
        return sample((row for _, row in _json_rows(path)), wanted)
    with _open_parquet(path) if has_suffix(path, PARQUET) else _open_arrow(path) as file:
        columns = kinds_of_schema(file.schema_arrow if has_suffix(path, PARQUET) else file.schema, wanted)
    strings = [name for name, kind in columns.items() if kind == Kind.TEXT]
    if wanted not in columns and strings:  # perhaps ids or blank
        columns |= sample((row for _, row in _table_rows(path, strings)), wanted)
    return columns


def _json_rows(path: Path) -> Rows:
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


def _csv_rows(path: Path) -> Rows:
    """The rows of a .csv file below its header, with the number of the line that each ends on."""
    csv.field_size_limit(_MOST)
    reader = csv.reader(lines(path), strict=True)
    header: list[str] | None = None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"line {reader.line_num} of {str(path)!r} is not valid CSV: {error}") from error
        if not fields:  # a blank line
            continue
        if header is None:
            header = fields
            _check_header(header, path)
        elif len(fields) != len(header):
            raise UserError(
                f"line {reader.line_num} of {str(path)!r} has {len(fields)} fields, but the header has {len(header)}: "
                "quote the fields that hold a comma"
            )
        else:
            yield reader.line_num, dict(zip(header, fields, strict=True))


def _check_header(header: list[str], path: Path) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{str(path)!r} has several columns {twice!r}: give them different names")
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise UserError(f"the columns of {str(path)!r} seem to be separated by {other!r}: separate them by commas")


def _typed(field: str) -> Any:
    """A field of .csv, with a number or truth value in the place of one that spells it."""
    return 0 if _NUMBER.fullmatch(field.strip()) else field


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


@contextmanager
def _open_arrow(path: Path) -> Iterator[Any]:
    """The batches of an Arrow stream, with its schema; its errors as UserError."""
    import pyarrow as pa

    with path.open("rb") as file:  # pyarrow takes a file that was cut between two batches for a complete one
        file.seek(max(0, path.stat().st_size - len(_END)))
        if file.read() != _END:
            raise UserError(f"cannot read {str(path)!r} as Arrow: it is no complete stream")
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
            yield batches
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {str(path)!r} as Arrow: {error}") from error


def _table_rows(path: Path, columns: list[str]) -> Rows:
    number = 0
    is_parquet = has_suffix(path, PARQUET)
    with _open_parquet(path) if is_parquet else _open_arrow(path) as file:
        schema = file.schema_arrow if is_parquet else file.schema
        found = {name: place[0] for name in columns if (place := lookup_arrow(schema, name)) is not None}
        for name in found.values():
            if len(schema.get_all_field_indices(name)) != 1:
                raise UserError(f"{str(path)!r} has several columns {name!r}: give them different names")
        outer = list(dict.fromkeys(found.values()))
        # Asked for "text", pyarrow also gives "text.length".
        for batch in file.iter_batches(SAMPLE, columns=list(found)) if is_parquet else _slices(file):
            values = [batch.column(name).to_pylist() for name in outer]
            for row in zip(*values, strict=True):
                yield number, dict(zip(outer, row, strict=True))
                number += 1


def _slices(batches: Any) -> Iterator[Any]:
    """Batches of an Arrow stream, in parts of at most `SAMPLE` rows."""
    for batch in batches:
        for start in range(0, batch.num_rows, SAMPLE):
            yield batch.slice(start, SAMPLE)
