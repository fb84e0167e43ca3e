"""The operators on lists of active features: Triton's against PyTorch's, their registration, and what they wait for."""

import itertools

import kernels_oracle as oracle
import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tsae_kernels import activate_with_stats
from tsae_kernels.backends import sparse_eager as eager
from tsae_kernels.backends.sparse_eager import pack_active
from tsae_kernels.backends.triton import sparse_launch as triton
from tsae_kernels.segments import find_runs
from tsae_kernels.sparse_features import (
    DeferredGradients,
    decode_sparse_features,
    encode_sparse,
    squared_errors,
    weight_gradients,
)
from tsae_kernels.sparse_ops import Entries, backend_for_lists

ops = torch.ops.tsae_kernels
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


def step(x, W_enc, b_enc, W_dec, segments, backend, threshold=None):
    options = {"capacity": 4, "backend": backend}
    found, stats = encode_sparse(x, W_enc.T, b_enc, threshold, None, BANDS, segments, **options)
    xhat = decode_sparse_features(found, W_dec, ends=(2, len(W_dec)), backend=backend)
    return found.values, xhat, *stats


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    x, W_enc, b_enc, W_dec = (
        random(*shape, dtype=torch.float64, seed=i).requires_grad_()
        for i, shape in enumerate(((1, 6, 2), (4, 2), (4,), (4, 2)))
    )
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]], device=DEVICE)
    torch.autograd.gradcheck(
        lambda *leaves: step(*leaves, segments, backend), (x, W_enc, b_enc, W_dec), fast_mode=backend == "triton"
    )


def test_second_derivatives_raise():
    x, W_enc, b_enc, W_dec = (random(*shape).requires_grad_() for shape in ((1, 6, 2), (4, 2), (4,), (4, 2)))
    _, xhat, *_ = step(x, W_enc, b_enc, W_dec, None, "eager")
    (grad,) = torch.autograd.grad(xhat.square().sum(), W_dec, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "is_nonzero", "unique")


class NoWaiting(TorchDispatchMode):
    """Fails at an operator that makes the host wait for a device, which a CUDA graph cannot contain."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name.startswith(wait) for wait in WAITS), func
        if name in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), func
        return func(*args, **(kwargs or {}))


def test_the_mode_notices_waiting():
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: x.masked_select(x > 0)):
        with pytest.raises(AssertionError), NoWaiting():
            wait()


@pytest.mark.parametrize("backend", oracle.parameters(("reference", "triton")))
def test_a_training_step_does_not_wait(backend):
    """`eager`'s own activation waits if there are segments; `reference`'s does not, and has the same lists."""
    x, W_enc, b_enc, W_dec = (random(*shape) for shape in ((1, 6, 2), (4, 2), (4,), (4, 2)))
    x = x.requires_grad_()
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]], device=DEVICE)
    deferred = DeferredGradients()
    with NoWaiting():
        options = {"capacity": 2, "deferred": deferred, "backend": backend}
        found, stats = encode_sparse(x, W_enc.T, b_enc, 0.1, 0.05, BANDS, segments, **options)
        xhat = decode_sparse_features(found, W_dec, ends=(2, 4), deferred=deferred, backend=backend)
        loss = xhat.square().sum() + found.values.sum() + sum(s.sum() for s in stats)
        loss.backward()
        grads = weight_gradients(deferred, W_dec)
        grads.add_rows(torch.arange(2, device=DEVICE), random(2, 2), random(2, 2), random(2), W_dec)
        _ = found.overflow


@pytest.mark.parametrize("module", [eager, triton])
@pytest.mark.parametrize("k", [1024, 16384, 65536, 131072])
def test_shapes_of_wide_dictionaries(k, module, monkeypatch):
    """On the meta device nothing is computed, and reading a value raises. The grids fit CUDA's limits."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    if module is triton:
        pytest.importorskip("triton")
        folder = "tsae_kernels.backends.triton"
        for kernel in ("lists.list", "lists.values", "lists.entries", "lists.segment_bounds", "rows.decode"):
            monkeypatch.setattr(f"{folder}.sparse_{kernel}_kernel", Recorder())
        for kernel in ("rows.decode_backward", "rows.weight_gradients", "rows.finish_weight_gradients"):
            monkeypatch.setattr(f"{folder}.sparse_{kernel}_kernel", Recorder())
        monkeypatch.setattr(f"{folder}.sparse_stats.stats_backward_kernel", Recorder())
    B, T, d, C = 128, 128, 2304, 2 if module is eager else 64

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    if module is eager:
        B = 1
    N = B * T
    values, indices, counts = module.compress(meta(B, 4, k, dtype=torch.int32), meta(B, T, k), meta(k), C)
    assert values.shape == indices.shape == (N, C)
    assert module.decode(values, indices, counts, meta(k, d), (k,), torch.bfloat16).shape == (1, N, d)
    grad = meta(1, N, d)
    assert module.decode_backward(grad, indices, counts, meta(k, d), (k,), torch.float32).shape == (N, C)
    order, by_feature, tokens, sorted_values, offsets = module.sort_entries(indices, values, k)
    assert offsets.shape == (k + 1,)
    differences = meta(1, 2, k, dtype=torch.float32).expand(B, 2, k)
    segments = meta(B, T, dtype=torch.int64)
    arguments = sorted_values, order, by_feature, tokens, k, None, differences, None, None, BANDS, segments, T
    grad_pre = module.stats_backward(*arguments)
    assert grad_pre.shape == (N * C,)
    arguments = by_feature, tokens, offsets, grad_pre, meta(N, d), sorted_values, grad, meta(k, d), (k,), False
    encoder, decoder, bias, measures = module.weight_gradients(*arguments)
    assert encoder.shape == decoder.shape == (k, d)
    assert bias.shape == (k,)
    assert measures.shape == (4, k)
    assert all(grid[0] < 2**31 and max((1, *grid[1:])) < 2**16 for grid in grids)
    assert len(grids) == (0 if module is eager else 10)


