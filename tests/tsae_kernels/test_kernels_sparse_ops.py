"""The operators on lists of active features: Triton's against PyTorch's, and their registration."""

import itertools

import kernels_oracle as oracle
import pytest
import torch
from sparse_cases import BACKENDS, BANDS, DEVICE, RTOL, TYPES, close, features, lists, needs_triton, random
from torch.library import opcheck

from tsae_kernels.backends import sparse_eager as eager
from tsae_kernels.backends.sparse_eager import pack_active
from tsae_kernels.backends.triton import sparse_launch as triton
from tsae_kernels.segments import find_runs
from tsae_kernels.sparse_features import squared_errors
from tsae_kernels.sparse_ops import Entries

ops = torch.ops.tsae_kernels


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("B", "T", "k", "C"), [(2, 33, 70, 64), (1, 5, 1, 1), (3, 32, 33, 4)])
def test_compress(B, T, k, C, dtype, monkeypatch):
    monkeypatch.setattr(triton, "_WIDE", 50)  # of 70 features 32 ranges, most of them empty
    pre, bias = features(B, T, k, dtype=dtype), random(k).abs()
    pre[0, 0, 0] = torch.nan
    active = pack_active((pre > 0).to(dtype) + pre.isnan())
    got, wanted = (module.compress(active, pre, bias, C) for module in (triton, eager))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@needs_triton
def test_compress_takes_strides():
    pre = features(2, 9, 40)
    active = pack_active(pre.relu())
    strided = pre.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for a, b in zip(*(triton.compress(active, each, None, 30) for each in (pre, strided)), strict=True):
        assert torch.equal(a, b)


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("d", "ends"), [(33, (9,)), (3, (2, 2, 5, 9)), (130, (4, 9))])
def test_decode_and_its_gradient(d, ends, dtype, monkeypatch):
    values, indices, counts = lists(T=5, dtype=dtype)
    weight, grad = random(9, d, dtype=dtype), random(len(ends), 5, d, dtype=dtype, seed=2)
    monkeypatch.setattr(triton, "_block_d", lambda *args: 32)
    monkeypatch.setattr(triton, "_CACHED", 9 * 2 * 32 * dtype.itemsize)  # two blocks of columns a part
    for out in (dtype, torch.float32):
        got, wanted = (module.decode(values, indices, counts, weight, ends, out) for module in (triton, eager))
        close(got, wanted, RTOL[out if out == dtype else torch.float32])
        got, wanted = (module.decode_backward(grad, indices, counts, weight, ends, out) for module in (triton, eager))
        close(got, wanted, RTOL[out if out == dtype else torch.float32])


@needs_triton
def test_decode_mixes_dtypes():
    values, indices, counts = lists(T=4, dtype=torch.bfloat16)
    weight = random(9, 5)
    got, wanted = (m.decode(values, indices, counts, weight, (9,), torch.float32) for m in (triton, eager))
    close(got, wanted, 1e-5)


