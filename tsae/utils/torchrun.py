"""The rank of this process, from the environment variables of torchrun or a compatible launcher."""

from __future__ import annotations

import os

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _number(name: str, alone: int) -> int:
    """The value of a variable, if all variables of a launcher are set: one alone may belong to another program."""
    return int(os.environ.get(name, alone)) if all(needed in os.environ for needed in _NEEDED) else alone


def world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def is_rank0() -> bool:
    """Whether this is the process that writes files and prints."""
    return _number("RANK", 0) == 0


def local_rank() -> int:
    """Rank of this process on its machine."""
    return _number("LOCAL_RANK", 0)


def process_name() -> str:
    """Name of this process in messages."""
    return f"process {_number('RANK', 0)} of {world_size()}"
