"""Training steps on lists of active features: gradients, what they wait for, sizes, repeatability, a CUDA graph."""

import kernels_oracle as oracle
import pytest
import torch
from sparse_cases import BACKENDS, BANDS, DEVICE, needs_triton, random
from torch.utils._python_dispatch import TorchDispatchMode

from tsae_kernels import activate_with_stats
from tsae_kernels.backends import sparse_eager as eager
from tsae_kernels.backends.triton import sparse_launch as triton
from tsae_kernels.sparse_features import SparseFeatures, decode_sparse_features, encode_gated, encode_sparse
from tsae_kernels.sparse_ops import backend_for_lists
from tsae_kernels.sparse_weights import DeferredGradients, weight_gradients


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


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", oracle.parameters(("reference", "triton")))
def test_a_training_step_does_not_wait(backend, gated):
    """`eager`'s own activation waits if there are segments; `reference`'s does not, and has the same lists."""
    x, W_enc, b_enc, W_dec = (random(*shape) for shape in ((1, 6, 2), (4, 2), (4,), (4, 2)))
    x = x.requires_grad_()
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]], device=DEVICE)
    deferred = DeferredGradients()
    with NoWaiting():
        options = {"capacity": 2, "deferred": deferred, "backend": backend}
        if gated:
            near, stats = encode_gated(x, W_enc.T, b_enc, 0.1, 0.05, BANDS, segments, width=0.5, **options)
            found = SparseFeatures(*near[:3])
        else:
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
        for kernel in ("list", "values", "window", "gated_values", "entries", "segment_bounds"):
            monkeypatch.setattr(f"{folder}.sparse_lists.{kernel}_kernel", Recorder())
        monkeypatch.setattr(f"{folder}.sparse_rows.decode_kernel", Recorder())
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
    level, ids, integers = meta(k, dtype=torch.float32), meta(B, T, dtype=torch.int64), {"dtype": torch.int32}
    gated = module.compress_gated(meta(B, 4, k, **integers), meta(B, T, k), meta(k), level, level, ids, 0.5, C)
    assert [tuple(each.shape) for each in gated] == [(N, C), (N, C), (N,), (N, C), (N,)]
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
    assert len(grids) == (0 if module is eager else 15)


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
