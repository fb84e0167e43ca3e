"""Text from local files or folders: .txt and .jsonl (also compressed with gzip or zstd) and .parquet."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from tsae.data.documents import Document, cut
from tsae.errors import UserError

_TXT = (".txt", ".txt.gz", ".txt.zst")
_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*_TXT, *_JSONL, ".parquet")

_CHARACTERS = 1 << 20  # read at once
_ROWS = 1_000  # of parquet, read at once


def find_files(source: Path) -> list[Path]:
    """The text files in a folder and its subfolders, except hidden ones, sorted; or the single file named.

    Raises UserError if there are none.
    """
    kinds = ", ".join(SUFFIXES)
    if source.is_file():
        if not source.name.endswith(SUFFIXES):
            raise UserError(f"cannot read text from {str(source)!r}: expected a file that ends in one of {kinds}")
        return [source]
    found = []
    for folder, subfolders, names in os.walk(source):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, n) for n in names if n.endswith(SUFFIXES) and not n.startswith(".")]
    if not found:
        raise UserError(f"no text files in the folder {str(source)!r}: expected files that end in one of {kinds}")
    return sorted(found)


def read_files(paths: Iterable[Path], column: str | None) -> Iterator[Document]:
    """The non-blank documents of the files, in order: passages of .txt files, rows of the others.

    Raises UserError for an unreadable file or a row without a text column.
    """
    for path in paths:
        try:
            if path.name.endswith(".parquet"):
                documents = _read_parquet(path, column)
            elif path.name.endswith(_JSONL):
                documents = _read_jsonl(path, column)
            else:
                documents = _read_txt(path)
            for document in documents:
                if document.text and not document.text.isspace():
                    yield document
        except (OSError, EOFError, zlib.error) as error:  # includes errors of gzip and zstd
            raise UserError(f"cannot read {str(path)!r}: {error}") from error


def choose_column(columns: Mapping[str, bool], requested: str | None, source: str) -> str:
    """The text column: the requested one, or "text", or the only column of strings.

    columns: whether each column holds strings.
    Raises UserError, which lists the columns, if there is no such column.
    """
    names = ", ".join(columns) or "none"
    if requested is not None:
        if requested not in columns:
            raise UserError(f"no column {requested!r} in {source}: the columns are {names}")
        if not columns[requested]:
            raise UserError(f"the column {requested!r} of {source} does not hold text: the columns are {names}")
        return requested
    strings = [name for name, is_string in columns.items() if is_string]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise UserError(f"cannot tell which column of {source} holds the text: name one of {names}")
    return strings[0]


def _open(path: Path) -> IO[str]:
    options = {"encoding": "utf-8-sig", "errors": "replace"}
    if path.suffix == ".zst":
        import pyarrow as pa  # its codec joins frames and detects truncation; Python has one only from 3.14 on

        return io.TextIOWrapper(io.BufferedReader(pa.input_stream(path, compression="zstd")), **options)
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", **options)


def _read_txt(path: Path) -> Iterator[Document]:
    with _open(path) as file:
        for i, passage in enumerate(cut(iter(lambda: file.read(_CHARACTERS), ""))):
            yield Document(f"{path}#{i}", passage)


def _read_jsonl(path: Path, column: str | None) -> Iterator[Document]:
    name = None
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} of {str(path)!r} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"line {number} of {str(path)!r} is not a JSON object with a text column")
            if name is None:
                name = choose_column({k: isinstance(v, str) for k, v in row.items()}, column, f"{str(path)!r}")
            text = row.get(name)
            if text is None:
                continue
            if not isinstance(text, str):
                raise UserError(f"line {number} of {str(path)!r}: the column {name!r} does not hold text")
            # JSON can contain lone surrogates, which tokenizers reject.
            yield Document(f"{path}#{number}", text.encode("utf-8", "replace").decode("utf-8"))


def _read_parquet(path: Path, column: str | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_string(kind: pa.DataType) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # if the file has checksums
            columns = {field.name: is_string(field.type) for field in file.schema_arrow}
            name = choose_column(columns, column, f"{str(path)!r}")
            number = 0
            for batch in file.iter_batches(_ROWS, columns=[name]):
                for text in batch.column(0).to_pylist():
                    yield Document(f"{path}#{number}", text or "")
                    number += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {str(path)!r} as parquet: {error}") from error
