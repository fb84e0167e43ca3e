"""Segments: the positions of a row that belong to the same document.

A segment is a maximal run of equal, non-negative ids along T; a negative id excludes the position. An id that
recurs after a different one starts a new segment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Runs(NamedTuple):
    """The bounds of every position's segment. All are [B, T]."""

    start: Tensor  # int64, the segment's first position
    end: Tensor  # int64, one past its last position; `start` where excluded
    valid: Tensor  # bool, False at excluded positions


def find_runs(segments: Tensor) -> Runs:
    """The runs of equal ids in `segments`, [B, T] integers."""
    positions = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    first = torch.ones_like(segments, dtype=torch.bool)  # at positions that start a run
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    last = first.roll(-1, dims=1)
    last[:, -1].fill_(True)
    valid = segments >= 0
    start = torch.where(first, positions, 0).cummax(1).values
    end = torch.where(last, positions + 1, segments.shape[1]).flip(1).cummin(1).values.flip(1)
    return Runs(start, torch.where(valid, end, start), valid)


def count_positions(segments: Tensor) -> Tensor:
    """The number of non-excluded positions in each row: `positions` of `temporal_loss_from_stats`.

    segments: [B, T] integer ids, negative where excluded
    out: [B] int64 on the same device
    """
    return (segments >= 0).sum(1)


def count_pairs(segments: Tensor) -> Tensor:
    """The number of pairs (t, t + 1) inside a segment in each row: those of `CountedStats.transitions`.

    segments: [B, T] integer ids, negative where excluded
    out: [B] int64 on the same device
    """
    return ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)).sum(1)
