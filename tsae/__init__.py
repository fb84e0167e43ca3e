"""Temporal sparse autoencoders for language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsae.api.evaluation import evaluate
    from tsae.api.run import Run
    from tsae.api.run import open as open
    from tsae.api.training import train
    from tsae.config import SAEConfig, TrainConfig
    from tsae.errors import UserError
    from tsae.formats import load
    from tsae.sae.model import SparseAutoencoder

# Without `open`, so that `from tsae import *` leaves Python's alone.
__all__ = ["Run", "SAEConfig", "SparseAutoencoder", "TrainConfig", "UserError", "evaluate", "load", "train"]

# Imported when first used: PyTorch alone takes more than a second.
_MODULES = {
    "SAEConfig": "tsae.config",
    "TrainConfig": "tsae.config",
    "UserError": "tsae.errors",
    "SparseAutoencoder": "tsae.sae.model",
    "load": "tsae.formats",
    "open": "tsae.api.run",
    "Run": "tsae.api.run",
}
_CALLABLE = ("train", "evaluate")  # submodules that can be called


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})
