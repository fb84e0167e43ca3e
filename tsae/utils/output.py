"""What commands print: tables on stdout, sentences and progress on stderr.

A stream that cannot be written never stops a command, whose result is on disk: characters that its encoding lacks
become "?", and once its reader is gone nothing more is written to it. Everything printed goes through `console` or
`tables`, which print text as it is: a path may hold anything, also what rich takes for markup.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console


class _Console(Console):
    """A console that prints text as it is, and draws in the characters of the stream's encoding."""

    def __init__(self, **options: Any) -> None:
        # In a notebook too the stream is written to, which the kernel shows in the order of everything printed.
        super().__init__(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)

    @property
    def encoding(self) -> str:
        """Of the stream as it is now; rich looks only at one given to the constructor."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()


console = _Console(stderr=True)


def say(sentence: str) -> None:
    """Print a sentence on stderr, on one line."""
    console.print(sentence, soft_wrap=True)


def tables(width: int = 0) -> Console:
    """A console on stdout; ``width``: at least, in characters, where it is no terminal, so that no table is folded."""
    found = _Console()
    if not found.is_terminal:
        found.width = max(found.width, width)
    return found


def rendered(content: Any, width: int) -> str:
    """What `tables` would print, in plain text, ``width`` characters wide at most."""
    out = io.StringIO()
    _Console(file=out, width=width, color_system=None).print(content)
    return out.getvalue()


class Tolerant:
    """A text stream whose failures stop nothing; other attributes are those of the stream.

    failure: the error after which nothing more is written; None while the stream works
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or drop, all of the text; its length."""
        if self.failure is None:
            try:
                self._write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """`write` every line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream, unless it has failed."""
        if self.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:  # before anything is written
            encoding = getattr(self._stream, "encoding", None) or error.encoding
            self._stream.write(text.encode(encoding, "replace").decode(encoding))

    def _give_up(self, error: OSError) -> None:
        self.failure = error
        with suppress(OSError, ValueError):  # what is buffered would fail again when Python ends
            if self._stream.fileno() in (1, 2):
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerant_streams() -> Iterator[Tolerant]:
    """Within the block stdout and stderr are `Tolerant`, and exist: a closed one leads nowhere. Yields stdout.

    A closed descriptor is opened, or the next file, such as a checkpoint, would get its number and everything that
    libraries print.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (Tolerant(nowhere if stream is None else stream) for stream in before)
        sys.stdout, sys.stderr = out, err
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            if sys.stdout is out:
                sys.stdout = before[0]
            if sys.stderr is err:
                sys.stderr = before[1]


def _open_closed() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
