"""Autoencoders of other libraries: one small module for each format, and `load`, which tells them apart.

What is read, what is written, and what is refused and why: docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tsae.errors import UserError
from tsae.formats import dictionary_learning, gemma_scope, hub, saelens, sparsify
from tsae.sae import saving
from tsae.sae.model import SparseAutoencoder

__all__ = ["load"]


@dataclass(frozen=True)
class Format:
    """One kind of directory: the files that it is known by, and what reads it, given the directory."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], SparseAutoencoder]

    def is_in(self, directory: Path) -> bool:
        return all((directory / file).is_file() for file in self.files)


# The first that fits is taken.
FORMATS = (
    Format("a run", ("sae/cfg.json", "sae/sae_weights.safetensors"), lambda folder: saving.load(folder / "sae")),
    Format("SAELens", (saelens.CONFIG, saelens.WEIGHTS), lambda folder: saving.load(folder)),
    Format("sparsify", (sparsify.CONFIG, sparsify.WEIGHTS), sparsify.read),
    Format(
        "dictionary_learning",
        (dictionary_learning.WEIGHTS,),
        lambda folder: dictionary_learning.read(folder / dictionary_learning.WEIGHTS),
    ),
    Format(
        "dictionary_learning",
        (f"{dictionary_learning.TRAINER}/{dictionary_learning.WEIGHTS}",),
        lambda folder: dictionary_learning.read(folder / dictionary_learning.TRAINER / dictionary_learning.WEIGHTS),
    ),
    Format("Gemma Scope", (gemma_scope.ARRAYS,), lambda folder: gemma_scope.read(folder / gemma_scope.ARRAYS)),
    Format("Gemma Scope 2", (gemma_scope.WEIGHTS,), lambda folder: gemma_scope.read(folder / gemma_scope.WEIGHTS)),
)
# Beside those that a format is known by: what says more about it.
OPTIONAL = ("config.json", f"{dictionary_learning.TRAINER}/config.json", saelens.SCALER)


def load(source: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """A sparse autoencoder of any format that is known, in ``eval()`` mode, on raw activations.

    source: a directory (a run's, or its `sae/`; SAELens's; dictionary_learning's `trainer_0`, or what holds it;
        sparsify's hookpoint; Gemma Scope's), one of the files in it, or a place on the Hugging Face hub,
        `OWNER/NAME[/FOLDER...][@REVISION]`.
    out: computes what the library that wrote it does, to rounding: what can be is folded into the weights.

    No code in any file is executed.

    Raises:
        UserError: there is no such place, it is in no known format (naming the files looked for), a file is broken, a
            tensor has the wrong shape, or the autoencoder does what this version cannot compute.
    """
    return _read(Path(source).expanduser(), str(source)).to(device)


def _read(path: Path, source: str) -> SparseAutoencoder:
    if path.is_file():
        if path.name in (gemma_scope.ARRAYS, gemma_scope.WEIGHTS) or path.suffix == ".npz":
            return gemma_scope.read(path)
        if path.suffix in (".pt", ".pth", ".bin"):
            return dictionary_learning.read(path)
        path = path.parent
    elif not path.exists():
        if not hub.is_hub_id(source):
            raise UserError(f"There is no {source}; name a directory, or a repository on the hub, OWNER/NAME/FOLDER.")
        path = hub.download(source, (*(file for known in FORMATS for file in known.files), *OPTIONAL))
    for known in FORMATS:
        if known.is_in(path):
            return known.read(path)
    looked_for = "; ".join(f"{' and '.join(known.files)} ({known.name})" for known in FORMATS)
    raise UserError(f"{source} holds no autoencoder in a known format; looked for {looked_for}.")