@needs_triton
def test_sort_entries():
    values, indices, _ = lists(B=2, T=30)
    for a, b in zip(*(m.sort_entries(indices, values, 9) for m in (triton, eager)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_entries_are_by_feature_and_then_by_token():
    values, indices, counts = lists(B=2, T=30)
    entries = Entries(*ops.sparse_sort_entries(indices, values, 9, "eager"))
    total = int(counts.clamp_max(8).sum())
    pairs = list(zip(entries.features[:total].tolist(), entries.tokens[:total].tolist(), strict=True))
    assert pairs == sorted(pairs)
    assert (entries.features[total:] == 9).all()
    assert torch.equal(indices.flatten()[entries.order], entries.features)
    assert torch.equal(values.flatten()[entries.order], entries.values)
    for j, (first, last) in enumerate(itertools.pairwise(entries.offsets.tolist())):
        assert entries.features[first:last].tolist() == [j] * (last - first)
    assert entries.offsets[-1] == total


def stats_arguments(B, T, k, dtype, segments):
    values, indices, _ = lists(B, T, k, C=k, dtype=dtype)
    order, by_feature, tokens, sorted_values, _ = eager.sort_entries(indices, values, k)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    differences = random(B, len(BANDS), k, dtype=compute)
    differences[:, :, 2] = 0  # a masked feature
    return (
        *(sorted_values, order, by_feature, tokens, k, random(B * T, k, dtype=dtype, seed=3), differences),
        *(random(B, k, dtype=compute, seed=4), random(B, k, dtype=compute, seed=5), BANDS, segments, T),
    )


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("segmented", [False, True])
def test_gradient_of_the_statistics(dtype, segmented):
    B, T, k = 2, 26, 5
    segments = torch.tensor([[0] * 5 + [-1] * 4 + [0] * 17, [1] * 25 + [0]], device=DEVICE) if segmented else None
    arguments = stats_arguments(B, T, k, dtype, segments)
    for used in ((0, 1, 2, 3), (1,), (0, 2), (3,)):
        grads = tuple(g if i in used else None for i, g in enumerate(arguments[5:9]))
        got, wanted = (m.stats_backward(*arguments[:5], *grads, *arguments[9:]) for m in (triton, eager))
        close(got, wanted, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_feature_keeps_its_gradient_whatever_its_values(backend):
    """A coefficient of 0 hides infinite features, and the other features do not see them."""
    module = triton if backend == "triton" else eager
    arguments = list(stats_arguments(1, 12, 4, torch.float32, None))
    masked = arguments[2] == 2
    arguments[0] = torch.where(masked, torch.inf, arguments[0])
    arguments[7:9] = None, None
    got = module.stats_backward(*arguments)
    assert torch.equal(got[masked], arguments[5].flatten()[arguments[1]][masked])
    assert got.isfinite().all()


def test_the_gradient_of_constant_features_is_exactly_zero():
    """In the form of pairs nothing cancels: an always-on feature of a large mean has differences of 0."""
    for module in (eager, triton) if oracle._STATES["triton"] == "ok" else (eager,):
        T = 16
        values, tokens = torch.full((T,), 1e4, device=DEVICE), torch.arange(T, dtype=torch.int32, device=DEVICE)
        ones = torch.ones(1, len(BANDS), 1, device=DEVICE)
        arguments = values, tokens.long(), tokens * 0, tokens, 1, None, ones, None, None, BANDS, None, T
        assert not module.stats_backward(*arguments).any()


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("d", "ends", "chunk"), [(5, (9,), 8), (33, (2, 2, 5, 9), 16), (3, (9,), 256)])
def test_weight_gradients(d, ends, chunk, dtype, monkeypatch):
    """Feature 0 is on at every token, so its entries fill several chunks."""
    monkeypatch.setattr(triton, "_ENTRIES", chunk)
    N, k = 24, 9
    values, indices, _ = lists(1, N, k, C=k, dtype=dtype)
    _, by_feature, tokens, sorted_values, offsets = eager.sort_entries(indices, values, k)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad = random(N, d, dtype=dtype), random(len(ends), N, d, dtype=dtype, seed=2)
    grad_pre = random(N * k, dtype=compute, seed=3)
    grad_pre[offsets[-1] :] = torch.nan  # past the counts: never read
    fired = offsets[1:] > offsets[:-1]
    assert not fired.all()
    weight = random(k, d, dtype=compute, seed=4)
    for first, second in (((grad_pre, x), (sorted_values, grad, weight)), ((grad_pre, x), (None, None, None))):
        arguments = by_feature, tokens, offsets, *first, *second, ends
        got = triton.weight_gradients(*arguments, False)
        filled = triton.weight_gradients(*arguments, True)
        wanted = eager.weight_gradients(*(a.nan_to_num() if a is grad_pre else a for a in arguments), True)
        for a, b, c in zip(got, wanted, filled, strict=True):
            close(c, b, RTOL[torch.float64] if dtype == torch.float64 else 1e-5)
            a, c = (each.T if each.dim() == 2 and len(each) == 4 else each for each in (a, c))  # measures: [k, 4]
            if b.numel():
                assert torch.equal(a[fired], c[fired])
                assert not c[~fired].any()
        encoder, decoder, _, (of_encoder, of_decoder, along, of_weight) = wanted
        torch.testing.assert_close(of_encoder, encoder.square().sum(1))
        if second[0] is not None:
            torch.testing.assert_close(of_decoder, decoder.square().sum(1))
            torch.testing.assert_close(along, (decoder * weight).sum(1))
            torch.testing.assert_close(of_weight[fired], weight.square().sum(1)[fired])


@needs_triton
def test_rows_of_features_that_did_not_fire_are_not_written(monkeypatch):
    values, indices, _ = lists(1, 12, 9, C=9)
    _, by_feature, tokens, sorted_values, offsets = eager.sort_entries(indices, values, 9)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: torch.full(shape, 7.0, **kw))
    rows = random(1, 12, 4)
    arguments = None, None, sorted_values, rows, None, (9,), False
    _, decoder, _, _ = triton.weight_gradients(by_feature, tokens, offsets, *arguments)
    fired = offsets[1:] > offsets[:-1]
    assert (decoder[~fired] == 7.0).all()
    assert not (decoder[fired] == 7.0).any()


@needs_triton
@pytest.mark.parametrize("T", [1, 13, 40])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_segment_bounds(T, dtype, monkeypatch):
    monkeypatch.setattr(triton, "_power_of_2", lambda n: 16)  # several blocks of positions
    segments = oracle.random_segments(3, T, torch.Generator().manual_seed(T), longest=30).to(DEVICE)
    segments = (segments + 1 if dtype == torch.uint8 else segments).to(dtype)
    strided = segments.t().contiguous().t()
    runs, rows = find_runs(segments), torch.arange(0, 3 * T, T, device=DEVICE)[:, None]
    for each in (segments, strided):
        starts, ends = triton._segment_bounds(each)
        assert torch.equal(starts.view(3, T), (runs.start + rows).int())
        assert torch.equal(ends.view(3, T), (runs.end + rows).int())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    values, indices, counts = lists(T=4, k=5, C=3)
    pre, active = features(1, 4, 5), pack_active(features(1, 4, 5).relu())
    weight, grad = random(5, 3), random(2, 4, 3)
    opcheck(ops.activate_with_mask, (pre, None, torch.tensor(0.2).to(DEVICE), None, [1, 2], None, backend))
    opcheck(ops.sparse_compress, (active, pre, None, 3, backend))
    opcheck(ops.sparse_decode, (values, indices, counts, weight, [2, 5], torch.float32, backend))
    opcheck(ops.sparse_decode_backward, (grad, indices, counts, weight, [2, 5], torch.float32, backend))
    opcheck(ops.sparse_sort_entries, (indices, values, 5, backend))
    entries = Entries(*ops.sparse_sort_entries(indices, values, 5, "eager"))
    by_feature = entries.values, entries.order, entries.features, entries.tokens
    opcheck(ops.sparse_stats_backward, (*by_feature, 5, None, random(1, 1, 5), None, None, [1, 2], None, 4, backend))
    rows = entries.features, entries.tokens, entries.offsets
    opcheck(
        ops.sparse_weight_gradients, (*rows, random(12), grad[0], entries.values, grad, weight, [2, 5], True, backend)
    )
    opcheck(ops.sparse_weight_gradients, (*rows, None, None, entries.values, grad, None, [2, 5], True, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_squared_errors(backend, dtype):
    x, xhat, grad = random(2, 3, 40), random(2, 3, 40, dtype=dtype, seed=2).requires_grad_(), random(2, 3, seed=3)
    got = squared_errors(x, xhat, backend=backend)
    wanted = (x.double() - xhat.double()).square().sum(-1)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (of_xhat,) = torch.autograd.grad(got, xhat, grad.to(got.dtype))
    exact = 2 * grad.double()[..., None] * (xhat.detach().double() - x.double())
    close(of_xhat, exact.to(dtype), max(RTOL[dtype], 1e-12) if dtype != torch.float64 else 1e-7)
    with torch.no_grad():
        xhat[0, 0, 0] = torch.inf
    got = squared_errors(x, xhat, backend=backend)
    (of_xhat,) = torch.autograd.grad(got, xhat, torch.zeros_like(got))
    assert not of_xhat.any()
    opcheck(ops.squared_errors, (x[0], xhat[0].detach(), backend))
    opcheck(ops.squared_errors_backward, (x[0], xhat[0].detach(), grad[0], backend))


def test_squared_errors_in_float64_by_finite_differences():
    x, xhat = random(3, 4, dtype=torch.float64), random(3, 4, dtype=torch.float64, seed=2).requires_grad_()
    torch.autograd.gradcheck(lambda xhat: squared_errors(x, xhat), xhat)
    assert squared_errors(x[:0], xhat[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"xhat must have shape \[3, 4\]"):
        squared_errors(x, xhat[:2])
