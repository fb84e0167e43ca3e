"""Gradients of every output against finite differences; variance masking; no double backward."""

import kernels_oracle as oracle
import pytest
import torch
from kernels_oracle import activate_with_stats, temporal_loss, temporal_stats, window_consistency

from tsae_kernels import MULTISCALE, temporal_loss_from_stats

ACTIVATIONS = {
    "relu": ("relu", None, None),
    "gelu": ("gelu", None, None),
    "identity": ("identity", None, None),
    "threshold": ("relu", 0.4, None),
    "per position": ("relu", "per position", None),
    "schmitt": ("relu", 0.6, 0.2),
}


def outputs(pre, bias, name, threshold, release, bands, segments, backend):
    if threshold == "per position":
        threshold = torch.linspace(0.1, 0.6, pre.shape[0] * pre.shape[1]).reshape(*pre.shape[:2], 1)
    h, stats = activate_with_stats(pre, bias, name, threshold, release, bands, segments, backend=backend)
    return h, *stats


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("segmented", [False, True])
def test_gradcheck_of_every_output(backend, activation, segmented):
    generator = torch.Generator().manual_seed(3)
    pre = torch.randn(2, 8, 2, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(2, dtype=torch.float64, generator=generator).requires_grad_()
    segments = torch.tensor([[0, 0, 0, -1, 0, 0, 1, 1], [2, 2, 2, 2, 2, 2, 2, -1]]) if segmented else None
    every = (oracle.few(backend, ((1, 2), (3, 20))), oracle.few(backend, ((2, 3), (5, 6)), gaps=True), ())
    if backend == "triton":  # the other sets of bands once each
        oracle.compiles_too_much(backend, activation == "per position")  # the backward pass has no threshold
        every = every[:2] if activation == "relu" else every[:1]
    for bands in every:
        torch.autograd.gradcheck(
            lambda p, b, bands=bands: outputs(p, b, *ACTIVATIONS[activation], bands, segments, backend),
            (pre, bias),
        )


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
@pytest.mark.parametrize("T", [1, 2, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("k", [1, 3, 33])
@pytest.mark.parametrize("segmented", [False, True])
def test_gradcheck_at_many_lengths(backend, T, k, segmented):
    generator = torch.Generator().manual_seed(T + k)
    pre = torch.randn(2, T, k, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(k, dtype=torch.float64, generator=generator).requires_grad_()
    segments = oracle.random_segments(2, T, generator) if segmented else None
    torch.autograd.gradcheck(
        lambda p, b: outputs(p, b, "relu", 0.6, 0.2, MULTISCALE, segments, backend),
        (pre, bias),
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
def test_gradcheck_of_the_losses(backend, segmented):
    h = torch.randn(2, 9, 3, dtype=torch.float64).requires_grad_()
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, -1, 2, 2], [0] * 9]) if segmented else None
    variance = torch.tensor([0.5, 0.001, 2.0])
    torch.autograd.gradcheck(lambda h: temporal_loss(h, variance=variance, segments=segments, backend=backend), (h,))
    for window in (2, 3, 5):
        torch.autograd.gradcheck(lambda h, w=window: window_consistency(h, w, segments, backend=backend), (h,))


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
def test_a_loss_on_one_output_alone(backend):
    h = torch.randn(2, 6, 3, dtype=torch.float64).requires_grad_()
    bands = oracle.few(backend, ((1, 3),))
    for index in range(3):
        torch.autograd.gradcheck(lambda h, i=index: temporal_stats(h, bands, backend=backend)[i], (h,))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_a_masked_feature_gets_exactly_the_activation_gradient(backend):
    """Even if its statistics overflow, because its window arithmetic is skipped, not multiplied by zero."""
    for masked in ([1], [0, 1, 2, 3], []):
        pre = torch.randn(3, 30, 4)
        pre[0, 3, masked] = float("inf")
        pre.requires_grad_()
        upstream = torch.randn(3, 30, 4)
        h, stats = activate_with_stats(pre, torch.zeros(4), backend=backend)
        variance = torch.ones(4)
        variance[masked] = 0.0099
        loss = temporal_loss_from_stats(stats, 30, variance=variance)
        (grad,) = torch.autograd.grad([h, loss], pre, [upstream, torch.ones(())])
        plain = upstream * (pre > 0)
        others = [j for j in range(4) if j not in masked]
        assert torch.equal(grad[..., masked], plain[..., masked])
        assert loss.isfinite()
        assert not others or not torch.equal(grad[..., others], plain[..., others])


@pytest.mark.parametrize("backend", oracle.FAST_BACKENDS)
def test_one_gradient_for_the_batch_and_one_per_row_agree(backend):
    h = torch.randn(4, 20, 3, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0] * 8 + [1] * 12] * 4)
    bands = oracle.few(backend, ((1, 2), (3, 9)))
    for ids in (None, segments):
        stats = temporal_stats(h, bands, ids, backend=backend)
        weights = torch.rand(1, len(bands), 3, dtype=torch.float64).expand(4, -1, -1)
        (shared,) = torch.autograd.grad(stats.differences, h, weights, retain_graph=True)
        (apart,) = torch.autograd.grad(stats.differences, h, weights.contiguous())
        torch.testing.assert_close(shared, apart)


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_double_backward_raises(backend):
    h = torch.randn(2, 6, 3, requires_grad=True)
    functions = (
        lambda: temporal_stats(h, backend=backend).differences.sum(),
        lambda: activate_with_stats(h, backend=backend)[0].square().sum(),
        lambda: activate_with_stats(h, activation="gelu", backend=backend)[0].sum(),
        lambda: window_consistency(h, backend=backend),
    )
    for function in functions:
        (grad,) = torch.autograd.grad(function(), h, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.square().sum().backward()
