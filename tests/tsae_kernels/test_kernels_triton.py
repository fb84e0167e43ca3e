"""The Triton backend, at sizes that its interpreter manages; with a GPU the same tests run on it."""

import os
import subprocess
import sys

import kernels_oracle as oracle
import pytest
import torch
from kernels_oracle import activate_with_stats, temporal_stats, window_consistency

from tsae_kernels import MULTISCALE, available_backends
from tsae_kernels.backends.interface import Activation, Gradients
from tsae_kernels.backends.registry import choose_backend
from tsae_kernels.backends.triton import launch

pytestmark = pytest.mark.skipif(available_backends()["triton"] != "ok", reason=available_backends()["triton"])

MODES = {
    "relu": ("relu", None, None),
    "gelu": ("gelu", None, None),
    "identity": ("identity", None, None),
    "threshold": ("relu", 0.4, None),
    "per position": ("relu", "per position", None),
    "schmitt": ("relu", 0.6, 0.2),
}


def everything(pre, bias=None, mode="relu", bands=MULTISCALE, segments=None, shared=True, backend="triton"):
    """Every output and gradient of one call, with gradients of every kind coming in."""
    generator = torch.Generator().manual_seed(9)
    name, threshold, release = MODES[mode]
    if threshold == "per position":
        threshold = torch.linspace(0.1, 0.6, pre.shape[0] * pre.shape[1]).reshape(*pre.shape[:2], 1)
    leaves = [x.detach().requires_grad_() for x in (pre, bias) if x is not None]
    h, stats = activate_with_stats(
        leaves[0], None if bias is None else leaves[1], name, threshold, release, bands, segments, backend=backend
    )
    shape = stats.differences.shape
    rows = (1 if shared else shape[0], *shape[1:])
    incoming = [
        torch.randn(h.shape, generator=generator).to(h.dtype),
        torch.rand(rows, generator=generator).to(stats.square.dtype).expand(shape),
        torch.randn(stats.total.shape, generator=generator).to(stats.total.dtype),
        torch.randn(stats.square.shape, generator=generator).to(stats.square.dtype),
    ]
    return [h.detach(), *(s.detach() for s in stats), *torch.autograd.grad([h, *stats], leaves, incoming)]


def assert_as_reference(pre, *args, rtol=1e-5, **options):
    results = everything(pre, *args, **options)
    for got, wanted in zip(results, everything(pre, *args, backend="reference", **options), strict=True):
        assert got.dtype == wanted.dtype
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * scale)


