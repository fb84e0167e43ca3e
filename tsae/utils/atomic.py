"""Atomic writes: a file is written under a temporary name and renamed when it is complete."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import xxhash

from tsae.errors import UserError, WriteError
from tsae.utils.lock import HeldError, Lock, claim_file
from tsae.utils.paths import check_unicode

_CHUNK = 1 << 20  # bytes read at once for a checksum


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block a failed write raises `WriteError` with ``path``."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, error.strerror or str(error), error.errno) from None
    except Exception as error:
        said = re.search(r"(?:.*: )?(.*) \(os error (\d+)\)", str(error))  # of a library in Rust
        if said is None:
            raise
        raise WriteError(path, said[1], int(said[2])) from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends without an error.

    The temporary name is fixed, so that the next write overwrites what a killed one left, unless another process is
    writing ``path`` now.
    A failed write raises `WriteError` and leaves ``path`` unchanged. A link stays one, and gets its target replaced; a
    device or a pipe is written to.
    """
    with writing(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            with TemporaryDirectory() as folder:
                yield Path(folder) / "file"
                with (Path(folder) / "file").open("rb") as file, path.open("wb") as device:
                    shutil.copyfileobj(file, device)
            return
        target = path.resolve() if path.is_symlink() else path
        temporary = target.with_name(f".{target.name}.tmp")
        claim = claim_file(temporary)
        if claim is None:
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:  # the name may be another process's from here on
            if claim is not None:
                os.close(claim)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``, which is missing or empty, and rename it to ``path`` when the block
    ends without an error.

    Raises:
        UserError: it cannot be written, or another process is writing it.
    """
    check_unicode(path)
    whole = path.resolve()
    temporary = whole.with_name(f".{whole.name}.tmp")
    lock = Lock(whole.with_name(f".{whole.name}.lock"))
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
            try:
                temporary.mkdir()
                yield temporary
                for written in (*temporary.rglob("*"), temporary):
                    sync(written)
                os.replace(temporary, whole)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except HeldError as error:
        raise UserError(f"{path} is being written by {error}; wait until that has ended, or name another.") from None
    except (OSError, WriteError) as error:
        reason = error.reason if isinstance(error, WriteError) else error.strerror or str(error)
        raise UserError(f"{path} cannot be written ({reason}); name another directory.") from None


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