@needs_triton
def test_results_have_the_same_bits_every_time():
    x, W_enc, b_enc, W_dec = (random(*shape).requires_grad_() for shape in ((1, 9, 3), (5, 3), (5,), (5, 3)))
    runs = []
    for _ in range(2):
        outputs = step(x, W_enc, b_enc, W_dec, None, "triton")
        loss = sum(output.square().sum() for output in outputs)
        runs.append([*outputs, *torch.autograd.grad(loss, (x, W_enc, b_enc, W_dec))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    leaves = [random(*shape).requires_grad_() for shape in ((1, 9, 3), (5, 3), (5,), (5, 3))]

    def function(*leaves):
        return sum(output.square().sum() for output in step(*leaves, None, "eager", 0.1))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, got = function(*leaves), compiled(*leaves)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_lists_use_triton_with_either_gpu_backend(monkeypatch):
    states = {"triton": "ok"}
    monkeypatch.setattr("tsae_kernels.sparse_ops.available_backends", lambda: states)
    names = ("cuda", "triton", "eager", "cpp", "reference")
    assert [backend_for_lists(name) for name in names] == ["triton", "triton", "eager", "eager", "eager"]
    states["triton"] = "not installed"
    assert backend_for_lists("cuda") == "eager"


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def training_step(x, W_enc, b_enc, W_dec, segments):
    """Loss, gradients of the rows that fired (0 elsewhere), and of b_enc."""
    deferred = DeferredGradients()
    options = {"capacity": 128, "deferred": deferred}
    found, stats = encode_sparse(x, W_enc.T, b_enc, 0.9, 0.3, BANDS, segments, **options)
    xhat = decode_sparse_features(found, W_dec, deferred=deferred)
    loss = (x.flatten(0, 1) - xhat).square().sum() + 0.01 * stats.differences.sum()
    loss.backward()
    grads = weight_gradients(deferred, W_dec)
    rows = (torch.where(grads.fired[:, None], each, 0) for each in (grads.encoder, grads.decoder))
    return loss.detach(), *rows, grads.bias, found.overflow


def gpu_problem(dtype=torch.float32, B=8, T=128, d=200, k=4096):
    x, W_enc, W_dec = random(B, T, d), random(k, d, seed=2), random(k, d, seed=3)
    W_enc, W_dec = (each / each.norm(dim=1, keepdim=True) for each in (W_enc, W_dec))
    x = x / x.norm(dim=2, keepdim=True) * d**0.5 / 3
    segments = oracle.random_segments(B, T, torch.Generator().manual_seed(0)).cuda()
    return (
        x.to("cuda", dtype),
        W_enc.to("cuda", dtype),
        torch.zeros(k, device="cuda"),
        W_dec.to("cuda", dtype),
        segments,
    )


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_large_step_on_a_gpu(dtype):
    """Against the dense step in float64; a feature that is on at every token fills many chunks of entries."""
    x, W_enc, b_enc, W_dec, segments = gpu_problem(dtype)
    b_enc[7] = 10.0
    _, *grads, overflow = training_step(x, W_enc, b_enc, W_dec, segments)
    assert not overflow
    leaves = [each.double().requires_grad_() for each in (W_enc, W_dec, b_enc)]
    pre = (x @ W_enc.T).double() if dtype == torch.bfloat16 else x.double() @ leaves[0].T
    if dtype == torch.bfloat16:  # the pre-activations as rounded, with the gradient of the exact ones
        pre = pre + (x.double() @ leaves[0].T) - (x.double() @ leaves[0].T).detach()
    h, stats = activate_with_stats(pre, leaves[2], "relu", 0.9, 0.3, BANDS, segments)
    dense = (x.flatten(0, 1).double() - h.flatten(0, 1) @ leaves[1]).square().sum() + 0.01 * stats.differences.sum()
    wanted = torch.autograd.grad(dense, leaves)
    bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    for got, exact in zip(grads, (*wanted,), strict=True):
        assert (got.double() - exact).norm() < bound * exact.norm()


@on_gpu
def test_a_step_is_one_cuda_graph():
    """Replayed on other inputs, it gives the bits of a step that was launched kernel by kernel."""
    x, W_enc, b_enc, W_dec, segments = gpu_problem(torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and warms up
        for _ in range(2):
            training_step(x, W_enc, b_enc, W_dec, segments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(x, W_enc, b_enc, W_dec, segments)
    x.copy_(x.flip(0))
    graph.replay()
    assert all(
        torch.equal(a, b) for a, b in zip(captured, training_step(x, W_enc, b_enc, W_dec, segments), strict=True)
    )
