"""A disk that is full, for tests: files that cannot grow beyond a size, by the system's own EFBIG."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["files_of_at_most", "filling"]


@contextmanager
def filling() -> Iterator[Callable[[int], None]]:
    """The yielded function takes the bytes that no write may bring a file beyond, until the block ends."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within the block a write beyond so many bytes of a file fails."""
    with filling() as fill:
        fill(size)
        yield
