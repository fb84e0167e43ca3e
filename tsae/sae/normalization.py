"""Centring and scaling of the input, estimated once on the first activations and folded into the saved weights.

Residual streams have a constant direction thousands of times larger than what varies; without centring an
autoencoder spends itself on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsae.errors import UserError


@dataclass
class InputNormalizer:
    """``(x - mean) / scale``, so that a position's expected squared norm is d_in.

    mean: (d_in), float32
    scale: positive
    """

    mean: Tensor
    scale: float

    @classmethod
    def estimate(cls, x: Tensor, segments: Tensor | None = None) -> InputNormalizer:
        """From activations (N, T, d_in), leaving out positions of negative segment id.

        Raises:
            UserError: no position counts, or the activations do not vary or are not finite.
        """
        width = x.shape[-1]
        n, total = 0, torch.zeros(width, dtype=torch.float64, device=x.device)
        square = torch.zeros((), dtype=torch.float64, device=x.device)
        shift: Tensor | None = None
        for row in range(x.shape[0]):  # row by row: no float64 copy of everything
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
            raise UserError("There is no content token to estimate the input's mean and scale from; use more text.")
        variance = (square / n - (total / n).square().sum()) / width
        if not torch.isfinite(variance) or variance <= 0:
            raise UserError(
                f"The activations have a variance of {variance.item()} per dimension; they must vary and be finite: "
                "check the layer and the model."
            )
        return cls((shift + total / n).float(), float(variance.sqrt()))

    @classmethod
    def identity(cls, d_in: int) -> InputNormalizer:
        """The one that leaves activations as they are."""
        return cls(torch.zeros(d_in), 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        """Raw activations (..., d_in) to normalized ones, float32."""
        return (x.float() - self.mean) / self.scale
