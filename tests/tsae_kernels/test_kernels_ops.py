"""Registration, compilation, cost, and what importing the package brings with it."""

import subprocess
import sys
import time

import kernels_oracle as oracle
import pytest
import torch
from kernels_oracle import activate_with_stats, encode_with_stats, temporal_loss, temporal_stats, window_consistency
from torch.library import opcheck

from tsae_kernels import count_positions, temporal_loss_from_stats

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
    inputs = (pre, torch.randn(3), activation, threshold, release, bands, segments, backend)
    pre, bias, *rest = oracle.carried(inputs, backend)
    opcheck(ops.activate_with_stats, (pre.requires_grad_(), bias.requires_grad_(), *rest))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
def test_opcheck_the_rest(backend):
    plain, weights, one, segments = oracle.carried(
        (features().detach(), torch.rand(2, 6), torch.ones(()), SEGMENTS), backend
    )
    h = plain.clone().requires_grad_()
    opcheck(ops.temporal_stats, (h, [1, 3], segments, backend))
    opcheck(ops.step_energy, (h, weights, backend))
    opcheck(ops.step_energy_backward, (plain, weights, one, backend))
    grads = oracle.carried((torch.randn(2, 6, 3), torch.randn(1, 3), None, torch.randn(2, 3)), backend)
    grads = (grads[0], grads[1].expand(2, 1, 3), *grads[2:])
    for activation in ("relu", "gelu", "identity"):
        opcheck(ops.activate_with_stats_backward, (plain, None, *grads, activation, [1, 2], segments, backend))


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize(("dynamic", "segments"), [(False, None), (True, SEGMENTS)])
def test_compiles_without_graph_breaks(backend, dynamic, segments):
    oracle.too_slow(backend, dynamic)
    torch.compiler.reset()

    def function(x, weight, bias, segments):
        h, stats = encode_with_stats(x, weight, bias, "relu", 0.5, 0.2, ((1, 2), (3, 9)), segments, backend=backend)
        positions = x.shape[1] if segments is None else count_positions(segments)
        loss = temporal_loss_from_stats(stats, positions, (0.1, 0.2), min_variance=0.0)
        loss = loss + temporal_loss(h, (0.1, 0.2), ((1, 2), (3, 9)), None, 0.0, segments, backend=backend)
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


@pytest.mark.parametrize("backend", oracle.FAST_BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
def test_linear_in_time(backend, segmented):
    oracle.too_slow(backend, True)

    def seconds(T):
        h = torch.randn(1, T, k, requires_grad=True)
        segments = (torch.arange(T) // (T // 3)).expand(1, T) if segmented else None
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            activated, stats = activate_with_stats(h, None, "relu", 0.5, 0.2, segments=segments, backend=backend)
            (activated.sum() + stats.differences.sum() + window_consistency(h, 5, segments, backend=backend)).backward()
            best = min(best, time.process_time() - begin)
        return best

    k = 16 if backend == "eager" else 1024  # so that the work outweighs the calls
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds(64)
        ratio = seconds(2048) / seconds(256)  # 8 if linear, 64 if quadratic
    finally:
        torch.set_num_threads(threads)
    assert ratio < 16, ratio


def test_importing_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import tsae_kernels; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['tsae_kernels']"
