"""Autoencoders on the Hugging Face hub: `push`, `load`, and the command `python -m tsae.hub RUN REPO`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsae.hub.transfer import load, prepare, push

__all__ = ["load", "prepare", "push"]


def __getattr__(name: str) -> Any:
    if name not in __all__:  # imported when first used, so that the command's --help is fast
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("tsae.hub.transfer"), name)
