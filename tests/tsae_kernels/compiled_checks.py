"""Shared by the tests of the compiled backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsae_kernels import MULTISCALE, activate_with_stats

EIGHT_BANDS = ((1, 1), (2, 3), (5, 9), (10, 20), (30, 33), (34, 60), (61, 64), (100, 2000))


def everything(
    pre: Tensor,
    bias: Tensor | None = None,
    segments: Tensor | None = None,
    bands: Any = MULTISCALE,
    shared: bool = True,
    **options: Any,
) -> list[Tensor]:
    """Every output and gradient of one call, with gradients of every kind coming in."""
    generator = torch.Generator().manual_seed(9)
    pre = pre.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    h, stats = activate_with_stats(pre, bias, segments=segments, bands=bands, **options)
    shape = stats.differences.shape
    weights = torch.rand(1 if shared else shape[0], *shape[1:], generator=generator, dtype=stats.square.dtype)
    incoming = [
        torch.randn(h.shape, generator=generator).to(h),
        weights.to(pre.device).expand(shape),
        torch.randn(stats.total.shape, generator=generator).to(stats.total),
        torch.randn(stats.square.shape, generator=generator).to(stats.square),
    ]
    inputs = [pre] if bias is None else [pre, bias]
    grads = torch.autograd.grad([h, *stats], inputs, incoming)
    return [h.detach(), *(s.detach() for s in stats), *grads]


def assert_as_reference(results: list[Tensor], reference: list[Tensor], rtol: float = 1e-5) -> None:
    for got, wanted in zip(results, reference, strict=True):
        assert got.dtype == wanted.dtype
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * scale)
