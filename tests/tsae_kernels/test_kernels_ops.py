"""Operator registration, torch.compile, linear cost in T, and imports of the package."""

import subprocess
import sys
import time

import kernels_oracle as oracle
import pytest
import torch
from kernels_oracle import activate_with_stats, encode_with_stats, temporal_loss, temporal_stats, window_consistency
from torch.library import opcheck
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tsae_kernels import count_positions, temporal_loss_from_stats
from tsae_kernels.backends.interface import Activation, Gradients
from tsae_kernels.backends.registry import get_backend
from tsae_kernels.bands import unflatten_bands

ops = torch.ops.tsae_kernels
SEGMENTS = torch.tensor([[0, 0, 1, 1, -1, 2]] * 2)


def features():
    return torch.randn(2, 6, 3, requires_grad=True)


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize(
    ("activation", "threshold", "release", "bands", "segments", "dtype"),
    [
        ("relu", None, None, [1, 3, 4, 15], None, torch.float32),
        ("relu", torch.tensor(0.5), torch.tensor(0.2), [1, 2], SEGMENTS, torch.float64),
        ("relu", torch.rand(2, 6, 1), None, [1, 2], SEGMENTS, torch.bfloat16),
        ("gelu", None, None, [2, 2], None, torch.float32),
        ("identity", None, None, [], SEGMENTS, torch.float16),
    ],
)
def test_opcheck_activate(backend, activation, threshold, release, bands, segments, dtype):
    oracle.too_slow(backend, dtype in (torch.float16, torch.bfloat16))
    pre = features().detach().to(dtype)
    if backend == "triton":
        bands = [offset for band in oracle.few(backend, unflatten_bands(bands)) for offset in band]
    inputs = (pre, torch.randn(3), activation, threshold, release, bands, segments, backend)
    pre, bias, *rest = oracle.carried(inputs, backend)
    opcheck(ops.activate_with_stats, (pre.requires_grad_(), bias.requires_grad_(), *rest))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_opcheck_the_rest(backend):
    plain, weights, one, segments = oracle.carried(
        (features().detach(), torch.rand(2, 6), torch.ones(()), SEGMENTS), backend
    )
    h = plain.clone().requires_grad_()
    bands = [offset for band in oracle.few(backend, ((1, 3),)) for offset in band]
    S = len(bands) // 2
    opcheck(ops.temporal_stats, (h, bands, segments, backend))
    opcheck(ops.step_energy, (h, weights, backend))
    opcheck(ops.step_energy_backward, (plain, weights, one, backend))
    grads = oracle.carried((torch.randn(2, 6, 3), torch.randn(S, 3), None, torch.randn(2, 3)), backend)
    grads = (grads[0], grads[1].expand(2, S, 3), *grads[2:])
    total = plain.sum(1)
    for activation in ("relu", "gelu", "identity"):
        opcheck(ops.activate_with_stats_backward, (plain, None, *grads, activation, bands, segments, backend))
        opcheck(ops.activate_with_stats_backward, (plain, None, *grads, activation, bands, None, backend, total))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_h_changes_only_the_rounding_of_its_gradient(backend, dtype):
    h, weights = torch.randn(2, 40, 4).to(dtype), torch.rand(2, 3, 4)
    arguments = (h, None, h, weights, None, None, "relu", [1, 3, 4, 15, 16, 39], None, backend)
    arguments, total = oracle.carried((arguments, h.float().sum(1)), backend)
    with_sum, without = (ops.activate_with_stats_backward(*arguments, *more) for more in ((total,), ()))
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for got, wanted in zip(with_sum, without, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize(("dynamic", "segments"), [(False, None), (True, SEGMENTS)])
def test_compiles_without_graph_breaks(backend, dynamic, segments):
    oracle.too_slow(backend, dynamic)
    torch.compiler.reset()
    bands = oracle.few(backend, ((1, 2), (3, 9)))
    scales = (0.1, 0.2, 0.3)[: len(bands)]

    def function(x, weight, bias, segments):
        h, stats = encode_with_stats(x, weight, bias, "relu", 0.5, 0.2, bands, segments, backend=backend)
        positions = x.shape[1] if segments is None else count_positions(segments)
        loss = temporal_loss_from_stats(stats, positions, scales, min_variance=0.0)
        loss = loss + temporal_loss(h, scales, bands, None, 0.0, segments, backend=backend)
        gelu, gelu_stats = activate_with_stats(h, bias, "gelu", segments=segments, backend=backend)
        again = temporal_stats(gelu, segments=segments, backend=backend)
        return (
            loss
            + window_consistency(h, 3, segments, backend=backend)
            + gelu.sum()
            + (gelu_stats.square * again.differences[:, 0]).sum()
        )

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = (features(), torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True))
    expected, got = function(*inputs, segments), compiled(*inputs, segments)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


