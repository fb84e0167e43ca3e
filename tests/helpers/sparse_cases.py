"""Cases for the operators on lists of active features, and where they run."""

import kernels_oracle as oracle
import pytest
import torch

from tsae_kernels.backends import sparse_eager as eager
from tsae_kernels.backends.sparse_eager import pack_active

BACKENDS = oracle.parameters(("eager", "triton"))
needs_triton = pytest.mark.skipif(oracle._STATES["triton"] != "ok", reason=oracle._STATES["triton"])
DEVICE = oracle.DEVICE["triton"]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
BANDS = ((1, 2), (4, 9))


def close(got, wanted, rtol):
    assert got.dtype == wanted.dtype
    scale = wanted.double().abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * scale)


def features(B, T, k, density=0.3, dtype=torch.float32, seed=0):
    """pre [B, T, k], in which feature 0 is on everywhere and feature 1 nowhere."""
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(B, T, k, generator=generator, dtype=torch.float64)
    pre = torch.where(torch.rand(B, T, k, generator=generator) < density, pre.abs() + 0.1, -pre.abs())
    pre[..., 0] = 1 + 0.01 * pre[..., 0].abs()
    if k > 1:
        pre[..., 1] = -1
    return pre.to(dtype).to(DEVICE)


def lists(B=1, T=20, k=9, C=8, **options):
    pre = features(B, T, k, **options)
    return eager.compress(pack_active(pre.relu()), pre, None, C)


def random(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)
