"""Explained variance with and without the tokens whose activations are many times larger than the others'."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsae.evaluation.metrics.accumulator import Accumulator, ratio

STEPS = 16
"""Norms are told apart in this many steps per factor of 2 (4.4 % each)."""
_ZERO = -1 << 20  # the step of a norm of 0


class MassiveActivations(Accumulator):
    """Explained variance without massive tokens, and what these hold.

    A token is massive if its norm |x| is above `norm_ratio` times the median norm of the set. The median and the ratio
    are each rounded up to one of 16 steps per factor of 2, so the limit is at most 4.4 % too high if `norm_ratio` is a
    power of 2, else 9.1 %. The sums are kept by step, since the median is known only at the end; they take
    (d + 4) * 8 bytes for each step that occurs, usually below a hundred.

    explained_variance_without  1 - sum |x - xhat|^2 / sum |x - m|^2 over the tokens that are not massive, m their own
                                mean; equal to `explained_variance` if no token is massive
    tokens                      fraction of the counted tokens that are massive
    norm_share                  share of sum |x|^2 that they hold
    norm_ratio                  `norm_ratio`

    As in `ReconstructionMetrics`, a ratio whose denominator is 0 is 0.0.
    """

    def __init__(self, norm_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm_ratio = norm_ratio
        self._shift: Tensor | None = None  # [d], about which y is summed, so that squares do not cancel
        self._steps: dict[int, Tensor] = {}  # by step of the norm: tokens, |x|^2, |y|^2, |r|^2 and y, [4 + d] float64

    def update(self, x: Tensor, xhat: Tensor, segments: Tensor) -> None:
        """Count one batch.

        x, xhat:  [B, T, d] activations and their reconstruction, any float dtype
        segments: [B, T] integers, negative = excluded
        """
        counted = segments >= 0  # [B, T]
        x, xhat = x[counted].to(torch.float64), xhat[counted].to(torch.float64)  # [n, d]
        if not len(x):
            return
        if self._shift is None:
            self._shift = x.mean(dim=0)
        square, y = x.square().sum(dim=-1), x - self._shift  # [n], [n, d]
        steps = torch.where(square > 0, (square.log2() * (STEPS / 2)).floor(), _ZERO)  # [n]
        finite = steps.isfinite()
        found, place = steps[finite].to(torch.int64).unique(return_inverse=True)
        residual = (x - xhat).square().sum(dim=-1)
        columns = [torch.ones_like(square), square, y.square().sum(dim=-1), residual]
        values = torch.cat([torch.stack(columns, dim=1), y], dim=1)[finite]  # [n, 4 + d]
        sums = values.new_zeros(len(found), values.shape[1]).index_add_(0, place, values)
        for step, total in zip(found.tolist(), sums, strict=True):
            self._steps[step] = self._steps[step] + total if step in self._steps else total

    def merge(self, other: Accumulator) -> None:
        """Add the sums of `other`, over other tokens and with the same `norm_ratio`."""
        super().merge(other)
        assert isinstance(other, MassiveActivations)
        if other._shift is None:
            return
        if self._shift is None:
            self._shift = other._shift
        delta = other._shift - self._shift  # [d]
        for step, total in other._steps.items():
            n, y = total[0], total[4:]
            moved = total.clone()
            moved[2] += 2 * (delta @ y) + n * delta.square().sum()
            moved[4:] += n * delta
            self._steps[step] = self._steps[step] + moved if step in self._steps else moved

    def compute(self) -> dict[str, float]:
        """The metrics of the class docstring."""
        steps = sorted(self._steps)
        sums = torch.stack([self._steps[step] for step in steps]).cpu() if steps else torch.zeros(1, 4)
        kept = self._kept(steps, sums[:, 0])
        n, _, square, residual = sums[kept, :4].sum(dim=0)
        variance = square - sums[kept, 4:].sum(dim=0).square().sum() / n.clamp(min=1)
        return {
            "explained_variance_without": 1 - ratio(residual, variance) if variance > 0 else 0.0,
            "tokens": ratio(sums[~kept, 0].sum(), sums[:, 0].sum()),
            "norm_share": ratio(sums[~kept, 1].sum(), sums[:, 1].sum()),
            "norm_ratio": self.norm_ratio,
        }

    def _kept(self, steps: list[int], tokens: Tensor) -> Tensor:
        """[steps] bool, whether tokens in a step are not massive."""
        if not steps:
            return torch.ones(1, dtype=torch.bool)
        middle = int((tokens.cumsum(0) * 2 >= tokens.sum()).to(torch.int64).argmax())  # the step of the median
        last = steps[middle] + math.ceil(STEPS * math.log2(self.norm_ratio))
        return torch.tensor(steps) <= last