class Work(TorchDispatchMode):
    """Counts the elements that PyTorch's operators read and write, and the multiplications of matrix products."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            name = func.overloadpacket.__name__
            read = args[1:] if name == "index_select" else args  # reads no more than it writes
            tensors = [x for x in _pytree.tree_leaves((read, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.elements += 1 + sum(x.numel() for x in tensors)
            if name in ("mm", "bmm", "addmm", "baddbmm"):
                self.elements += tensors[-3].numel() * tensors[-2].shape[-1]
        return out


def bands_over(T):
    """Bands over all offsets: with a fixed largest offset, every algorithm is linear in T."""
    return (1, T // 8), (T // 8 + 1, T - 1)


def segments_over(T):
    return (torch.arange(T) // (T // 2)).expand(1, T)


@pytest.mark.parametrize("segmented", [False, True])
def test_eager_does_work_linear_in_time(segmented):
    """Counted, not timed. The reference, which loops over all offsets, shows that the count detects quadratic work."""

    def elements(backend, T):
        threshold, release = torch.tensor(0.5), torch.tensor(0.2)
        pre, grad_h, weights = torch.randn(1, T, 3), torch.randn(1, T, 3), torch.rand(1, T)
        grads = Gradients(grad_h, torch.randn(1, 2, 3), torch.randn(1, 3), torch.randn(1, 3))
        bands, segments = bands_over(T), segments_over(T) if segmented else None
        with Work() as work:
            schmitt = Activation("relu", None, threshold, release)
            h, *_ = backend.activate_with_stats(pre, schmitt, bands, segments)
            backend.temporal_stats(h, bands, segments)
            backend.activate_with_stats_backward(h, grads, Activation("relu"), bands, segments)
            backend.step_energy(h, weights)
            backend.step_energy_backward(h, weights, torch.ones(()))
        return work.elements

    def growth(name):
        return elements(get_backend(name), 256) / elements(get_backend(name), 128)

    assert 1.9 < growth("eager") < 2.1
    assert growth("reference") > 3


@pytest.mark.parametrize("backend", oracle.parameters([name for name in oracle.FAST if name != "eager"]))
@pytest.mark.parametrize("segmented", [False, True])
def test_linear_in_time(backend, segmented):
    oracle.too_slow(backend, True)
    oracle.compiles_too_much(backend, True)  # and the time of the CPU is not the kernels'

    def seconds(T):
        h = torch.randn(1, T, 1024, requires_grad=True)  # so that the work outweighs the call overhead
        bands, segments = bands_over(T), segments_over(T) if segmented else None
        begin = time.process_time()
        activated, stats = activate_with_stats(
            h, None, "relu", 0.5, 0.2, bands=bands, segments=segments, backend=backend
        )
        (activated.sum() + stats.differences.sum() + window_consistency(h, 5, segments, backend=backend)).backward()
        return time.process_time() - begin

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds(64)
        short, long = zip(*((seconds(256), seconds(2048)) for _ in range(5)), strict=True)
    finally:
        torch.set_num_threads(threads)
    assert min(long) / min(short) < 24  # 8 if linear, 64 if quadratic


def test_importing_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import tsae_kernels; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['tsae_kernels']"
