"""Reading a GGUF file: its metadata and its tensors, one at a time.

The `gguf` package's own reader takes half a minute for a vocabulary of 262,144 strings, because it makes several
numpy arrays for each; this one takes a second. The package still does the dequantizing.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ROWS_AT_ONCE = 16_384  # bounds the memory of dequantizing to float32


class TensorEntry(NamedTuple):
    """A tensor of the file: shape in torch's order, ggml type (kind), and offset in the data section in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFFile:
    """A memory-mapped GGUF file (version 2 or 3, little-endian).

    metadata: key -> number, string, or list of them.
    tensors: in file order.
    Raises ValueError if the file has another format.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 0
        magic, version, n_tensors, n_keys = self._unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            self.metadata[key] = self._value(*self._unpack("I"))
        self.tensors = [self._entry() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        self._data = -(-self._position // alignment) * alignment

    def parts(self, entry: TensorEntry) -> Iterator[np.ndarray]:
        """A tensor's values as float32, in parts along its first dimension."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType(entry.kind)
        block, size = GGML_QUANT_SIZES[kind]
        row_bytes = entry.shape[-1] // block * size
        rows = prod(entry.shape[:-1])
        raw = np.frombuffer(self._bytes, np.uint8, rows * row_bytes, self._data + entry.offset)
        raw = raw.reshape(rows, row_bytes)
        for first in range(0, rows, _ROWS_AT_ONCE):
            part = dequantize(raw[first : first + _ROWS_AT_ONCE], kind)
            yield np.require(part, np.float32, "W").reshape(-1, *entry.shape[1:])  # of float32 tensors it is a view

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        values = struct.unpack_from(layout, self._bytes, self._position)
        self._position += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._bytes, self._position)
        start = self._position + 8
        self._position = start + length
        return self._bytes[start : self._position].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._unpack("IQ")
            if kind in _SCALARS:
                return list(self._unpack(f"{count}{_SCALARS[kind]}"))
            return [self._value(kind) for _ in range(count)]
        return self._unpack(_SCALARS[kind])[0]

    def _entry(self) -> TensorEntry:
        name = self._string()
        (n_dimensions,) = self._unpack("I")
        shape = self._unpack(f"{n_dimensions}Q")[::-1]  # ggml lists the fastest dimension first
        return TensorEntry(name, shape, *self._unpack("IQ"))
