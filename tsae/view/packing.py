"""Numbers as short text for JSON: variable-length integers in base64, and rounded decimals."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable

import numpy as np
from torch import Tensor


def pack(values: np.ndarray) -> str:
    """Non-negative integers below 2^28 as base64 varints: 7 bits per byte, low bits first, bit 7 on all but the last.

    values: [n] integers
    """
    values = np.asarray(values, dtype=np.int64)
    lengths = np.ones_like(values) + sum((values >= 1 << shift).astype(np.int64) for shift in (7, 14, 21))
    ends = np.cumsum(lengths)
    out = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for i in range(4):
        there = lengths > i
        byte = (values[there] >> (7 * i)) & 0x7F
        more = (lengths[there] > i + 1).astype(np.int64) << 7
        out[ends[there] - lengths[there] + i] = byte | more
    return base64.b64encode(out.tobytes()).decode("ascii")


def rounded(values: Tensor | np.ndarray | Iterable[float], digits: int = 4) -> list[float | None]:
    """Floats rounded to ``digits`` significant digits; None for a value that is not finite."""
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]
