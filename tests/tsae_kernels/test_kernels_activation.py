"""The activations, including the Schmitt trigger and its reset at segment starts, against an entry-by-entry loop."""

import kernels_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_oracle import activate_with_stats, encode_with_stats, temporal_stats

CASES = {
    "relu": ("relu", None, None),
    "gelu": ("gelu", None, None),
    "identity": ("identity", None, None),
    "number": ("relu", 0.4, None),
    "negative": ("relu", -0.4, None),
    "scalar": ("relu", torch.tensor(0.4), None),
    "per feature": ("relu", torch.tensor([0.1, 0.5, 0.9]), None),
    "per position": ("relu", torch.linspace(-1, 1, 26).reshape(2, 13, 1), None),
    "schmitt": ("relu", 0.7, 0.2),
    "schmitt to zero": ("relu", 0.7, 0.0),
    "schmitt per feature": ("relu", torch.tensor([0.4, 0.5, 0.9]), torch.tensor([0.1, 0.5, 0.0])),
    "schmitt per position": ("relu", torch.linspace(0.3, 1, 26).reshape(2, 13, 1), torch.tensor(0.3)),
}


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("segmented", [False, True])
def test_activations(backend, case, segmented):
    oracle.too_slow(backend, not segmented)
    generator = torch.Generator().manual_seed(1)
    name, threshold, release = CASES[case]
    pre, bias = torch.randn(2, 13, 3, generator=generator), torch.randn(3, generator=generator)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, -1, -1, 1, 1, 1, 0, 0], [-1] + [3] * 12])
    segments = segments if segmented else None
    bands = oracle.few(backend, ((1, 4),))
    h, stats = activate_with_stats(pre, bias, name, threshold, release, bands, segments, backend=backend)
    wanted = oracle.activation(pre, bias, name, threshold, release, segments)
    torch.testing.assert_close(h, wanted, rtol=1e-6, atol=1e-6)
    for got, again in zip(stats, temporal_stats(h, bands, segments, backend=backend), strict=True):
        assert torch.equal(got, again)


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
@settings(deadline=None, max_examples=30)
@given(
    T=st.integers(1, 40),
    threshold=st.floats(0, 1.5),
    ratio=st.floats(0, 1),
    segmented=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_schmitt_trigger(backend, T, threshold, ratio, segmented, seed):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(2, T, 2, dtype=torch.float64, generator=generator)
    segments = oracle.random_segments(2, T, generator, longest=8) if segmented else None
    release = threshold * ratio
    h, _ = activate_with_stats(pre, None, "relu", threshold, release, segments=segments, backend=backend)
    assert torch.equal(h, oracle.activation(pre, None, "relu", threshold, release, segments))


def test_the_trigger_is_reset_at_segment_starts_and_excluded_positions():
    pre = torch.tensor([0.5, 1.5, 0.5, 0.5, 0.1, 0.5, 1.5, 0.5, 0.5, 0.5]).reshape(1, 10, 1)
    segments = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, -1, 1]])
    for backend in oracle.HERE:
        h, _ = activate_with_stats(pre, threshold=1.0, release=0.3, segments=segments, backend=backend)
        assert h.flatten().tolist() == [0, 1.5, 0.5, 0.5, 0, 0, 1.5, 0, 0, 0]


@pytest.mark.parametrize("backend", oracle.FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_backends_keep_the_same_entries(backend, dtype):
    oracle.too_slow(backend, dtype == torch.float64)
    k = 33 if dtype == torch.float64 else 40
    pre, bias = torch.randn(3, 60, k).to(dtype)[:, : 17 if backend == "triton" else 60], torch.randn(k)
    thresholds = torch.rand(k)
    got, reference = (
        activate_with_stats(pre, bias, "relu", thresholds, thresholds / 3, backend=backend)[0]
        for backend in (backend, "reference")
    )
    assert got.dtype == dtype
    assert torch.equal(got, reference)


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_nan_is_not_hidden(backend, threshold):
    pre = torch.zeros(1, 4, 2)
    pre[0, 2, 1] = float("nan")
    pre[0, 1, 0] = float("-inf")
    h, stats = activate_with_stats(pre, threshold=threshold, backend=backend)
    assert h.isnan().sum() == 1
    assert h[0, 1, 0] == 0
    assert stats.total.isnan().tolist() == [[False, True]]


def test_gradient_flows_through_kept_entries_only():
    pre = torch.randn(2, 20, 3, requires_grad=True)
    threshold = torch.full((3,), 0.5, requires_grad=True)
    for backend in oracle.HERE:
        h, _ = activate_with_stats(pre, None, "relu", threshold, 0.1, backend=backend)
        (grad,) = torch.autograd.grad(h.sum(), pre)
        assert torch.equal(grad, (h > 0).float())
        h, _ = activate_with_stats(pre, None, "relu", threshold, 0.1, backend=backend)
        assert torch.autograd.grad(h.sum(), threshold, allow_unused=True) == (None,)


def test_encoder_is_a_product_and_an_activation():
    x, weight = torch.randn(2, 9, 4, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    h, stats = encode_with_stats(x, weight, bias, "relu", 0.2, 0.1)
    wanted, wanted_stats = activate_with_stats(x @ weight, bias, "relu", 0.2, 0.1)
    assert torch.equal(h, wanted)
    grads = torch.autograd.grad(h.square().sum() + stats.differences.sum(), [x, weight, bias])
    again = torch.autograd.grad(wanted.square().sum() + wanted_stats.differences.sum(), [x, weight, bias])
    for got, expected in zip(grads, again, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_encoder_under_autocast(backend):
    x, weight = torch.randn(2, 9, 4), torch.randn(4, 6, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    with torch.autocast(oracle.DEVICE.get(backend, "cpu"), torch.bfloat16):
        h, stats = encode_with_stats(x, weight, bias, backend=backend)
        loss = h.float().sum() + stats.differences.sum()
        loss.backward()  # inside autocast on purpose: window sums must stay in float32
    assert h.dtype == torch.bfloat16
    assert stats.differences.dtype == torch.float32
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    pre = (x.bfloat16() @ weight.detach().bfloat16()).requires_grad_()
    again, again_stats = activate_with_stats(pre, bias.detach(), backend=backend)
    (grad,) = torch.autograd.grad(again.float().sum() + again_stats.differences.sum(), pre)
    torch.testing.assert_close(bias.grad, grad.float().sum((0, 1)), rtol=2e-2, atol=2e-1)
