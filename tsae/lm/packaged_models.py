"""Models that come as Python packages: a quantized GGUF file, converted once to a folder for transformers.

transformers can convert such a file too, but takes minutes for a large vocabulary, needs `accelerate`, and differs
between versions. `gemma_package` and `smollm_package` hold what belongs to one model.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.lm.gguf_file import GGUFFile
from tsae.utils.atomic import WriteError, sync, writing
from tsae.utils.lock import HeldError, Lock
from tsae.utils.output import say
from tsae.utils.paths import expanded
from tsae.utils.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class DamagedError(Exception):
    """The installed packages do not hold the file that they should."""


class PackagedModel(ABC):
    """A model in Python packages, and how its GGUF file becomes what transformers reads.

    name: for `--model`, and of its folder in the cache
    install, repair: the commands that install its packages, and that replace damaged ones
    space: that the conversion takes, for messages
    modules: GGUF's name of a module -> transformers'
    declared: fields of tokenizer_config.json that transformers does not write
    """

    name: ClassVar[str]
    install: ClassVar[str]
    repair: ClassVar[str]
    space: ClassVar[str]
    modules: ClassVar[Mapping[str, str]]
    declared: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def check(self) -> None:
        """Raise ImportError or FileNotFoundError if one of its packages is not installed."""

    @abstractmethod
    def unpack(self, path: Path) -> Path:
        """The GGUF file: written to ``path``, or where it lies in the package. Raises DamagedError."""

    @abstractmethod
    def config(self, metadata: dict[str, Any]) -> PreTrainedConfig:
        """transformers' configuration, from the file's metadata."""

    @abstractmethod
    def tokenizer(self, metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
        """The tokenizer, from the file's metadata."""

    def values(self, name: str, stored: Tensor, metadata: dict[str, Any]) -> Tensor:
        """A tensor's values as transformers' model has them.

        name: GGUF's
        stored: float32; a part of the rows, if there are more than 16,384
        """
        return stored

    def folder(self) -> Path:
        """The folder of the converted model, for `from_pretrained`; converts the model first if necessary.

        The folder appears atomically. If several processes need it, one converts and the others wait; leftovers of a
        killed process are removed.
        Raises UserError if the packages are not installed or the cache folder cannot be written to.
        """
        folder = cache_folder(self.name, self.space) / self.name
        if _is_complete(folder):
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_name(f"{self.name}.lock"), self.name):
                if not _is_complete(folder):
                    with writing(folder):
                        self._build(folder)
        except (OSError, WriteError) as error:
            reason = error.reason if isinstance(error, WriteError) else error.strerror or error
            raise UserError(
                f"cannot keep the demo model in {str(folder.parent)!r}: {reason} "
                f"(set TSAE_CACHE to a folder with {self.space} of space)"
            ) from error
        return folder

    def save(self, file: GGUFFile, folder: Path) -> None:
        """Write the model of a GGUF file as `from_pretrained` reads it."""
        from safetensors.torch import save_file

        size = sum(2 * prod(entry.shape) for entry in file.tensors) / 1e6  # in bfloat16
        with bar("Converting", size, "MB") as advance:
            weights = self.weights(file, advance)
        entries = len(file.metadata["tokenizer.ggml.tokens"])
        with bar("Tokenizer", entries, "entries") as advance:
            self.tokenizer(file.metadata).save_pretrained(folder)
            declaration = folder / "tokenizer_config.json"
            fields = json.loads(declaration.read_text(encoding="utf-8")) | self.declared
            declaration.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            advance(entries)
        with bar("Writing", size, "MB") as advance:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            advance(size)
        self.config(file.metadata).save_pretrained(folder)

    def weights(self, file: GGUFFile, advance: Callable[[float], None]) -> dict[str, Tensor]:
        """The tensors in bfloat16, under transformers' names; ``advance`` takes the megabytes converted."""
        weights = {}
        for entry in file.tensors:
            parts = []
            for stored in file.parts(entry):
                part = self.values(entry.name, torch.from_numpy(stored), file.metadata)
                parts.append(part.to(torch.bfloat16))
                advance(parts[-1].nbytes / 1e6)
            weights[self._full_name(entry.name)] = torch.cat(parts)
        return weights

    def _full_name(self, name: str) -> str:
        """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
        *block, module, kind = name.split(".")
        prefix = f"layers.{block[1]}." if block else ""
        return f"model.{prefix}{self.modules[module]}.{kind}"

    def _build(self, folder: Path) -> None:
        """Convert into a sibling folder and rename it. The lock is held, so an existing sibling is a leftover."""
        partial = folder.with_name(f"{self.name}.partial")
        for leftover in (partial, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
        try:
            self._convert(partial)
            for path in (*partial.iterdir(), partial):
                sync(path)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _convert(self, folder: Path) -> None:
        try:
            import gguf  # noqa: F401

            self.check()
        except (ImportError, FileNotFoundError) as error:
            raise UserError(
                f"the demo model {self.name} is not installed ({error}): run {self.install}, or name another model"
            ) from error
        say(f"Converting {self.name} to {folder.parent}, once.")
        with bar("Unpacking", None, "MB") as advance:
            try:
                packed = self.unpack(folder / "packed.gguf")
            except DamagedError as error:
                raise UserError(f"the packages of {self.name} are damaged ({error}): run {self.repair}") from error
            advance(packed.stat().st_size / 1e6)
        self.save(GGUFFile(packed), folder)
        (folder / "packed.gguf").unlink(missing_ok=True)


def cache_folder(name: str, space: str) -> Path:
    """The folder of converted models: $TSAE_CACHE, or else ~/.cache/tsae.

    name, space: of the model that needs it, for messages
    Raises UserError without a home directory.
    """
    asked = os.environ.get("TSAE_CACHE")
    try:
        return expanded(asked or "~/.cache/tsae")
    except UserError as error:
        if asked:
            raise UserError(f"TSAE_CACHE: {error}") from None
        raise UserError(
            f"{name} cannot be kept in ~/.cache/tsae, since HOME is not set to a folder; set HOME, or set TSAE_CACHE "
            f"to a folder with {space} of space."
        ) from None


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold the lock file within the block; the system releases it when the process ends, even if killed."""
    lock, waiting = Lock(path, keep=True), False
    while True:
        try:
            lock.acquire()
            break
        except HeldError as error:
            if not waiting:
                log.warning("waiting for %s to convert %s", error, name)
            waiting = True
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)