def weighted(pre, bias, mode, bands, segments):
    """One number of all outputs: its gradient checks them all in one backward pass."""
    name, threshold, release = MODES[mode]
    h, stats = activate_with_stats(pre, bias, name, threshold, release, bands, segments, backend="triton")
    generator = torch.Generator().manual_seed(1)
    return sum((x * torch.rand(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (h, *stats))


@pytest.mark.parametrize(
    ("T", "k", "segmented", "mode"),
    [
        (1, 1, False, "relu"),
        (1, 3, True, "schmitt"),
        (2, 33, False, "schmitt"),
        (2, 1, True, "relu"),
        (5, 33, False, "identity"),
        (5, 3, True, "gelu"),
    ],
)
def test_gradcheck_in_float64(T, k, segmented, mode):
    generator = torch.Generator().manual_seed(T + k)
    pre = torch.randn(1, T, k, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(k, dtype=torch.float64, generator=generator).requires_grad_()
    segments = oracle.random_segments(1, T, generator) if segmented else None
    torch.autograd.gradcheck(
        lambda p, b: weighted(p, b, mode, MULTISCALE, segments), (pre, bias), fast_mode=True, nondet_tol=0.0
    )


@pytest.mark.parametrize(("T", "k", "segmented"), [(127, 33, True), (128, 3, False), (129, 1, False)])
def test_gradients_of_long_rows_in_float64(T, k, segmented):
    """Against the reference, whose gradients are checked against finite differences."""
    generator = torch.Generator().manual_seed(T)
    pre = torch.randn(1, T, k, dtype=torch.float64, generator=generator)
    bias = torch.randn(k, dtype=torch.float64, generator=generator)
    segments = oracle.random_segments(1, T, generator) if segmented else None
    assert_as_reference(pre, bias, "schmitt", segments=segments, rtol=1e-11)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision(dtype, segmented):
    generator = torch.Generator().manual_seed(0)
    T = 20 if oracle.INTERPRETED else 128
    pre = (torch.randn(1, T, 40, generator=generator) + 0.5).to(dtype)
    segments = oracle.random_segments(1, T, generator, longest=12) if segmented else None
    rtol = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert_as_reference(pre, torch.randn(40, generator=generator), "schmitt", segments=segments, rtol=rtol)


def test_a_mean_a_thousand_times_the_deviation():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 128, 40, generator=generator) + 1e3
    got, wanted = (temporal_stats(h, backend=name) for name in ("triton", "reference"))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_a_feature_active_once():
    """Also among the first positions, which give the centre."""
    h = torch.zeros(1, 128, 9)
    for j, position in enumerate((0, 0, 0, 7, 7, 7, 8, 8, 8)):
        h[0, position, j] = (0.1, 1.7, 1e6)[j % 3]
    got, wanted = (temporal_stats(h, backend=name).differences for name in ("triton", "reference"))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


@pytest.mark.skipif(oracle.INTERPRETED, reason="takes Triton's interpreter too long")
def test_long_sequences_without_drift():
    T = 4096
    walk = torch.randn(1, T, 4, generator=torch.Generator().manual_seed(1)).cumsum(1)
    bands = ((1, 3), (5, 20), (30, 45))
    for ids in (None, (torch.arange(T) >= T - 20).int()[None]):
        assert_as_reference(walk, mode="identity", bands=bands, segments=ids, rtol=5e-5)


@pytest.mark.skipif(oracle.INTERPRETED, reason="takes Triton's interpreter too long")
def test_long_sequences_in_every_precision():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        pre = (torch.randn(1, 4096, 70, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
        for bands in (MULTISCALE, ((1, 3), (4, 2000)), ((1, 5000),)):
            assert_as_reference(pre, bands=bands, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5)


def test_windows_are_summed_afresh(monkeypatch):
    """Every 8 steps instead of 256, so that it happens often; nothing but rounding may change."""
    monkeypatch.setattr(launch, "_refresh", lambda reach: 8)
    generator = torch.Generator().manual_seed(2)
    pre = torch.randn(2, 26, 3, dtype=torch.float64, generator=generator)
    segments = torch.tensor([[0] * 26, [0] * 5 + [-1] * 3 + [1] * 18])
    for ids in (None, segments):
        assert_as_reference(pre, mode="relu", bands=((2, 7), (9, 40)), segments=ids, rtol=1e-11)


def test_every_output_is_written():
    """With deterministic algorithms PyTorch fills what it allocates with NaN."""
    pre, bias = torch.randn(1, 13, 140), torch.randn(140)  # two programs
    segments = torch.tensor([[0] * 6 + [-1] * 4 + [0] * 3])
    clean = everything(pre, bias, "schmitt", segments=segments)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        poisoned = everything(pre, bias, "schmitt", segments=segments)
        leaf = pre.clone().requires_grad_()
        loss = window_consistency(leaf, 3, segments, backend="triton")
        (grad,) = torch.autograd.grad(loss, leaf)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))  # and two runs give the same bits
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_strided_features_and_gradients_give_the_same_bits():
    base = torch.randn(2, 9, 3, 5)
    wanted = everything(base[:, :, 1].contiguous())
    for view in (base[:, :, 1], base[:, :, 1].permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        assert not view.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(everything(view), wanted, strict=True))


def test_no_tensor_is_copied_and_nothing_waits():
    """The launcher gets by with shapes: it runs on tensors that have no data."""
    recorded = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: recorded.append(args)

    folder = "tsae_kernels.backends.triton"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(f"{folder}.forward.forward_kernel", Recorder())
        monkeypatch.setattr(f"{folder}.backward.backward_kernel", Recorder())
        x = torch.empty(6, 4, 9, device="meta").permute(1, 2, 0)
        ids = torch.empty(4, 9, dtype=torch.int64, device="meta")
        shared = torch.empty(1, 3, 6, device="meta").expand(4, 3, 6)
        launch.activate_with_stats(x, Activation("relu"), MULTISCALE, ids)
        launch.activate_with_stats_backward(x, Gradients(x, shared, None, None), Activation("relu"), MULTISCALE, ids)
    forward, backward = recorded
    assert forward[0] is x
    assert [backward[i] is y for i, y in ((0, x), (2, x), (3, shared))] == [True] * 3
    assert backward[7].is_contiguous()  # grad_pre
    strides = [y for y in backward if isinstance(y, int)]
    assert strides[2:5] == list(x.stride())
    assert strides[9:12] == [0, 6, 1]


def test_the_outer_band_is_all_pairs_less_the_others_only_where_that_is_safe():
    assert launch.outer_band(MULTISCALE, 128) == 2
    assert launch.outer_band(MULTISCALE, 120) == -1  # not longer than 8 times the inner bands
    assert launch.outer_band(MULTISCALE, 129) == -1  # some pairs are further apart
    assert launch.outer_band(((1, 3), (5, 200)), 128) == -1  # offset 4 is missing
    assert launch.outer_band(((2, 200),), 128) == -1
    assert launch.outer_band(((1, 200),), 128) == 0
    assert launch.outer_band((), 128) == -1


def test_it_is_never_chosen_unasked_on_a_cpu():
    assert choose_backend(None, torch.device("cpu")) != "triton"
    if not torch.cuda.is_available():
        code = "import tsae_kernels as tk, torch; tk.temporal_stats(torch.ones(1, 2, 3), backend='triton')"
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert "no CUDA device is visible: use CUDA tensors, or set TRITON_INTERPRET=1" in out.stderr


def test_without_triton_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert launch.unavailable_reason() == "Triton is not installed: run `pip install triton`"
