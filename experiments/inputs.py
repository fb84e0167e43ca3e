"""Directories of the autoencoders of `tsae.synthetic.inputs`: `sae/` and `method.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from tsae.rundir import layout
from tsae.sae.model import SparseAutoencoder
from tsae.synthetic.inputs import Crosscoder, RunningMeans
from tsae.utils.atomic import write_json

METHOD = "method.json"


def save(module: RunningMeans | Crosscoder, directory: Path) -> None:
    """Write ``sae/`` and ``method.json``."""
    module.inner.save(directory / layout.AUTOENCODER)
    what: dict[str, Any] = {"crosscoder": getattr(module, "window", 0)}
    if isinstance(module, RunningMeans):
        what = {"running_means": list(module.constants)}
    write_json(directory / METHOD, what)


def load(directory: Path) -> nn.Module:
    """What `save` wrote, or the autoencoder of any other run, in evaluation mode."""
    inner = SparseAutoencoder.load(directory / layout.AUTOENCODER)
    if not (directory / METHOD).is_file():
        return inner
    what = json.loads((directory / METHOD).read_text())
    if "crosscoder" in what:
        return Crosscoder(inner, what["crosscoder"]).eval()
    return RunningMeans(inner, tuple(what["running_means"])).eval()
