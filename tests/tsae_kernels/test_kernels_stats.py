"""Temporal statistics against brute force; test_kernels_properties.py has random shapes, bands and segments."""

import kernels_oracle as oracle
import pytest
import torch
from kernels_oracle import activate_with_stats, temporal_stats

from tsae_kernels import MULTISCALE


def assert_stats(stats, h, bands, segments=None, rtol=1e-10):
    for got, wanted in zip(stats, oracle.stats(h, bands, segments), strict=True):
        scale = max(wanted.abs().max().item() if wanted.numel() else 0.0, 1e-30)
        torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
@pytest.mark.parametrize("T", [1, 2, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("k", [1, 3, 33])
def test_lengths_in_float32(backend, T, k):
    generator = torch.Generator().manual_seed(T * k)
    h = torch.randn(2, T, k, generator=generator)
    for segments in (None, oracle.random_segments(2, T, generator)):
        assert_stats(temporal_stats(h, MULTISCALE, segments, backend=backend), h, MULTISCALE, segments, rtol=1e-5)


@pytest.mark.parametrize("backend", oracle.SAMPLED_BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("T", [5, 128, 300])
def test_a_mean_a_thousand_times_the_deviation(backend, T, segmented):
    generator = torch.Generator().manual_seed(T)
    h = torch.randn(3, T, 4, generator=generator) + 1e3
    segments = oracle.random_segments(3, T, generator) if segmented else None
    if segmented:  # segments with means far apart: centring by the row's mean would not be enough
        h = h * torch.where(segments % 2 == 0, 1.0, -1.0)[..., None]
    stats = temporal_stats(h, segments=segments, backend=backend)
    reference = temporal_stats(h, segments=segments, backend="reference")
    for got, wanted, atol in zip(stats, reference, (0, 1e-7 * T * 1e3, 0), strict=True):  # a sum of both signs
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("backend", oracle.FAST_BACKENDS)
@pytest.mark.parametrize("kind", ["walk", "sparse", "ramp", "spike", "constant"])
def test_float32_accuracy_of_smooth_and_sparse_features(backend, kind):
    oracle.too_slow(backend, kind == "constant")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 128, 20, generator=generator)
    time = torch.arange(128.0)[:, None]
    h = {
        "walk": noise.cumsum(1),
        "sparse": noise * (torch.rand(2, 128, 20, generator=generator) < 0.03),
        "ramp": (0.37 * time).expand(2, 128, 20),
        "spike": 0.01 * noise + 1e3 * (time == 64),
        "constant": torch.full((2, 128, 20), 3.3),
    }[kind]
    got, reference = (temporal_stats(h, backend=name).differences for name in (backend, "reference"))
    # A running sum over a ramp grows with T, and its rounding with it: docs/mathematics.md, section 4.
    torch.testing.assert_close(got, reference, rtol=5e-5 if kind == "ramp" else 1e-5, atol=1e-9)
    assert (got >= 0).all()


def test_an_id_that_comes_back_is_another_segment():
    h = torch.randn(1, 6, 2, dtype=torch.float64)
    segments = torch.tensor([[0, 0, 1, 0, -1, 0]])
    expected = (h[0, 1] - h[0, 0]) ** 2
    for backend in oracle.HERE:
        stats = temporal_stats(h, ((1, 9),), segments, backend=backend)
        torch.testing.assert_close(stats.differences[0, 0], expected)
        torch.testing.assert_close(stats.total[0], h[0, [0, 1, 2, 3, 5]].sum(0))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_padding_may_hold_anything(backend):
    h = torch.randn(2, 9, 3)
    segments = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, 1], [0, 0, 0, 0, 0, 0, -1, -1, -1]])
    clean = temporal_stats(h, segments=segments, backend=backend)
    h[segments < 0] = torch.tensor([float("inf"), float("nan"), 1e30])
    h.requires_grad_()
    stats = temporal_stats(h, segments=segments, backend=backend)
    for got, wanted in zip(stats, clean, strict=True):
        assert torch.equal(got, wanted)
    (grad,) = torch.autograd.grad(sum(s.sum() for s in stats), h)
    assert grad.isfinite().all()
    assert (grad[segments < 0] == 0).all()


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_all_positions_excluded(backend):
    segments = torch.full((2, 5), -1)
    h = torch.randn(2, 5, 3, requires_grad=True)
    stats = temporal_stats(h, segments=segments, backend=backend)
    assert all((s == 0).all() for s in stats)
    (grad,) = torch.autograd.grad(stats.differences.sum() + stats.square.sum(), h)
    assert (grad == 0).all()


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("with_segments", [False, True])
def test_empty_batch(backend, with_segments):
    pre = torch.randn(0, 7, 3, requires_grad=True)
    segments = torch.zeros(0, 7, dtype=torch.int64) if with_segments else None
    h, stats = activate_with_stats(pre, torch.zeros(3), segments=segments, backend=backend)
    assert h.shape == (0, 7, 3)
    assert [tuple(s.shape) for s in stats] == [(0, 3, 3), (0, 3), (0, 3)]
    torch.autograd.grad(h.sum() + stats.differences.sum(), pre)


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_strides_do_not_matter(backend):
    base = torch.randn(3, 5, 20, dtype=torch.float64)
    bands = oracle.few(backend, ((1, 2),))
    for h in (base.transpose(1, 2), base[:, :, ::2].transpose(0, 1), base[:1].expand(4, 5, 20)):
        leaf = h.detach().requires_grad_()
        out, stats = activate_with_stats(leaf, activation="identity", bands=bands, backend=backend)
        assert torch.equal(out, h)
        assert_stats(stats, h, bands)
        (grad,) = torch.autograd.grad(stats.differences.sum(), leaf)
        copy = h.contiguous().requires_grad_()
        again = temporal_stats(copy, bands, backend=backend)
        torch.testing.assert_close(grad, torch.autograd.grad(again.differences.sum(), copy)[0])


