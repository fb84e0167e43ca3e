"""Products that skip zeros equal the dense ones, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tsae.config import SAEConfig
from tsae.sae.model import SparseAutoencoder
from tsae.sae.sparse_linear import decode_sparse, encode_linear, use_sparse_products

pytestmark = pytest.mark.skipif(
    not use_sparse_products(torch.zeros(1)), reason="sparse products need the compiled library"
)


def features(active: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    h = torch.zeros(4, 9, 100)
    indices = torch.rand(4, 9, 100, generator=generator).topk(active, -1).indices
    return h.scatter(-1, indices, torch.rand(4, 9, active, generator=generator) + 0.1)


@pytest.mark.parametrize("active", [0, 3, 60])  # none, sparse, dense enough for the dense product
def test_decode_and_encode_equal_dense(active: int) -> None:
    generator = torch.Generator().manual_seed(1)
    h = features(active).requires_grad_()
    W_dec = torch.randn(100, 7, generator=generator, requires_grad=True)
    W_enc = torch.randn(7, 100, generator=generator, requires_grad=True)
    x = torch.randn(4, 9, 7, generator=generator, requires_grad=True)
    upstream = torch.randn(4, 9, 7, generator=generator)
    results = []
    for decode, encode in ((decode_sparse, encode_linear), (torch.matmul, torch.matmul)):
        xhat = decode(h, W_dec)
        grad_h, grad_dec = torch.autograd.grad(xhat, (h, W_dec), upstream)
        grad_h = grad_h * (h > 0)  # as a thresholded ReLU does
        pre = encode(x, W_enc)
        grad_x, grad_enc = torch.autograd.grad(pre, (x, W_enc), grad_h)
        results.append((xhat, grad_h, grad_dec, pre, grad_x, grad_enc))
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("active", [3, 60])
def test_under_autocast_gradients_are_at_least_as_good_as_dense_ones(active: int) -> None:
    generator = torch.Generator().manual_seed(1)
    h = features(active)
    W_dec, W_enc = torch.randn(100, 7, generator=generator), torch.randn(7, 100, generator=generator)
    x, upstream = torch.randn(2, 4, 9, 7, generator=generator)
    results = []
    for decode, encode, autocast in (
        (decode_sparse, encode_linear, True),
        (torch.matmul, torch.matmul, True),
        (torch.matmul, torch.matmul, False),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, W_enc, W_dec)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            pre = encode(leaves[0], leaves[1])
            kept = pre * (h > 0)
            xhat = decode(kept, leaves[2])
        assert pre.dtype == (torch.bfloat16 if autocast else torch.float32)
        gradients = torch.autograd.grad((xhat.float() * upstream).sum(), leaves)
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        results.append([pre.float(), xhat.float(), *gradients])
    for ours, theirs, exact in zip(*results, strict=True):
        bound = 2 * (theirs - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (ours - exact).abs().max() <= bound


def test_the_encoders_gradient_needs_no_copy() -> None:
    """It has the memory layout of the parameter, so autograd keeps it without a copy."""
    sae = SparseAutoencoder(SAEConfig(d_in=7, d_sae=100, activation="topk", k=3))
    sae(torch.randn(2, 5, 7)).square().sum().backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.stride() == sae.W_enc.grad.stride() == (1, 7)
