"""The activation cache: a directory of shards, each with complete sequences, and a manifest.

`manifest.json` lists the valid shards with their sizes and checksums. A shard is complete before it is listed, so a
writer can be killed at any moment. docs/cache.md has the format and the guarantees.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tsae.data.harvest import ActivationBatch
from tsae.data.sequences import TokenBatch
from tsae.errors import UserError
from tsae.utils.atomic import WriteError, atomic_write, checksum, checksum_of, write_json
from tsae.utils.config_json import from_dict
from tsae.utils.lock import HeldError, Lock

FORMAT = 2
MANIFEST, LOCK = "manifest.json", "lock"
SHARD_BYTES = 64 * 2**20  # of activations; a shard is written when it has this many


def sequence_bytes(length: int, width: int, dtype: torch.dtype) -> int:
    """Bytes per sequence in a cache: activations, segment ids (int32) and token ids (int32)."""
    return length * (width * dtype.itemsize + 4) + (length + 1) * 4


@dataclass
class Shard:
    """An entry of the manifest: sequences in the shard, and its file's size and XXH3 (128 bits, hexadecimal)."""

    sequences: int
    bytes: int
    checksum: str


class ActivationCache:
    """The cache in a directory; opening it writes nothing.

    Args:
        directory: an existing cache, or a missing or empty directory for a new one.
        key: everything that determines the activations, as JSON values by name; an existing cache must have the same.
        made_with: versions and device, recorded but not compared.
        group: sequences per group, the unit of reading and writing.

    Raises:
        UserError: the directory has other content or a cache with another key, or its manifest cannot be read.
    """

    def __init__(self, directory: Path, key: dict[str, Any], made_with: dict[str, Any], *, group: int) -> None:
        self.directory, self.group = directory, group
        self._key: dict[str, Any] = json.loads(json.dumps(key))
        self._made_with = made_with
        self._lock: Lock | None = None
        self._pending: list[tuple[TokenBatch, ActivationBatch]] = []  # groups not yet written
        self._pending_stream: dict[str, Any] = {}  # state of the token stream after them
        self._intact: set[int] = set()  # shards whose checksum was verified
        self._set_entries([])
        self._load()

    @property
    def shards(self) -> int:
        """Number of shards in the manifest."""
        return len(self._entries)

    @property
    def groups(self) -> int:
        """Number of groups in these shards."""
        return self._ends[-1] if self._ends else 0

    def path(self, shard: int) -> Path:
        """A shard's file."""
        return self.directory / f"shard-{shard:06d}.safetensors"

    def span(self, shard: int) -> tuple[int, int]:
        """A shard's first group, and the one after its last."""
        return self._ends[shard - 1] if shard else 0, self._ends[shard]

    def shard_of(self, group: int) -> int:
        """The shard that holds a group."""
        return bisect_right(self._ends, group)

    def is_intact(self, shard: int) -> bool:
        """Whether a shard's file has the size and checksum in the manifest; computed once."""
        if shard not in self._intact:
            if self._is_damaged(shard):
                self._load()  # another process may have repaired it
                if shard >= self.shards or self._is_damaged(shard):
                    return False
            self._intact.add(shard)
        return True

    def read(self, group: int) -> tuple[TokenBatch, ActivationBatch]:
        """Tokens and activations of a group whose shard `is_intact`, copied out of the mapped file.

        Raises UserError if the file has been removed since.
        """
        shard = self.shard_of(group)
        low, names = (group - self.span(shard)[0]) * self.group, ("x", "segments", "tokens")
        try:
            with safe_open(self.path(shard), framework="pt") as file:
                x, segments, tokens = (file.get_slice(name)[low : low + self.group] for name in names)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path(shard)} cannot be read any more ({error}); start or resume again.") from None
        return TokenBatch(tokens.long(), segments), ActivationBatch(x, segments)

    def stream_after(self, shard: int) -> dict[str, Any]:
        """State of the token stream after the last sequence of a shard that `is_intact`."""
        with safe_open(self.path(shard), framework="pt") as file:
            return json.loads(file.metadata()["stream"])

    def lock(self) -> None:
        """Become the only writer until `close`; the system releases the lock of a killed process.

        Raises UserError if another process is writing, or if the directory cannot be written to.
        """
        if self._lock is not None:
            return
        lock = Lock(self.directory / LOCK, keep=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except HeldError as error:
            raise UserError(
                f"The cache {self.directory} is being written by {error}; wait until that has ended, or name another "
                "directory with --cache."
            ) from None
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from None
        self._lock = lock
        self._load()
        if not (self.directory / MANIFEST).exists():
            self._write_manifest()

    def append(self, tokens: TokenBatch, group: ActivationBatch, stream: dict[str, Any]) -> None:
        """Add the next group; it is written when a shard is full, or by `flush`.

        stream: state of the token stream after it
        Raises UserError if the file cannot be written; earlier shards stay valid.
        """
        self.lock()
        self._pending.append((tokens, group))
        self._pending_stream = stream
        if len(self._pending) * group.x.nbytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the groups added so far, as a shard that may be small."""
        if self._pending:
            pending, self._pending = self._pending, []
            self._set_entries([*self._entries, self._write(self.shards, pending, self._pending_stream)])
            self._intact.add(self.shards - 1)
            self._write_manifest()

    def replace(self, shard: int, groups: list[tuple[TokenBatch, ActivationBatch]], stream: dict[str, Any]) -> None:
        """Overwrite a damaged shard."""
        self.lock()
        self._entries[shard] = self._write(shard, groups, stream)
        self._intact.add(shard)
        self._write_manifest()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self) -> None:
        """Read the manifest, if it exists, and compare its key with this one's."""
        path = self.directory / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']!r}, and this version reads {FORMAT}")
            if values.pop("checksum") != checksum_of(values):
                raise ValueError("it is damaged: its checksum does not match")
            key, entries = values["request"], values["shards"]
            if not isinstance(key, dict) or not isinstance(entries, list):
                raise TypeError("request must be an object and shards a list")
            shards = [from_dict(Shard, entry, f"shards.{i}") for i, entry in enumerate(entries)]
            if any(shard.sequences < 1 for shard in shards):
                raise ValueError("a shard of no sequences")
        except (FileNotFoundError, NotADirectoryError):
            self._check_new()
            self._set_entries([])
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"The manifest {path} cannot be read ({reason}); remove the directory, or name another with --cache."
            ) from None
        self._check_key(key)
        self._set_entries(shards)

    def _set_entries(self, entries: list[Shard]) -> None:
        self._entries = entries
        self._ends = list(accumulate(entry.sequences // self.group for entry in entries))  # in groups

    def _check_new(self) -> None:
        """Raise `UserError` unless the directory is missing, or empty but for files of a start that was killed."""
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"The cache {self.directory} is a file; name a directory with --cache.")
        if self.directory.is_dir() and any(
            path.name not in (LOCK, f".{MANIFEST}.tmp") and not path.name.startswith(f"{LOCK}.")
            for path in self.directory.iterdir()
        ):
            raise UserError(f"{self.directory} is not empty and holds no cache; name a new directory with --cache.")

    def _check_key(self, got: dict[str, Any]) -> None:
        wanted = self._key
        names = [name for name in {**wanted, **got} if got.get(name) != wanted.get(name)]
        if names:
            differences = ", ".join(f"{n} is {got.get(n)!r} there and {wanted.get(n)!r} here" for n in names)
            raise UserError(
                f"The cache {self.directory} holds other activations than this run's: {differences}; name another "
                "directory with --cache, or make the run agree."
            )

    def _is_damaged(self, shard: int) -> bool:
        entry, path = self._entries[shard], self.path(shard)
        try:
            if path.stat().st_size != entry.bytes or checksum(path) != entry.checksum:
                return True
            with safe_open(path, framework="pt") as file:
                return file.get_slice("x").get_shape()[0] != entry.sequences
        except (OSError, SafetensorError):
            return True

    def _write(self, shard: int, groups: list[tuple[TokenBatch, ActivationBatch]], stream: dict[str, Any]) -> Shard:
        path = self.path(shard)
        tensors = {
            "x": torch.cat([group.x for _, group in groups]),  # [N, T, d]
            "segments": torch.cat([group.segments for _, group in groups]),  # [N, T] int32
            "tokens": torch.cat([tokens.tokens for tokens, _ in groups]).int(),  # [N, 1 + T]
        }
        try:
            with atomic_write(path) as temporary:
                save_file(tensors, temporary, metadata={"stream": json.dumps(stream)})
                return Shard(len(tensors["x"]), temporary.stat().st_size, checksum(temporary))
        except WriteError as error:
            raise self._failed(error.reason) from None

    def _write_manifest(self) -> None:
        values = {
            "format": FORMAT,
            "request": self._key,
            "made_with": self._made_with,
            "shards": [asdict(entry) for entry in self._entries],
        }
        try:
            write_json(self.directory / MANIFEST, values | {"checksum": checksum_of(values)})
        except WriteError as error:
            raise self._failed(error.reason) from None

    def _failed(self, reason: str) -> UserError:
        return UserError(
            f"The cache {self.directory} cannot be written to ({reason}); its complete shards stay and will be "
            "used: make room or name another directory with --cache, and start or resume again."
        )