def test_rows_walked_in_several_chunks_agree_with_one():
    h = torch.randn(7, 12, 2**15, requires_grad=True)  # two rows to a chunk
    segments = torch.tensor([[0] * 5 + [-1] + [1] * 6] * 6 + [[2] * 12])
    stats = temporal_stats(h, ((1, 3),), segments, backend="eager")
    part = temporal_stats(h[3:5], ((1, 3),), segments[3:5], backend="eager")
    for whole, two in zip(stats, part, strict=True):
        torch.testing.assert_close(whole[3:5], two)
    weights = torch.rand(7, 1, 2**15)
    (grad,) = torch.autograd.grad((stats.differences * weights).sum(), h)
    (of_part,) = torch.autograd.grad((part.differences * weights[3:5]).sum(), h)
    torch.testing.assert_close(grad[3:5], of_part[3:5])


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(backend, dtype):
    largest = 6e4 if dtype == torch.float16 else 1e15
    h = ((torch.rand(2, 50, 3) - 0.5) * 2 * largest).to(dtype).requires_grad_()
    stats = temporal_stats(h, backend=backend)
    assert {s.dtype for s in stats} == {torch.float32}
    assert_stats(stats, h, MULTISCALE, rtol=1e-5)
    (grad,) = torch.autograd.grad((stats.differences / stats.square[:, None]).sum(), h)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bands", [MULTISCALE, ((1, 2), (5, 200))])
def test_values_up_to_the_end_of_the_range_make_no_nan(backend, segmented, dtype, bands):
    oracle.too_slow(backend, segmented or bands != MULTISCALE)
    oracle.compiles_too_much(backend, bands != MULTISCALE)
    T = 40 if backend == "triton" and (oracle.INTERPRETED or dtype == torch.float16) else 128
    largest = torch.finfo(dtype).max
    h = ((torch.rand(2, T, 6, generator=torch.Generator().manual_seed(0)) - 0.5) * 2 * largest).to(dtype)
    h[..., 1] = largest
    h[..., 2] = torch.where(torch.arange(T) % 2 == 0, largest, -largest)
    h[..., 3] = torch.where(torch.arange(T) < T // 2, largest, -largest)
    h.requires_grad_()
    segments = (torch.arange(T) >= T // 3).long().expand(2, T) if segmented else None
    out, stats = activate_with_stats(h, activation="identity", bands=bands, segments=segments, backend=backend)
    wanted = temporal_stats(h, bands, segments, backend="reference")
    for got, right in zip(stats, wanted, strict=True):
        assert not got.isnan().any()
        assert torch.equal(got.isinf(), right.isinf())
    got, right = (total[:, [0, 1, 2, 4, 5]] for total in (stats.total, wanted.total))  # the halves of 3 cancel
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5 * largest)
    assert torch.equal(out, h)
    (grad,) = torch.autograd.grad(stats.differences, h, torch.full_like(stats.differences, 1e-6))
    assert not grad.isnan().any()
