"""The dtypes of features, of their statistics, and the scale of sums."""

from __future__ import annotations

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of features."""


def dtype_of_stats(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics and of all arithmetic on features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_scale(dtype: torch.dtype) -> float:
    """A power of two that scales terms before they are summed, so that no sum overflows before its result does.

    Scaling by a power of two is exact. The C++ counterpart is kSumScale in csrc/shared/recurrence.h.
    """
    return 1.0 if dtype == torch.float64 else 2.0**-16
