"""Autoencoders of other libraries: a small module per format, and `load`, which recognizes the format.

docs/formats.md says what is read and written, and what is refused and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tsae.errors import UserError
from tsae.formats import dictionary_learning, gemma_scope, hub, saelens, sparsify
from tsae.sae.model import SparseAutoencoder
from tsae.utils.paths import expanded

__all__ = ["load"]


@dataclass(frozen=True)
class Format:
    """A directory format: the files that identify it, and its reader, which takes the first of them."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], SparseAutoencoder]
    pickled: bool = False

    def matches(self, directory: Path) -> bool:
        """Whether the directory has all files of this format."""
        return all((directory / file).is_file() for file in self.files)


# The first match is read.
FORMATS = (
    Format("a run", (f"sae/{saelens.CONFIG}", f"sae/{saelens.WEIGHTS}"), saelens.read),
    Format("SAELens", (saelens.CONFIG, saelens.WEIGHTS), saelens.read),
    Format("sparsify", (sparsify.CONFIG, sparsify.WEIGHTS), sparsify.read),
    Format("dictionary_learning", (dictionary_learning.WEIGHTS,), dictionary_learning.read, pickled=True),
    Format(
        "dictionary_learning",
        (f"{dictionary_learning.TRAINER}/{dictionary_learning.WEIGHTS}",),
        dictionary_learning.read,
        pickled=True,
    ),
    Format("Gemma Scope", (gemma_scope.ARRAYS,), gemma_scope.read),
    Format("Gemma Scope 2", (gemma_scope.WEIGHTS,), gemma_scope.read),
)
# Files that readers also use if they exist.
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
    finite: bool = True,
) -> SparseAutoencoder:
    """A sparse autoencoder in any known format, in ``eval()`` mode, on raw activations.

    It computes what the library that wrote it computes, up to rounding. No code in any file is executed. From the hub,
    only the files of the format are downloaded.

    source: a directory (a run or its `sae/`; SAELens; dictionary_learning's `trainer_0` or its parent; a sparsify
        hookpoint; Gemma Scope), one of the files in it, or a place on the Hugging Face hub,
        `OWNER/NAME[/FOLDER...][@REVISION]`
    device: where the parameters go
    revision: branch, tag or commit on the hub, instead of `@REVISION`
    token: for a private repository; None uses the token of `hf auth login`
    cache_dir: None is the hub client's default cache
    local_files_only: use only the cache, never the network
    pickles: also read dictionary_learning's `ae.pt`, from which only tensors are unpickled; False never opens or
        downloads one
    finite: refuse an autoencoder with NaN or infinity in its weights; False leaves that to the caller

    Raises:
        UserError: there is no such place, no known format is in it, a file is damaged, a tensor has the wrong shape,
            a field or a tensor is not understood, or the autoencoder computes something that this version cannot.
    """
    formats = tuple(known for known in FORMATS if pickles or not known.pickled)
    path = expanded(source)
    if not path.exists():
        if not hub.is_hub_id(str(source)):
            raise UserError(f"There is no {source}; name a directory, or a repository on the hub, OWNER/NAME/FOLDER.")
        path = hub.download(
            str(source),
            (*(file for known in formats for file in known.files), *OPTIONAL),
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else expanded(cache_dir),
            local_files_only=local_files_only,
        )
    sae = _read(path, str(source), formats)
    if finite and (what := sae.not_finite()):
        raise UserError(f"{source}: {what}; its training diverged, or the file is damaged.")
    return sae.to(device)


def _read(path: Path, source: str, formats: tuple[Format, ...]) -> SparseAutoencoder:
    if path.is_file():
        if path.name in (gemma_scope.ARRAYS, gemma_scope.WEIGHTS) or path.suffix == ".npz":
            return gemma_scope.read(path)
        if path.suffix in (".pt", ".pth", ".bin") and any(known.pickled for known in formats):
            return dictionary_learning.read(path)
        path = path.parent
    for known in formats:
        if known.matches(path):
            return known.read(path / known.files[0])
    looked_for = "; ".join(f"{' and '.join(known.files)} ({known.name})" for known in formats)
    hint = "" if formats == FORMATS else ". Only tsae.load reads pickles"
    raise UserError(f"{source} holds no autoencoder in a known format; looked for {looked_for}{hint}.")
