"""Simulates a full disk: a limit on file size, beyond which the system fails a write with EFBIG."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def filling() -> Iterator[Callable[[int], None]]:
    """Yields a function that sets the limit in bytes; it holds until the block ends."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within the block, a write that takes a file beyond ``size`` bytes fails."""
    with filling() as fill:
        fill(size)
        yield
