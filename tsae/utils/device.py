"""The device that a configuration or a command line names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tsae.errors import UserError
from tsae.utils.torchrun import local_rank, world_size

_pretended = False


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; `auto` is the GPU if there is one, and each of several processes gets its own.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"There is no device {name!r}; use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"Device {name!r} is not available: PyTorch sees no GPU. Use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"Device {name!r} is not available: there are {torch.cuda.device_count()} GPUs.")
    return device


def runs_behind(device: torch.device) -> bool:
    """Whether ``device`` works through a queue that the host must not wait for: every device but the CPU.

    A training step there asks for no value of a tensor, and no shape depends on one.
    """
    return _pretended or device.type != "cpu"


@contextmanager
def pretend_to_run_behind() -> Iterator[None]:
    """`runs_behind` is true of the CPU too, for tests of what a step does on a GPU."""
    global _pretended
    before, _pretended = _pretended, True
    try:
        yield
    finally:
        _pretended = before
