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
    target_scale, d_in: for a transcoder, the scale of its target, which follows the d_in dimensions of the input, and
        d_in; mean is then (d_in + d_out). 0 and 0 for an autoencoder
    """

    mean: Tensor
    scale: float
    target_scale: float = 0.0
    d_in: int = 0

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
    def estimate_pair(cls, x: Tensor, segments: Tensor | None, d_in: int) -> InputNormalizer:
        """Estimate for a transcoder from its input and its target, (N, T, d_in + d_out); otherwise as `estimate`."""
        source, target = cls.estimate(x[..., :d_in], segments), cls.estimate(x[..., d_in:], segments)
        return cls(torch.cat([source.mean, target.mean]), source.scale, target.scale, d_in)

    @classmethod
    def identity(cls, d_in: int) -> InputNormalizer:
        """A normalizer that changes nothing."""
        return cls(torch.zeros(d_in), 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize raw activations (..., d_in); float32."""
        if self.target_scale:
            scale = torch.full_like(self.mean, self.scale)
            scale[self.d_in :] = self.target_scale
            return (x.float() - self.mean) / scale
        return (x.float() - self.mean) / self.scale
