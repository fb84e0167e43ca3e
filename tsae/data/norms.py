"""Tokens whose activations are many times larger than the others': how much they hold, and leaving them out.

In most language models a few tokens (the first ones, delimiters) have activations tens to thousands of times the usual
size ("massive activations", Sun et al. 2024, arXiv 2402.17762). They then hold most of the squared norm and of the
variance, so that a reconstruction of them alone scores an explained variance near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NormReport:
    """How the squared norm of activations is shared out.

    ratio:  tokens above this multiple of the median norm count as large
    median: norm, in activation units
    tokens: number of counted tokens
    large:  how many of them are large
    share:  of the squared norm, what the large ones hold, 0 to 1
    """

    ratio: float
    median: float
    tokens: int
    large: int
    share: float

    @property
    def limit(self) -> float:
        """The norm above which a token is large."""
        return self.ratio * self.median


def token_norms(x: Tensor) -> Tensor:
    """[N, T] float64, the L2 norms of activations x [N, T, d]; sequence by sequence, so that the copy is small."""
    rows = [row.double().norm(dim=-1) for row in x]
    return torch.stack(rows) if rows else x.new_zeros(x.shape[:2], dtype=torch.float64)


def report_norms(x: Tensor, segments: Tensor, ratio: float) -> NormReport:
    """The report on activations x [N, T, d]; positions with a negative segment [N, T] do not count."""
    norms = token_norms(x)[segments >= 0]  # [n]
    if not len(norms):
        return NormReport(ratio, 0.0, 0, 0, 0.0)
    median = float(norms.median())
    large, square = norms > ratio * median, norms.square()
    total, held = float(square.sum()), float(square[large].sum())
    share = 1.0 if math.isinf(held) else held / total if total else 0.0
    return NormReport(ratio, median, len(norms), int(large.sum()), share)


def large_tokens(x: Tensor, limit: float) -> Tensor:
    """[N, T] bool, whether the norm of each activation of x [N, T, d] is above ``limit``."""
    return token_norms(x) > limit
