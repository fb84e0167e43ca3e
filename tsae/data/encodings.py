"""Files as Unicode text: the byte-order mark decides, or UTF-8; nothing is replaced."""

from __future__ import annotations

import codecs
import gzip
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from tsae.errors import UserError
from tsae.utils.notices import warn_once

log = logging.getLogger(__name__)

# UTF-32 before UTF-16: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_AT_ONCE = 1 << 20  # characters, or bytes


@contextmanager
def open_decoded(path: Path) -> Iterator[IO[str]]:
    """Open a text file, possibly compressed (.gz, .zst), without its byte-order mark; line ends become a newline.

    UTF-8, or UTF-16 or UTF-32 with a byte-order mark.

    Raises UserError, inside the context, where the file is something else: it names the first byte that is invalid.
    `pieces` and `lines` also refuse NUL, as in UTF-16 without a byte-order mark.
    """
    mark, encoding = _mark(path)
    with _open_bytes(path) as file:
        file.read(len(mark))
        try:
            yield io.TextIOWrapper(file, encoding)
        except UnicodeDecodeError:
            raise _fault(path) from None


def pieces(path: Path) -> Iterator[str]:
    """The text of a file, a piece at a time; raises as `open_decoded`."""
    with open_decoded(path) as file:
        while piece := file.read(_AT_ONCE):
            yield _without_nul(piece, path)


def lines(path: Path) -> Iterator[str]:
    """The lines of a file; raises as `open_decoded`."""
    with open_decoded(path) as file:
        for line in file:
            yield _without_nul(line, path)


def row_text(text: str, source: str) -> str:
    """The text of a row, whose format can spell what no file of text may hold; a warning names it.

    Lone surrogates, which tokenizers reject, become "?"; NUL is kept.

    source: for the warnings, as in "the dataset 'x'"
    """
    if "\0" in text:
        warn_once(log, f"{source} has text with the character NUL, which is kept: was it UTF-16?")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        warn_once(log, f"{source} has text with lone surrogates, halves of characters: each is read as '?'")
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


def _without_nul(text: str, path: Path) -> str:
    if "\0" in text:
        raise _fault(path)
    return text


def _open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, uncompressed."""
    if path.suffix.lower() == ".zst":
        import pyarrow as pa  # its codec joins frames and detects truncation; Python has one only from 3.14 on

        return io.BufferedReader(pa.input_stream(path, compression="zstd"))
    return cast(IO[bytes], gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb"))


def _mark(path: Path) -> tuple[bytes, str]:
    """The byte-order mark of a file, if any, and its encoding."""
    with _open_bytes(path) as file:
        start = file.read(4)
    return next(((mark, encoding) for mark, encoding in _MARKS if start.startswith(mark)), (b"", "utf-8"))


def _fault(path: Path) -> UserError:
    """The sentence about the first byte of a file that is not text."""
    mark, encoding = _mark(path)
    decoder = codecs.getincrementaldecoder(encoding)()
    with _open_bytes(path) as file:
        read = len(file.read(len(mark)))
        while True:
            chunk = file.read(_AT_ONCE)
            start = read - len(decoder.getstate()[0])  # of what is decoded now
            read += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at, what = start + error.start, f"is not {encoding.upper()} ({error.reason})"
                break
            if (nul := text.find("\0")) >= 0:
                at, what = start + len(text[:nul].encode(encoding)), "is NUL, as in UTF-16 without a byte-order mark"
                break
            if not chunk:
                return UserError(f"{str(path)!r} changed while it was read")
    where = " of its uncompressed text" if path.suffix.lower() in (".gz", ".zst") else ""
    return UserError(f"cannot read {str(path)!r} as text: byte {at}{where} {what}; convert it to UTF-8")
