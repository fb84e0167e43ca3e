"""What torchrun, or another launcher that speaks as it does, tells a process of its place."""

from __future__ import annotations

import os

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _number(name: str, alone: int) -> int:
    """Of a variable, where all are there: one alone may be another program's."""
    return int(os.environ.get(name, alone)) if all(needed in os.environ for needed in _NEEDED) else alone


def world_size() -> int:
    """How many processes were started; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def is_rank0() -> bool:
    """Whether this is the process that writes files and speaks."""
    return _number("RANK", 0) == 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return _number("LOCAL_RANK", 0)


def process_name() -> str:
    """For messages."""
    return f"process {_number('RANK', 0)} of {world_size()}"
