"""Temporal sparse autoencoders for language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsae.config import SAEConfig, TrainConfig
    from tsae.errors import UserError
    from tsae.formats import load
    from tsae.sae.model import SparseAutoencoder

__all__ = ["SAEConfig", "SparseAutoencoder", "TrainConfig", "UserError", "load"]

# Imported when first used: PyTorch alone takes more than a second.
_MODULES = {
    "SAEConfig": "tsae.config",
    "TrainConfig": "tsae.config",
    "UserError": "tsae.errors",
    "SparseAutoencoder": "tsae.sae.model",
    "load": "tsae.formats",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
