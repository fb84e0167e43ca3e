"""Centring and scaling of the input, estimated once on the first activations and folded into the saved weights.

Residual streams have a constant component thousands of times larger than their variation; without centring, an
autoencoder spends its capacity on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsae.errors import UserError


@dataclass
class InputNormalizer:
    """``(x - mean) / scale``, with an expected squared norm of d_in per position.

    mean: (d_in), float32; scale: positive
    """

    mean: Tensor
    scale: float

    @classmethod
    def estimate(cls, x: Tensor, segments: Tensor | None = None) -> InputNormalizer:
        """Estimate from activations (N, T, d_in), without positions of negative segment id.

        Raises:
            UserError: every position is excluded, or the activations are constant or not finite.
        """
        width = x.shape[-1]
        n, total = 0, torch.zeros(width, dtype=torch.float64, device=x.device)
        square = torch.zeros((), dtype=torch.float64, device=x.device)
        shift: Tensor | None = None
        for row in range(x.shape[0]):  # row by row, so that the float64 copy is small
            tokens = x[row].double() if segments is None else x[row][segments[row] >= 0].double()
            if tokens.shape[0] == 0:
                continue
            if shift is None:
                shift = tokens.mean(0)
            tokens = tokens - shift
            n += tokens.shape[0]
            total += tokens.sum(0)
            square += tokens.square().sum()
        if shift is None:
            raise UserError("The input's mean and scale need at least one content token; use more text.")
        variance = (square / n - (total / n).square().sum()) / width
        if not torch.isfinite(variance) or variance <= 0:
            raise UserError(
                f"The activations have a variance of {variance.item()} per dimension; they must vary and be finite: "
                "check the layer and the model."
            )
        return cls((shift + total / n).float(), float(variance.sqrt()))

    @classmethod
    def identity(cls, d_in: int) -> InputNormalizer:
        """A normalizer that changes nothing."""
        return cls(torch.zeros(d_in), 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize raw activations (..., d_in); float32."""
        return (x.float() - self.mean) / self.scale
