"""Directories that cannot be written to, for root too."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_VERSION = 0x20080522  # of the structures of capset(2): two halves of 32 bits
_OVERRIDE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def read_only(*directories: Path) -> Iterator[None]:
    """Within the block nothing in these directories can be created, changed or removed by this thread."""
    modes = {
        path: path.stat().st_mode for top in directories for path in (top, *top.rglob("*")) if not path.is_symlink()
    }
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        with _without_privilege():
            if os.access(directories[0], os.W_OK, effective_ids=True):
                pytest.skip("this user can write anywhere")
            yield
    finally:
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)


@contextmanager
def _without_privilege() -> Iterator[None]:
    """Within the block root has no more rights to files than their owner."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) != 0:
        pytest.skip("no capabilities")
    effective = data[0]
    try:
        data[0] = effective & ~_OVERRIDE
        libc.capset(header, data)
        yield
    finally:
        data[0] = effective
        libc.capset(header, data)
