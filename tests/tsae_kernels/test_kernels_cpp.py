"""Tests of the `cpp` backend beyond those that all backends share."""

import backend_checks as checks
import kernels_oracle as oracle
import pytest
import torch
from backend_checks import ACTIVATIONS, RTOL, SCHMITT, assert_same_bits, everything

from tsae_kernels import activate_with_stats, available_backends, temporal_stats
from tsae_kernels.backends.extension import load_library
from tsae_kernels.backends.registry import choose_backend

pytestmark = pytest.mark.skipif(bool(load_library().error), reason=load_library().error)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("k", [5, 97])
def test_eight_bands_and_every_gradient(activation, segmented, shared, k):
    generator = torch.Generator().manual_seed(k)
    pre, bias = torch.randn(3, 150, k, generator=generator), torch.randn(k, generator=generator)
    segments = oracle.random_segments(3, 150, generator) if segmented else None
    options = {"bias": bias, "segments": segments, "bands": checks.EIGHT_BANDS, "shared": shared}
    checks.check_against_reference(pre, "cpp", **options, **ACTIVATIONS[activation])


@pytest.mark.parametrize("dtype", RTOL)
def test_long_sequences(dtype):
    pre = (torch.randn(1, 4096, 70, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    segments = torch.where(torch.arange(4096) < 4000, 0, 1)[None]
    for ids in (None, segments):
        checks.check_against_reference(pre, "cpp", segments=ids)
        checks.check_against_reference(pre, "cpp", segments=ids, activation="identity")


@pytest.mark.parametrize("reach", [1, 2, 31, 32, 63, 64, 95, 96, 127, 300])
def test_ring_buffers_of_every_size(reach):
    """A ring buffer one row too short for the widest window gives wrong sums once it has wrapped."""
    pre = torch.randn(1, 700, 3, generator=torch.Generator().manual_seed(reach))
    ids = torch.where(torch.arange(700) < 610, 0, 1)[None]
    for bands in (((1, reach),), ((reach, reach),)):
        checks.check_against_reference(pre, "cpp", segments=ids, bands=bands)


@pytest.mark.parametrize(
    "bands",
    [
        ((1, 40),),  # one window
        ((7, 40),),  # two, the inner one far from 0
        ((1, 2), (3, 11), (12, 150)),  # three
        ((1, 2), (3, 11), (20, 150)),  # four
        ((2, 2), (5, 11), (20, 150)),  # six
        *(((first, first + more),) for first in (1, 5, 62) for more in range(4)),  # summed pair by pair
    ],
)
def test_every_number_of_windows_and_pairs(bands):
    """Each has its own loop. Segments end within a block, at its end, and before a band begins."""
    pre = torch.randn(2, 700, 70, generator=torch.Generator().manual_seed(0)) + 2
    ends = torch.tensor([[3, 64, 67, 130, 192, 250, 256, 640]])
    ids = (torch.arange(700)[:, None] >= ends).sum(1).repeat(2, 1)
    ids[1] = 0
    checks.check_against_reference(pre, "cpp", segments=ids, bands=bands)


def test_grouped_tiles_get_the_same_results_as_single_ones():
    """In long sequences several tiles of features are processed together and share the scratch memory."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(2, 700, 450, generator=generator)
    ids = (torch.rand(2, 700, generator=generator) < 0.01).long().cumsum(1)
    ids[0, 100:300] = -1
    options = {"threshold": 0.1, "release": 0.05, "segments": ids, "backend": "cpp"}
    h, stats = activate_with_stats(pre, **options)
    for begin in range(0, 450, 50):
        part = slice(begin, begin + 50)
        h_part, stats_part = activate_with_stats(pre[..., part].contiguous(), **options)
        assert_same_bits([x[..., part] for x in (h, *stats)], [h_part, *stats_part])
    checks.check_against_reference(pre, "cpp", segments=ids)


def test_windows_do_not_drift_over_a_long_walk():
    walk = torch.randn(1, 4096, 8, generator=torch.Generator().manual_seed(1)).cumsum(1)
    got = temporal_stats(walk, backend="cpp").differences
    rtol = 1e-4 if load_library().selected == "baseline" else 5e-5  # no fused multiply-add
    torch.testing.assert_close(got, temporal_stats(walk, backend="reference").differences, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_converts_as_in_torch(dtype):
    checks.check_16_bit_conversions(dtype, "cpp")


@pytest.mark.parametrize("k", [1, 33, 320])
def test_two_runs_and_any_number_of_threads_give_the_same_bits(k):
    pre, bias = torch.randn(5, 200, k), torch.randn(k)
    segments = oracle.random_segments(5, 200)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 2, 3):
            torch.set_num_threads(number)
            run = everything(pre, bias, segments, backend="cpp", **SCHMITT)
            results.append([*run, *checks.window_loss(pre, 4, segments, "cpp")])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("shape", [(2, 9, 5), (1, 130, 64), (3, 600, 1024)])  # the last uses streaming stores
def test_every_output_is_written(shape):
    segments = oracle.random_segments(*shape[:2])
    segments[0] = -1
    checks.check_every_output_is_written(torch.randn(shape), torch.randn(shape[2]), segments, "cpp")


def test_strided_features_and_gradients_give_the_same_bits():
    x = torch.randn(4, 40, 3, 50)[:, :, 1]
    checks.check_strides([x, x.transpose(0, 1).contiguous().transpose(0, 1)], "cpp")
    grads = torch.full((), 0.3).expand(x.shape), torch.randn(4, 40, 1).expand(x.shape)
    checks.check_gradient_strides(x, [*grads, torch.randn(50, 40, 4).permute(2, 1, 0)], "cpp")


def test_operators_refuse_out_of_bounds_arguments():
    checks.check_refusals(torch.ops.tsae_kernels_cpp)


def test_gelu_is_as_accurate_as_in_torch():
    checks.check_gelu_accuracy(100_001, "cpp")


def test_it_is_the_default_on_a_cpu_only():
    assert available_backends()["cpp"] == "ok"
    assert choose_backend(None, torch.device("cpu")) == "cpp"
    with pytest.raises(ValueError, match="backend='cpp' runs on cpu tensors, got one on meta"):
        choose_backend("cpp", torch.device("meta"))
