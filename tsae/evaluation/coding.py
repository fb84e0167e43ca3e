"""The step in which `CodeLength` quantizes amplitudes, so that the code holds what the explained variance says."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.evaluation.metrics.bits import quantize

ROUNDING = 0.01
"""The most that rounding amplitudes may add to the mean squared error, as a share of it."""
TOKENS = 2048
"""Of the text on which rounding is measured: its first sequences, at least one."""


class Sample(NamedTuple):
    """Activations whose reconstruction from quantized features is measured."""

    x: Tensor
    """[N, T, d]"""
    y: Tensor
    """What is reconstructed: x, or of a transcoder its target [N, T, d_out]."""
    segments: Tensor
    """[N, T] integers, negative = excluded."""

    def first(self) -> Sample:
        """The first sequences, up to `TOKENS`, as tensors of their own."""
        rows = -(-TOKENS // max(self.segments.shape[1], 1))
        return Sample(*(each[:rows].clone() for each in self))

    def with_more(self, other: Sample) -> Sample:
        """This sample and the first sequences of `other`, up to `TOKENS`."""
        length = self.segments.shape[1]
        rows = -(-TOKENS // max(length, 1)) - len(self.x)
        if rows <= 0 or other.segments.shape[1] != length:
            return self
        return Sample(*(torch.cat([mine, more[:rows]]) for mine, more in zip(self, other, strict=True)))


@torch.no_grad()
def coding_step(sae: Any, sample: Sample, rms_error: float, norms: Tensor) -> float:
    """The step of the quantization: `rms_error`, or less where rounding to it adds more than `ROUNDING` to the error.

    Rounding L0 values in directions of their own adds L0 / (12 d) of the squared error. Features that share a direction
    add more: 50 features that are always on, each with a 50th of a value, lose most of it, and would cost nothing.

    sae:       a module with `encode(x, segments)` and `decode(h)`
    rms_error: root of the mean squared error per dimension over the complete text
    norms:     [d_sae] L2 norms of the decoder's rows
    out: in the units of the reconstruction; `rms_error` if it is not above 0 and finite
    """
    if not 0 < rms_error < math.inf:
        return rms_error
    counted = sample.segments >= 0
    h = sae.encode(sample.x, sample.segments)
    active = ((h > 0) & (norms > 0).to(h.device)).nonzero(as_tuple=True)
    value, norm = h[active], norms.to(h.device).double()[active[2]]

    def error(features: Tensor) -> float:
        return float((sample.y - sae.decode(features))[counted].double().square().sum())

    exact, allowed = error(h), ROUNDING * rms_error**2 * float(counted.sum()) * sample.y.shape[2]
    step = rms_error
    for _ in range(50):
        h[active] = (quantize(value, norm / step) * (step / norm)).to(h.dtype)
        added = error(h) - exact
        if not added > allowed:  # NaN too: the metrics say it
            break
        step *= min(max(math.sqrt(allowed / added), 0.1), 0.99)
    return step
