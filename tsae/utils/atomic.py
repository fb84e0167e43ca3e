"""Files that are whole or not there: written under another name and renamed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from tsae.errors import UserError

_CHUNK = 1 << 20  # bytes read at once for a checksum


class WriteError(UserError):
    """A file could not be written, as on a full disk.

    reason: in the system's words
    """

    def __init__(self, path: Path, reason: str, advice: str = "make room there, and start or resume again") -> None:
        super().__init__(f"{path} cannot be written ({reason}); what was complete is kept: {advice}.")
        self.reason = reason


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block a write that fails raises `WriteError`, which names ``path``."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, error.strerror or str(error)) from None
    except Exception as error:
        said = re.search(r"(?:.*: )?(.*) \(os error \d+\)", str(error))  # by a library in Rust
        if said is None:
            raise
        raise WriteError(path, said[1]) from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` that takes its place when the block ends without an error.

    Its name is always the same, so that the next write takes up what a killed one left; ``path`` has one writer.
    A write that fails raises `WriteError`, and leaves what was there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Any) -> None:
    """Write ``values`` as JSON; NaN and infinities raise `ValueError`, as JSON has none."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def save_pickle(values: Any, path: Path) -> None:
    """`torch.save`, with the system's own error where the file cannot be written."""
    with path.open("wb") as file:  # in place of the path, for which PyTorch reports a position alone
        try:
            torch.save(values, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file, in hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_of(values: Any) -> str:
    """The same of plain JSON values, however they are laid out in a file."""
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()
