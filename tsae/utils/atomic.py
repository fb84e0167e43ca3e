"""Atomic writes: a file is written under a temporary name and renamed when it is complete."""

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
    """A file could not be written, for example on a full disk.

    reason: the message of the operating system
    """

    def __init__(self, path: Path, reason: str, advice: str = "make room there, and start or resume again") -> None:
        super().__init__(f"{path} cannot be written ({reason}); what was complete is kept: {advice}.")
        self.reason = reason


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block a failed write raises `WriteError` with ``path``."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, error.strerror or str(error)) from None
    except Exception as error:
        said = re.search(r"(?:.*: )?(.*) \(os error \d+\)", str(error))  # of a library in Rust
        if said is None:
            raise
        raise WriteError(path, said[1]) from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends without an error.

    The temporary name is fixed, so that the next write overwrites what a killed one left; ``path`` has one writer.
    A failed write raises `WriteError` and leaves ``path`` unchanged.
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
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Any) -> None:
    """Write ``values`` as JSON; NaN and infinities raise `ValueError`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def save_pickle(values: Any, path: Path) -> None:
    """`torch.save` that raises the `OSError` of a file that cannot be written."""
    with path.open("wb") as file:  # given a path, PyTorch reports only a position
        try:
            torch.save(values, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_of(values: Any) -> str:
    """XXH3 (128 bits) of JSON values, independent of their layout in a file."""
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()
