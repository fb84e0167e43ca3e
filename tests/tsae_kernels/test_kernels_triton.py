"""Tests of the `triton` backend, at sizes that its interpreter can handle; on a GPU if there is one."""

import os
import subprocess
import sys

import backend_checks as checks
import kernels_oracle as oracle
import pytest
import torch
from backend_checks import ACTIVATIONS, SCHMITT
from kernels_oracle import activate_with_stats, active_words, temporal_stats

from tsae_kernels import MULTISCALE, available_backends
from tsae_kernels.backends.interface import Activation, Gradients
from tsae_kernels.backends.registry import choose_backend
from tsae_kernels.backends.triton import launch

pytestmark = pytest.mark.skipif(available_backends()["triton"] != "ok", reason=available_backends()["triton"])


def check_against_reference(pre, rtol=None, **options):
    pre, options = oracle.carried((pre, options), "triton")
    checks.check_against_reference(pre, "triton", rtol, **options)


def weighted_sum(pre, bias, segments, **options):
    """A weighted sum of all outputs, whose gradient checks them all in one backward pass."""
    h, stats = activate_with_stats(pre, bias, segments=segments, backend="triton", **options)
    generator = torch.Generator().manual_seed(1)
    return sum((x * torch.rand(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (h, *stats))


@pytest.mark.parametrize(
    ("T", "k", "segmented", "activation"),
    [
        (1, 1, False, "relu"),
        (1, 3, True, "schmitt"),
        (2, 33, False, "schmitt"),
        (2, 1, True, "relu"),
        (5, 33, False, "identity"),
        (5, 3, True, "gelu"),
    ],
)
def test_gradcheck_in_float64(T, k, segmented, activation):
    generator = torch.Generator().manual_seed(T + k)
    pre = torch.randn(1, T, k, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(k, dtype=torch.float64, generator=generator).requires_grad_()
    segments = oracle.random_segments(1, T, generator) if segmented else None
    torch.autograd.gradcheck(
        lambda p, b: weighted_sum(p, b, segments, **ACTIVATIONS[activation]), (pre, bias), fast_mode=True
    )


@pytest.mark.parametrize(("T", "k", "segmented"), [(127, 33, True), (128, 3, False), (129, 1, False)])
def test_gradients_of_long_rows_in_float64(T, k, segmented):
    """Against the reference backend, whose gradients are checked against finite differences."""
    generator = torch.Generator().manual_seed(T)
    pre = torch.randn(1, T, k, dtype=torch.float64, generator=generator)
    bias = torch.randn(k, dtype=torch.float64, generator=generator)
    segments = oracle.random_segments(1, T, generator) if segmented else None
    check_against_reference(pre, bias=bias, segments=segments, **SCHMITT)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision(dtype, segmented):
    generator = torch.Generator().manual_seed(0)
    T = 20 if oracle.INTERPRETED else 128
    pre = (torch.randn(1, T, 136, generator=generator) + 0.5).to(dtype)  # the last blocks of features overlap
    segments = oracle.random_segments(1, T, generator, longest=12) if segmented else None
    check_against_reference(pre, bias=torch.randn(136, generator=generator), segments=segments, **SCHMITT)


def test_a_mean_a_thousand_times_the_deviation():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 128, 33, generator=generator) + 1e3
    got, wanted = (temporal_stats(h, backend=name) for name in ("triton", "reference"))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_a_feature_active_once():
    """Also at the first positions, from which the centre is computed."""
    h = torch.zeros(1, 128, 9)
    for j, position in enumerate((0, 0, 0, 7, 7, 7, 8, 8, 8)):
        h[0, position, j] = (0.1, 1.7, 1e6)[j % 3]
    got, wanted = (temporal_stats(h, backend=name).differences for name in ("triton", "reference"))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


@pytest.mark.skipif(oracle.INTERPRETED, reason="takes Triton's interpreter too long")
def test_long_sequences_without_drift():
    T = 4096
    walk = torch.randn(1, T, 4, generator=torch.Generator().manual_seed(1)).cumsum(1)
    for ids in (None, (torch.arange(T) >= T - 20).int()[None]):
        check_against_reference(
            walk, 5e-5, stats_rtol=5e-5, bands=((1, 3), (5, 20), (30, 45)), segments=ids, activation="identity"
        )


@pytest.mark.skipif(oracle.INTERPRETED, reason="takes Triton's interpreter too long")
def test_long_sequences_in_every_precision():
    T = 700 if oracle.COUNTING else 4096
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        pre = (torch.randn(1, T, 71, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
        check_against_reference(pre, rtol=max(checks.RTOL[dtype], 1e-5))


def test_windows_are_summed_afresh(monkeypatch):
    """Every 8 steps instead of 256; only rounding may change."""
    monkeypatch.setattr(launch, "_refresh", lambda reach: 8)
    generator = torch.Generator().manual_seed(2)
    pre = torch.randn(2, 26, 3, dtype=torch.float64, generator=generator)
    segments = torch.tensor([[0] * 26, [0] * 5 + [-1] * 3 + [1] * 18])
    for ids in (None, segments):
        check_against_reference(pre, bands=oracle.GAPS, segments=ids)


FAR_BANDS = ((1, 1), (2, 5), (6, 6), (10, 15), (16, 40), (43, 50), (60, 60))


@pytest.mark.parametrize("segments", [None, [70, 13]])
def test_rows_far_from_the_ends_of_their_segment(segments):
    """Windows that reach beyond the rows in registers, whole and cut, in every order of their ends."""
    T = 150
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(1, T, 2, dtype=torch.float64, generator=generator)
    ids = None
    if segments is not None:
        first, excluded = segments
        ids = torch.tensor([[0] * first + [-1] * excluded + [1] * (T - first - excluded)])
    check_against_reference(pre, bands=FAR_BANDS, segments=ids, **SCHMITT)


@pytest.mark.parametrize(
    ("T", "bands", "segmented", "options", "per_position"),
    [
        (32, MULTISCALE, False, SCHMITT, False),
        (129, MULTISCALE, False, SCHMITT, False),  # a window reads rows again, whose features are not in memory
        (75, FAR_BANDS, True, SCHMITT, False),
        (31, MULTISCALE, True, {}, True),
    ],
)
def test_the_mask_of_active_features(T, bands, segmented, options, per_position):
    """The bits are those of h, and the statistics have the bits of `activate_with_stats`."""
    generator = torch.Generator().manual_seed(T)
    k = 40 if bands == MULTISCALE and not per_position else 5
    pre, bias = torch.randn(2, T, k, generator=generator), torch.randn(k, generator=generator)
    pre[0, T // 2, 0] = float("nan")
    levels = {name: torch.tensor(x) for name, x in options.items() if name != "activation"}
    if per_position:
        levels["threshold"] = torch.rand(2, T, 1, generator=generator)
    segments = oracle.random_segments(2, T, generator, longest=60) if segmented else None
    pre, bias, levels, segments = oracle.carried((pre, bias, levels, segments), "triton")
    if bands == FAR_BANDS:  # with the kernel of the test above
        pre, bias, levels = pre.double(), bias.double(), {name: x.double() for name, x in levels.items()}
    for x in (pre, pre.bfloat16()) if T == 32 else (pre,):
        activation = Activation("relu", bias, **levels)
        h, *stats = launch.activate_with_stats(x, activation, bands, segments)
        words, *again = launch.activate_with_mask(x, activation, bands, segments)
        assert words.dtype == torch.int32
        assert torch.equal(words.cpu(), active_words(h.cpu()))
        for a, b in zip(stats, again, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_every_output_is_written():
    pre, bias = torch.randn(1, 13, 141), torch.randn(141)  # several programs
    segments = torch.tensor([[0] * 6 + [-1] * 4 + [0] * 3])
    checks.check_every_output_is_written(*oracle.carried((pre, bias, segments), "triton"), backend="triton", **SCHMITT)


def test_strided_features_give_the_same_bits():
    x = oracle.carried(torch.randn(2, 9, 3, 5), "triton")[:, :, 1]
    checks.check_strides([x, x.permute(2, 0, 1).contiguous().permute(1, 2, 0)], "triton")


def test_no_tensor_is_copied_and_nothing_waits():
    """The launcher only uses shapes: it runs on meta tensors."""
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
    numbers = [y for y in backward if isinstance(y, int)]
    assert numbers[:2] == [9, 6]
    assert numbers[8:11] == list(x.stride())
    assert numbers[15:18] == [0, 6, 1]


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
