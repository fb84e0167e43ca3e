"""The packaged demo model, converted once to a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

__all__ = ["NAME", "model_folder"]

NAME = "gemma-3-270m"


def model_folder() -> Path:
    raise NotImplementedError
