"""Streaming sums, from which every metric of an evaluation set is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements per chunk on a CPU: float32 temporaries of 2 MB fit in the L2 cache.
CHUNK_ELEMENTS = 1 << 19


class Accumulator:
    """Named float64 sums over batches.

    Accumulators of two halves of an evaluation set merge into the accumulator of the set.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def _add(self, name: str, value: Tensor | float) -> None:
        value = torch.as_tensor(value).detach().to(torch.float64)
        if name in self._sums:
            self._sums[name].add_(value.to(self._sums[name].device))
        else:
            self._sums[name] = value.clone()

    def _get(self, name: str) -> Tensor:
        """The sum on the CPU; 0 if nothing was added."""
        return self._sums.get(name, torch.zeros((), dtype=torch.float64)).cpu()

    def merge(self, other: Accumulator) -> None:
        """Add the sums of `other`, an accumulator of the same class over other batches."""
        if type(other) is not type(self):
            raise TypeError(f"other must be a {type(self).__name__}, got a {type(other).__name__}")
        for name, value in other._sums.items():
            self._add(name, value)


def ratio(numerator: Tensor | float, denominator: Tensor | float) -> float:
    """`numerator / denominator` as a float; 0.0 if the denominator is 0."""
    numerator, denominator = float(numerator), float(denominator)
    return numerator / denominator if denominator != 0.0 else 0.0


def mean_where(values: Tensor, selected: Tensor) -> float:
    """The mean of `values[selected]`, which may be undefined elsewhere; 0.0 if nothing is selected."""
    return float(values[selected].mean()) if bool(selected.any()) else 0.0


def segment_runs(segments: Tensor) -> Tensor:
    """Number the maximal runs of equal ids along T.

    segments: [B, T] integers, negative = excluded
    out:      [B, T] int64, 0, 1, ... along T; excluded positions are numbered too
    """
    starts = torch.zeros_like(segments, dtype=torch.int64)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return starts.cumsum(dim=1)


def pair_mask(segments: Tensor, lag: int) -> Tensor:
    """Mask of the pairs (t, t + lag) within one segment, with neither end excluded.

    segments: [B, T] integers, negative = excluded
    out:      [B, max(T - lag, 0)] bool
    """
    T = segments.shape[1]
    if lag >= T:
        return segments.new_zeros((segments.shape[0], 0), dtype=torch.bool)
    runs = segment_runs(segments)
    return (runs[:, : T - lag] == runs[:, lag:]) & (segments[:, : T - lag] >= 0)


def row_chunks(h: Tensor) -> Iterator[slice]:
    """Slices of the batch axis: cache-sized chunks on a CPU, the complete batch elsewhere."""
    B, T, k = h.shape
    rows = max(1, CHUNK_ELEMENTS // max(T * k, 1)) if h.device.type == "cpu" else max(B, 1)
    for start in range(0, B, rows):
        yield slice(start, start + rows)
