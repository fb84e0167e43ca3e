"""Segments: which positions of a row belong to the same stretch of text.

A segment is a maximal run of equal, non-negative ids along T; a negative id excludes the position. An id that
comes back after another one starts a new segment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Runs(NamedTuple):
    """Where the segment of every position lies. All are [B, T]."""

    start: Tensor  # int64, first position of the segment
    end: Tensor  # int64, one past its last position; equal to `start` at excluded positions
    valid: Tensor  # bool, False at excluded positions


def find_runs(segments: Tensor) -> Runs:
    """segments: [B, T] integer ids. out: the runs they form."""
    positions = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    first = torch.ones_like(segments, dtype=torch.bool)  # the position starts a run
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    last = first.roll(-1, dims=1)
    last[:, -1].fill_(True)
    valid = segments >= 0
    start = torch.where(first, positions, 0).cummax(1).values
    end = torch.where(last, positions + 1, segments.shape[1]).flip(1).cummin(1).values.flip(1)
    return Runs(start, torch.where(valid, end, start), valid)


def count_positions(segments: Tensor) -> Tensor:
    """How many positions of each row are in the statistics: the `positions` of `temporal_loss_from_stats`.

    segments: [B, T] integer ids, negative where excluded
    out: [B] int64 on the same device
    """
    return (segments >= 0).sum(1)
