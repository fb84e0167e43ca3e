"""The losses of TSAE and TC-SAE against brute force."""

import kernels_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_oracle import temporal_loss, temporal_stats, window_consistency
from torch.utils._python_dispatch import TorchDispatchMode

from tsae_kernels import MULTISCALE, count_positions, temporal_loss_from_stats, within_sequence_variance
from tsae_kernels.losses import window_weights

WEIGHTS = (0.01, 0.005, 0.001)
BANDS = ((1, 2), (3, 6), (8, 30))


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("own_variance", [False, True])
def test_temporal_loss(backend, segmented, own_variance):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 25, 4, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 0.05, 2.0, 0.0])
    segments = oracle.random_segments(3, 25, generator, longest=12) if segmented else None
    if segmented:
        segments[2] = -1  # a row of padding only
    variance = None if own_variance else torch.tensor([0.3, 0.02, 0.0, 0.01], dtype=torch.float64)
    bands = oracle.few(backend, BANDS)
    loss = temporal_loss(h, WEIGHTS, bands, variance, 0.01, segments, backend=backend)
    wanted = oracle.paper_loss(h, WEIGHTS, bands, variance, 0.01, segments)
    assert wanted > 0
    torch.testing.assert_close(loss, wanted)
    positions = 25 if segments is None else count_positions(segments)
    stats = temporal_stats(h, bands, segments, backend=backend)
    torch.testing.assert_close(temporal_loss_from_stats(stats, positions, WEIGHTS, variance), wanted)


def test_default_arguments_are_the_papers():
    h = torch.randn(2, 128, 5, dtype=torch.float64)
    torch.testing.assert_close(temporal_loss(h), oracle.paper_loss(h, WEIGHTS, MULTISCALE))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("segments", [None, torch.full((2, 9), -1)])
def test_nothing_passes_the_threshold(backend, segments):
    h = (1e-3 * torch.randn(2, 9, 3)).requires_grad_()
    loss = temporal_loss(h, segments=segments, backend=backend)
    (grad,) = torch.autograd.grad(loss, h)
    assert loss == 0
    assert (grad == 0).all()
    empty = torch.randn(0, 9, 3, requires_grad=True)
    assert temporal_loss(empty, backend=backend) == 0


def test_no_gradient_flows_through_the_weights():
    h = torch.randn(2, 30, 3, dtype=torch.float64, requires_grad=True)
    variance = h.detach().var(1, correction=0).mean(0)
    own, given_variance = (
        torch.autograd.grad(temporal_loss(h, variance=v), h)[0] for v in (None, variance.requires_grad_())
    )
    torch.testing.assert_close(own, given_variance)
    assert not temporal_loss(h.detach(), variance=variance).requires_grad


def test_own_variance_survives_a_large_mean():
    h = 0.5 * torch.randn(4, 128, 3) + 1e3
    loss = temporal_loss(h)
    torch.testing.assert_close(loss.double(), oracle.paper_loss(h, WEIGHTS, MULTISCALE), rtol=1e-4, atol=0)


def test_variance_from_statistics():
    h = torch.randn(3, 50, 4) + 2
    segments = oracle.random_segments(3, 50)
    segments[1] = -1
    stats = temporal_stats(h, segments=segments)
    rows = [h[b, segments[b] >= 0].var(0, correction=0) for b in (0, 2) if (segments[b] >= 0).any()]
    wanted = torch.stack(rows).mean(0)
    torch.testing.assert_close(within_sequence_variance(stats, count_positions(segments)), wanted)
    torch.testing.assert_close(within_sequence_variance(temporal_stats(h), 50), h.var(1, correction=0).mean(0))
    assert (within_sequence_variance(temporal_stats(torch.full((2, 50, 3), 7.3)), 50) >= 0).all()


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
@settings(deadline=None, max_examples=40)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 25),
    window=st.integers(2, 12),
    segmented=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_window_loss(backend, B, T, window, segmented, seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(B, T, 3, dtype=torch.float64, generator=generator)
    segments = oracle.random_segments(B, T, generator, longest=10) if segmented else None
    loss = window_consistency(h, window, segments, backend=backend)
    torch.testing.assert_close(loss, oracle.window_loss(h, window, segments))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_window_loss_without_room_is_zero(backend):
    h = torch.randn(2, 4, 3, requires_grad=True)
    for loss in (
        window_consistency(h, 5, backend=backend),
        window_consistency(h, 3, torch.tensor([[0, 0, 1, 1]] * 2), backend=backend),
        window_consistency(h, 2, torch.full((2, 4), -1), backend=backend),
    ):
        assert loss == 0
        assert (torch.autograd.grad(loss, h)[0] == 0).all()
    assert window_consistency(torch.randn(0, 4, 3), backend=backend) == 0


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_window_loss_in_low_precision_and_with_garbage_in_padding(backend):
    segments = torch.tensor([[0, 0, 0, 0, 0, -1, -1, 1, 1, 1]])
    h = (torch.randn(1, 10, 3) + 100).to(torch.bfloat16)
    h[:, 5:7] = float("nan")
    h.requires_grad_()
    loss = window_consistency(h, 3, segments, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), oracle.window_loss(h, 3, segments), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(loss, h)
    assert grad.dtype == torch.bfloat16
    assert grad.isfinite().all()


class _Recorder(TorchDispatchMode):
    """The operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("segmented", [False, True])
def test_a_loss_needs_nothing_from_the_host(segmented):
    """On a GPU these operators would wait for the device, and CUDA graphs could not capture them."""
    h = torch.randn(2, 20, 3, requires_grad=True)
    segments = oracle.random_segments(2, 20) if segmented else None
    positions = 20 if segments is None else count_positions(segments)
    with _Recorder() as recorder:
        stats = temporal_stats(h, BANDS, segments, backend="reference")
        recorder.names.clear()
        loss = temporal_loss_from_stats(stats, positions, WEIGHTS)
        loss = loss + temporal_loss_from_stats(stats, positions, WEIGHTS, torch.ones(3))
        torch.autograd.grad(loss, stats.differences)
        window_weights(h, 3, segments)
    assert "aten::sum.dim_IntList" in recorder.names
    assert not recorder.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::lift_fresh"}
