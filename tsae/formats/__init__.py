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
    pickled: bool = False

    def is_in(self, directory: Path) -> bool:
        """Whether the directory has all files of this format."""
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
        pickled=True,
    ),
    Format(
        "dictionary_learning",
        (f"{dictionary_learning.TRAINER}/{dictionary_learning.WEIGHTS}",),
        lambda folder: dictionary_learning.read(folder / dictionary_learning.TRAINER / dictionary_learning.WEIGHTS),
        pickled=True,
    ),
    Format("Gemma Scope", (gemma_scope.ARRAYS,), lambda folder: gemma_scope.read(folder / gemma_scope.ARRAYS)),
    Format("Gemma Scope 2", (gemma_scope.WEIGHTS,), lambda folder: gemma_scope.read(folder / gemma_scope.WEIGHTS)),
)
# Beside those that a format is known by: what says more about it.
OPTIONAL = ("config.json", f"{dictionary_learning.TRAINER}/config.json", saelens.SCALER)


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    pickles: bool = True,
) -> SparseAutoencoder:
    """A sparse autoencoder of any format that is known, in ``eval()`` mode, on raw activations.

    source: a directory (a run's, or its `sae/`; SAELens's; dictionary_learning's `trainer_0`, or what holds it;
        sparsify's hookpoint; Gemma Scope's), one of the files in it, or a place on the Hugging Face hub,
        `OWNER/NAME[/FOLDER...][@REVISION]`.
    device: where its parameters go
    revision: of a repository on the hub: branch, tag or commit; as after the `@`
    token: for a private repository; None takes the one of `hf auth login`
    cache_dir: None is the hub client's own cache
    local_files_only: do not ask the network
    pickles: also read dictionary_learning's `ae.pt`, of which tensors alone are unpickled; False never opens or
        downloads one
    out: computes what the library that wrote it does, to rounding: what can be is folded into the weights.

    No code in any file is executed. Of a repository on the hub only the files that a format consists of are downloaded.

    Raises:
        UserError: there is no such place, it is in no known format (naming the files looked for), a file is broken, a
            tensor has the wrong shape, or the autoencoder does what this version cannot compute.
    """
    formats = tuple(known for known in FORMATS if pickles or not known.pickled)
    path = Path(source).expanduser()
    if not path.exists():
        if not hub.is_hub_id(str(source)):
            raise UserError(f"There is no {source}; name a directory, or a repository on the hub, OWNER/NAME/FOLDER.")
        path = hub.download(
            str(source),
            (*(file for known in formats for file in known.files), *OPTIONAL),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    return _read(path, str(source), formats).to(device)


def _read(path: Path, source: str, formats: tuple[Format, ...]) -> SparseAutoencoder:
    if path.is_file():
        if path.name in (gemma_scope.ARRAYS, gemma_scope.WEIGHTS) or path.suffix == ".npz":
            return gemma_scope.read(path)
        if path.suffix in (".pt", ".pth", ".bin") and any(known.pickled for known in formats):
            return dictionary_learning.read(path)
        path = path.parent
    for known in formats:
        if known.is_in(path):
            return known.read(path)
    looked_for = "; ".join(f"{' and '.join(known.files)} ({known.name})" for known in formats)
    left = "" if formats == FORMATS else ". Pickles are read by tsae.load alone"
    raise UserError(f"{source} holds no autoencoder in a known format; looked for {looked_for}{left}.")
