"""The device that a configuration or a command line names."""

from __future__ import annotations

import torch

from tsae.errors import UserError
from tsae.utils.torchrun import local_rank, world_size


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
