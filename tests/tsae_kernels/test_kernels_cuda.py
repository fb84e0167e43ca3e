"""Tests of the `cuda` backend beyond those that all backends share, on a GPU or emulated on the host.

`test_kernels_cuda_emulation.py` also runs this file, with the kernels compiled for the host.
"""

import backend_checks as checks
import kernels_oracle as oracle
import pytest
import torch
from backend_checks import ACTIVATIONS, RTOL, SCHMITT, assert_same_bits, everything
from torch.utils._python_dispatch import TorchDispatchMode

from tsae_kernels import (
    MULTISCALE,
    activate_with_stats,
    available_backends,
    count_positions,
    temporal_loss_from_stats,
    temporal_stats,
    window_consistency,
)
from tsae_kernels.backends.interface import Activation
from tsae_kernels.backends.registry import _DEVICE_TYPES, choose_backend, get_backend

_STATE = available_backends()["cuda"]
pytestmark = pytest.mark.skipif(_STATE != "ok", reason=f"cuda is {_STATE}")

DEVICE = _DEVICE_TYPES["cuda"]
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="emulated on the host")


def agrees(pre, **options):
    checks.check_against_reference(pre.to(DEVICE), "cuda", **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("k", [5, 98])
def test_eight_bands_and_every_gradient_cuda(activation, segmented, k):
    generator = torch.Generator().manual_seed(k)
    pre = torch.randn(2, 130, k, generator=generator)
    options = {"bias": torch.randn(k, generator=generator).to(DEVICE), "shared": segmented}
    if segmented:
        options["segments"] = oracle.random_segments(2, 130, generator).to(DEVICE)
    agrees(pre, bands=checks.EIGHT_BANDS, **options, **ACTIVATIONS[activation])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("segmented", [False, True])
def test_the_tuned_bands_in_every_dtype_cuda(dtype, activation, segmented):
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(2, 128, 66, generator=generator).to(dtype)
    options = {"shared": not segmented}
    if segmented:
        options["segments"] = oracle.random_segments(2, 128, generator, longest=90).to(DEVICE)
    if activation == "gelu":
        options["rtol"] = max(RTOL[dtype], 2e-5)
    agrees(pre, **options, **ACTIVATIONS[activation])


LENGTHS = [1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 119, 120, 127, 129, 144, 150, 300]
THIRD = {"none": (), "all": ((16, 5000),), "some": ((16, 40),)}


@pytest.mark.parametrize("third", THIRD)
@pytest.mark.parametrize("T", LENGTHS)
def test_the_tuned_bands_at_every_kind_of_length_cuda(T, third):
    pre = torch.randn(1, T, 4, generator=torch.Generator().manual_seed(T)) + 2
    agrees(pre, bands=((1, 3), (4, 15), *THIRD[third]), activation="identity")


@pytest.mark.parametrize(("dtype", "T"), [(torch.bfloat16, 640), (torch.bfloat16, 641), (torch.float32, 300)])
@pytest.mark.parametrize("segmented", [False, True])
def test_tiles_up_to_the_largest_and_beyond_cuda(dtype, T, segmented):
    generator = torch.Generator().manual_seed(0)
    segments = torch.where(torch.arange(T) < T - 70, 0, 1)[None].to(DEVICE) if segmented else None
    agrees((torch.randn(1, T, 66, generator=generator) + 3).to(dtype), activation="identity", segments=segments)
    agrees(torch.randn(1, T, 6, generator=generator).to(dtype), activation="gelu", rtol=8e-3)


@pytest.mark.parametrize("dtype", RTOL)
def test_long_sequences_cuda(dtype):
    generator = torch.Generator().manual_seed(0)
    pre = (torch.randn(1, 4096, 3, generator=generator) + 3).to(dtype)
    agrees(pre, activation="identity")
    segments = torch.where(torch.arange(4096) < 4000, 0, 1)[None].to(DEVICE)
    agrees(pre, bands=((1, 3), (7, 100)), segments=segments, **SCHMITT)


RUNS = {
    "every length": tuple(range(1, 72)),
    "three": (37, 50, 41),
    "twenty": (5, 9, 3, 7, 8) * 4,
    "long": (3, 250, 32, 1, 31, 400, 16, 17),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [16, 40, 5000])
@pytest.mark.parametrize("runs", RUNS)
def test_gradients_of_packed_runs_cuda(runs, last, dtype):
    """The backward kernel treats a run's ends, short runs and a window that covers the run separately."""
    ids = torch.arange(len(RUNS[runs])).repeat_interleave(torch.tensor(RUNS[runs]))[None]
    ids = torch.where(ids % 7 == 5, -1, ids)
    generator = torch.Generator().manual_seed(last)
    pre = (torch.randn(1, ids.shape[1], 10, generator=generator) + 1).to(dtype)
    options = {"segments": ids.to(DEVICE), "bands": ((1, 3), (4, 15), (16, last))}
    for activation in ("relu", "gelu") if dtype != torch.float16 else ("identity",):
        agrees(pre, activation=activation, rtol=max(RTOL[dtype], 2e-5), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [127, 1023])
def test_gradients_of_one_long_run_cuda(last, dtype):
    """A third window that slides, and one that covers the run: its sum comes from the forward pass or is read again."""
    generator = torch.Generator().manual_seed(last)
    pre = (torch.randn(1, 1024, 66, generator=generator) + 2).to(dtype)
    agrees(pre, activation="relu", bands=((1, 3), (4, 15), (16, last)))


def gradient_of_differences(h, coefficients, backend, total=None):
    """h: [1, T, k], coefficients: [3, k], total: [1, k]."""
    T = h.shape[1]
    bands = [1, 3, 4, 15, 16, T - 1]
    operator = torch.ops.tsae_kernels.activate_with_stats_backward
    grad, _ = operator(h, None, None, coefficients[None], None, None, "identity", bands, None, backend, total)
    return grad


@pytest.mark.parametrize("T", [100, 128, 2000])
@pytest.mark.parametrize("kind", ["level", "ramp", "walk", "spike"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_awkward_features_with_and_without_their_sum_cuda(dtype, kind, T):
    generator = torch.Generator().manual_seed(0)
    noise, time = torch.randn(1, T, 20, generator=generator), torch.arange(float(T))[:, None]
    h = {
        "level": (noise + 1e3) if dtype == torch.float32 else (256 + 4 * noise),
        "ramp": (0.37 * time).expand(1, T, 20),
        "walk": noise.cumsum(1),
        "spike": 0.01 * noise + 1e3 * (time == 67),
    }[kind].to(dtype)
    h = h.to(DEVICE)
    coefficients = torch.rand(3, 20, generator=generator).to(DEVICE)
    wanted = gradient_of_differences(h, coefficients, "reference")
    for total in (None, h.float().sum(1)):
        got = gradient_of_differences(h, coefficients, "cuda", total)
        # A ramp's gradient is much smaller than the sums that it is a difference of.
        rtol = {torch.float32: 5e-5 if kind in ("ramp", "walk") else 1e-5, torch.bfloat16: 8e-3}[dtype]
        checks.assert_as_reference([got], [wanted], rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [60, 128, 1000])
def test_a_constant_has_no_gradient_cuda(dtype, T):
    h = torch.tensor([3.3, -700.0, 1e-3, 0.0]).to(dtype).expand(1, T, 4).contiguous().to(DEVICE)
    coefficients = torch.rand(3, 4).to(DEVICE)
    for total in (None, h.float().sum(1)):
        grad = gradient_of_differences(h, coefficients, "cuda", total)
        if total is None or dtype != torch.float16:  # float32's sum of 1,000 of the last numbers is rounded
            assert (grad == 0).all()


@pytest.mark.parametrize("given", [False, True])
def test_the_sum_is_used_only_where_it_is_the_runs_cuda(given):
    """A wrong sum shows where it is used: 16 bits, one run, the third band over all of it."""
    pre, segments = torch.randn(1, 40, 4).to(DEVICE), torch.zeros(1, 40, dtype=torch.int64).to(DEVICE)
    operator = torch.ops.tsae_kernels.activate_with_stats_backward

    def grad(dtype, bands, ids):
        total = torch.full((1, 4), 1e3, device=DEVICE) if given else None
        weights = torch.ones(1, 3, 4, device=DEVICE)
        return operator(pre.to(dtype), None, None, weights, None, None, "relu", bands, ids, "cuda", total)[0]

    used = grad(torch.bfloat16, [1, 3, 4, 15, 16, 39], None)
    rest = [grad(torch.bfloat16, [1, 3, 4, 15, 16, bound], ids) for bound, ids in ((39, segments), (20, None))]
    rest.append(grad(torch.float32, [1, 3, 4, 15, 16, 39], None))
    assert (used.abs().max() > 900) == given
    assert all(x.abs().max() < 900 for x in rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_run_and_feature_cuda(value, dtype):
    pre = torch.randn(1, 120, 6).to(dtype)
    broken = pre.clone()
    broken[0, 50, 2] = value
    segments = (torch.arange(120) // 40)[None].to(DEVICE)
    coefficients = torch.rand(3, 6).to(DEVICE)
    operator = torch.ops.tsae_kernels.activate_with_stats_backward
    clean, found = (
        operator(
            h.to(DEVICE), None, h.to(DEVICE), coefficients[None], None, None, "identity", [1, 3, 4, 15, 16, 119],
            segments, "cuda",
        )[0]
        for h in (pre, broken)
    )  # fmt: skip
    assert not found[0, 50:80, 2].isfinite().any()
    found[0, 40:80, 2] = clean[0, 40:80, 2]
    torch.testing.assert_close(found, clean)  # the other feature of the thread is computed in another way


def test_gradients_up_to_the_end_of_the_range_cuda():
    """Sums of features and gradients are beyond the range, the results are not."""
    h = torch.where(torch.arange(128) % 2 == 0, 3e38, 2.9e38)[None, :, None].expand(1, 128, 4).bfloat16()
    h = h.contiguous().to(DEVICE)
    coefficients = torch.full((3, 4), 1e-3, device=DEVICE)
    got, wanted = (gradient_of_differences(h, coefficients, name, None) for name in ("cuda", "reference"))
    assert wanted.isfinite().all()
    checks.assert_as_reference([got], [wanted], 8e-3)
    again = gradient_of_differences(h, coefficients, "cuda", h.float().sum(1))
    checks.assert_as_reference([again], [wanted], 8e-3)


@pytest.mark.parametrize("T", [640, 2000])
def test_windows_do_not_drift_over_a_long_walk_cuda(T):
    walk = torch.randn(1, T, 8, generator=torch.Generator().manual_seed(1)).cumsum(1)
    walk = walk.to(torch.bfloat16 if T == 640 else torch.float32).to(DEVICE)
    got, wanted = (temporal_stats(walk, backend=name).differences for name in ("cuda", "reference"))
    torch.testing.assert_close(got, wanted, rtol=5e-5, atol=0)


@pytest.mark.parametrize("kind", ["mean", "walk", "ramp", "spike", "rare spike", "constant", "period 8", "early"])
@pytest.mark.parametrize("T", [128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_awkward_features_cuda(dtype, kind, T):
    generator = torch.Generator().manual_seed(0)
    noise, time = torch.randn(2, T, 20, generator=generator), torch.arange(float(T))[:, None]
    h = {
        "mean": noise + 1e3,
        "walk": noise.cumsum(1),
        "ramp": (0.37 * time).expand(2, T, 20),
        "spike": 0.01 * noise + 1e3 * (time == 64),  # on the grid of positions that the centre is computed from,
        "rare spike": 0.01 * noise + 1e3 * (time == 67),  # and off it
        "constant": torch.full((2, T, 20), 3.3),
        "period 8": noise + 1e3 * (time % 8 == 0),  # all of these positions are far from the mean
        "early": noise * torch.where(time < 16, 1.0, 2e-4),
    }[kind].to(DEVICE, dtype)
    got, reference = (temporal_stats(h, backend=name) for name in ("cuda", "reference"))
    # The window's sum over a ramp grows with T, and its rounding with it (docs/mathematics.md, section 4).
    # Groups of rows take differences after the products (docs/kernels.md).
    rtol = 5e-5 if kind == "ramp" or (kind == "early" and dtype == torch.bfloat16) else 1e-5
    for ours, wanted in zip(got, reference, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("bands", [MULTISCALE, ((2, 9),)])
def test_nan_is_seen_in_its_feature_alone_cuda(bands):
    h = torch.randn(1, 40, 4)
    h[0, 7, 2] = float("nan")
    stats = temporal_stats(h.to(DEVICE), bands, backend="cuda")
    for s in stats:
        assert s[..., 2].isnan().all()
        assert s[..., [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bands", [MULTISCALE, ()])
def test_every_16_bit_number_converts_as_in_torch_cuda(dtype, bands):
    checks.check_16_bit_conversions(dtype, "cuda", DEVICE, bands)


@pytest.mark.parametrize("k", [2, 33, 66])
def test_two_runs_give_the_same_bits_cuda(k):
    pre, bias = torch.randn(3, 150, k).to(DEVICE), torch.randn(k).to(DEVICE)
    segments = oracle.random_segments(3, 150).to(DEVICE)
    first, second = (
        [*everything(pre, bias, segments, backend="cuda", **SCHMITT), *checks.window_loss(pre, 4, segments, "cuda")]
        for _ in range(2)
    )
    assert_same_bits(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [33, 66])
def test_statistics_are_the_same_bits_with_the_activation_and_alone_cuda(dtype, k):
    pre = torch.randn(2, 150, k).to(dtype).to(DEVICE)
    for segments in (None, oracle.random_segments(2, 150, longest=100).to(DEVICE)):
        h, stats = activate_with_stats(pre, None, "relu", 0.4, 0.1, segments=segments, backend="cuda")
        alone = temporal_stats(h, segments=segments, backend="cuda")
        assert_same_bits(stats, alone)


@pytest.mark.parametrize("shape", [(2, 9, 5), (1, 130, 64), (3, 40, 130)])
@pytest.mark.parametrize("bands", [MULTISCALE, ((1, 7),)])
def test_every_output_is_written_cuda(shape, bands):
    pre, bias = torch.randn(shape).to(DEVICE), torch.randn(shape[2]).to(DEVICE)
    segments = oracle.random_segments(*shape[:2])
    segments[0] = -1
    checks.check_every_output_is_written(pre, bias, segments.to(DEVICE), "cuda", bands=bands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "schmitt"])
def test_strided_and_unaligned_features_give_the_same_bits_cuda(dtype, activation):
    base = torch.randn(3, 40, 3, 72).to(dtype).to(DEVICE)
    x = base[:, :, 1]
    unaligned = [base[:, :, 0, begin : begin + 66] for begin in (1, 2, 4)]  # rows that begin at any address
    views = [x, x.transpose(0, 1).contiguous().transpose(0, 1), *unaligned]
    checks.check_strides(views, "cuda", **ACTIVATIONS[activation])
    grads = (
        torch.full((), 0.3, dtype=dtype, device=DEVICE).expand(x.shape),
        torch.randn(3, 40, 1).to(x).expand(x.shape),
        torch.randn(72, 40, 3).to(x).permute(2, 1, 0),
        torch.randn(3, 40, 73).to(x)[:, :, 1:],
    )
    checks.check_gradient_strides(x, grads, "cuda", **ACTIVATIONS[activation])


@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
@pytest.mark.parametrize("bands", [MULTISCALE, ((1, 2), (5, 9))])
def test_features_without_coefficients_get_no_window_term_cuda(activation, bands):
    """Features of one tile, of several, and all of them; some of the features are infinite."""
    for masked in (range(0, 130, 3), range(64), range(130)):
        masked = list(masked)
        pre = torch.randn(2, 40, 130)
        if activation != "gelu":
            pre[0, 3, masked] = float("inf")
        pre = pre.to(DEVICE).requires_grad_()
        coefficients = torch.rand(2, len(bands), 130, device=DEVICE)
        coefficients[..., masked] = 0
        upstream = torch.randn(2, 40, 130).to(DEVICE)
        h, stats = activate_with_stats(pre, activation=activation, bands=bands, backend="cuda")
        (grad,) = torch.autograd.grad([h, stats.differences], pre, [upstream, coefficients], retain_graph=True)
        (plain,) = torch.autograd.grad(h, pre, upstream)
        assert torch.equal(grad[..., masked], plain[..., masked])
        others = [j for j in range(130) if j not in masked]
        assert not others or not torch.equal(grad[..., others], plain[..., others])


def packed(h):
    """h [B, T, k] -> int32 [B, ceil(T / 32), k]: bit i of word w is 1 if h is not 0 at position 32 w + i."""
    words = -(-h.shape[1] // 32)
    bits = torch.zeros(h.shape[0], 32 * words, h.shape[2], dtype=torch.int64)
    bits[:, : h.shape[1]] = (h != 0).cpu()
    weights = 1 << torch.arange(32)
    return (bits.unflatten(1, (words, 32)) * weights[:, None]).sum(2).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 31, 32, 64, 130, 300])
@pytest.mark.parametrize("k", [66, 128, 7])
def test_the_mask_of_active_features_is_that_of_h_cuda(dtype, T, k):
    generator = torch.Generator().manual_seed(T)
    pre = torch.randn(2, T, k, generator=generator).to(dtype)
    pre[0, T // 2, 3] = float("nan")
    pre[:, :, 1] *= 1e-8  # rounds to 0 in float16
    pre, level = pre.to(DEVICE), torch.full((k,), 0.5, device=DEVICE)
    segments = oracle.random_segments(2, T, generator, longest=90).to(DEVICE)
    per_position = torch.rand(2, T, 1, generator=generator).to(DEVICE)
    bias = torch.full((k,), 1e-9, device=DEVICE)
    for options in ((None, None, None), (bias, None, None), (bias, level, 0.3 * level), (None, per_position, None)):
        for bands in (MULTISCALE, ((1, 7),)):
            for ids in (None, segments):
                activation = Activation("relu", *options)
                backend = get_backend("cuda")
                active, *stats = backend.activate_with_mask(pre, activation, bands, ids)
                h, *wanted = backend.activate_with_stats(pre, activation, bands, ids)
                assert active.dtype == torch.int32
                assert torch.equal(active.cpu(), packed(h))
                for ours, right in zip(stats, wanted, strict=True):
                    torch.testing.assert_close(ours, right, rtol=0, atol=0, equal_nan=True)


COUNTED = {  # activation, threshold, release
    "identity": ("identity", None, None),
    "gelu": ("gelu", None, None),
    "relu": ("relu", None, None),
    "threshold": ("relu", 0.6, None),
    "per position": ("relu", "random", None),
    "trigger": ("relu", 0.6, 0.1),
    "trigger, per position": ("relu", "random", 0.1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize(("T", "k"), [(1, 66), (16, 66), (45, 7), (128, 66), (512, 66)])
def test_kernels_that_count_transitions_cuda(dtype, case, T, k):
    """With h, with the mask, and of h alone; the rest of the results has the bits that it has without counts."""
    generator = torch.Generator().manual_seed(T)
    pre = torch.randn(2, T, k, generator=generator).to(dtype)
    pre[0, T // 2, 3] = float("nan")
    pre[:, :, 1] *= 1e-8  # rounds to 0 in float16
    pre, bias = pre.to(DEVICE), torch.full((k,), 1e-9, device=DEVICE)
    per_position = torch.rand(2, T, 1, generator=generator).to(DEVICE)
    name, *levels = COUNTED[case]
    threshold, release = (
        per_position if level == "random" else None if level is None else torch.full((k,), level, device=DEVICE)
        for level in levels
    )
    activation, backend = Activation(name, bias, threshold, release), get_backend("cuda")

    def assert_same(results, others):  # also where both are NaN
        assert_same_bits(*([x.contiguous().view(torch.uint8) for x in each] for each in (results, others)))

    for ids in (None, oracle.random_segments(2, T, generator, longest=60).to(DEVICE)):
        for bands in (MULTISCALE, ((1, 3), (4, 15)), ((2, 7), (9, 40))):
            plain = backend.activate_with_stats(pre, activation, bands, ids)
            *counted, counts = backend.activate_with_stats(pre, activation, bands, ids, True)
            assert_same(plain, counted)
            assert counts.dtype == torch.int32
            wanted = get_backend("reference").temporal_stats(plain[0], (), ids, True)[-1]
            assert torch.equal(counts, wanted)
            *alone, counts = backend.temporal_stats(plain[0], bands, ids, True)
            assert_same(plain[1:], alone)
            assert torch.equal(counts, wanted)
            if name == "relu":
                *masked, counts = backend.activate_with_mask(pre, activation, bands, ids, True)
                assert_same(backend.activate_with_mask(pre, activation, bands, ids), masked)
                assert torch.equal(counts, wanted)


@pytest.mark.parametrize("name", ["identity", "gelu", "relu"])
def test_transitions_are_counted_without_a_second_pass_cuda(name):
    """One operator gives all results; no other reads the features."""
    pre, backend, called = torch.randn(2, 40, 66).to(DEVICE), get_backend("cuda"), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function).split(".")[1])
            return function(*args, **(kwargs or {}))

    with Record():
        backend.activate_with_stats(pre, Activation(name), MULTISCALE, None, True)
        backend.temporal_stats(pre, MULTISCALE, None, True)
        if name == "relu":
            backend.activate_with_mask(pre, Activation(name), MULTISCALE, None, True)
    assert called == ["forward_counted", "forward_counted", "forward_with_mask_counted"][: 3 if name == "relu" else 2]


@pytest.mark.parametrize("T", [2**16, 2**16 + 1])
def test_transitions_of_features_that_never_change_cuda(T):
    """The tuned kernels keep counts in 16 bits, and leave longer sequences to the others."""
    pre = torch.tensor([1.0, 1.0, -1.0, 1.0]).expand(1, T, 4).bfloat16().contiguous()
    pre[0, 1::2, 3] = -1  # on and off in turn
    _, stats = activate_with_stats(pre.to(DEVICE), transitions=True, backend="cuda")
    assert stats.transitions[0].tolist() == [[T - 1, T - 1, 0, 0], [0, 0, 0, T // 2], [0, 0, 0, (T - 1) // 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 30, 31, 35, 36, 37, 48, 50, 127, 129, 143])
def test_runs_of_every_length_at_every_place_of_the_ring_cuda(dtype, length):
    """Several runs of one length, excluded positions between some of them, in sequences longer than the ring."""
    T = 3 * length + 200
    time = torch.arange(T)
    segments = torch.where(time // length % 4 == 3, -1, time // length)[None].contiguous().to(DEVICE)
    pre = torch.randn(1, T, 66, generator=torch.Generator().manual_seed(length)).to(dtype) + 2
    for bands in (MULTISCALE, ((1, 3), (4, 15), (16, 20)), ((1, 3), (4, 15), (16, 10_000)), ((1, 3), (4, 15))):
        agrees(pre, bands=bands, segments=segments, **SCHMITT)
        options = {"segments": segments, "transitions": True, **SCHMITT}
        found, wanted = (activate_with_stats(pre.to(DEVICE), backend=b, **options)[1] for b in ("cuda", "reference"))
        assert torch.equal(found.transitions, wanted.transitions)


def test_the_centre_follows_the_feature_cuda():
    """Steps, ramps and spikes across the places where the centre moves, in float32 against float64."""
    T = 700
    generator, time = torch.Generator().manual_seed(0), torch.arange(float(T))[:, None]
    noise = torch.randn(1, T, 4, generator=generator)
    features = {
        "step": noise + 1e3 * (time >= 200),
        "late spike": 0.01 * noise + 1e3 * (time == 250),
        "on at first": (noise + 5) * (time < 16),
        "mean": noise - 1e3,
        "infinite": torch.where(time == 300, torch.inf, noise),
    }
    for name, h in features.items():
        got, wanted = (temporal_stats(h.to(DEVICE), backend=backend) for backend in ("cuda", "reference"))
        for ours, right in zip(got, wanted, strict=True):
            if name == "infinite":
                assert torch.equal(ours.isinf(), torch.ones_like(ours, dtype=torch.bool)), name
            else:
                # What is left of a window's squares when the level that they were taken from has gone.
                rtol = 1e-4 if name == "on at first" else 2e-5
                torch.testing.assert_close(ours, right, rtol=rtol, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_operators_refuse_out_of_bounds_arguments_cuda():
    ops, nine_bands = get_backend("cuda")._ops, list(range(1, 19))
    too_many = lambda h: (  # noqa: E731
        lambda: ops.forward(h, None, 1, None, None, nine_bands, None, True),
        lambda: ops.backward(h, None, h, None, None, None, 1, nine_bands, None),
    )
    checks.check_refusals(ops, DEVICE, too_many)
    with pytest.raises(RuntimeError, match="at most 8, got 9"):
        temporal_stats(torch.ones(2, 6, 3, device=DEVICE), tuple((i, i) for i in range(1, 10)), backend="cuda")


@pytest.mark.parametrize("bands", [MULTISCALE, ()])
def test_gelu_is_as_accurate_as_in_torch_cuda(bands):
    checks.check_gelu_accuracy(20_000, "cuda", DEVICE, bands)


@on_gpu
def test_it_is_the_default_on_a_gpu_only_cuda():
    assert choose_backend(None, torch.device("cuda")) == "cuda"
    with pytest.raises(ValueError, match="backend='cuda' runs on cuda tensors, got one on cpu"):
        choose_backend("cuda", torch.device("cpu"))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_nothing_waits_for_the_gpu_and_a_graph_can_capture_it_cuda(backend):
    pre, bias = torch.randn(4, 128, 66, device=DEVICE), torch.randn(66, device=DEVICE)
    segments = oracle.random_segments(4, 128).to(DEVICE)
    level = torch.full((66,), 0.6, device=DEVICE)

    def step():
        leaf = pre.detach().requires_grad_()
        h, stats = activate_with_stats(leaf, bias, "relu", level, 0.2 * level, segments=segments, backend=backend)
        loss = temporal_loss_from_stats(stats, count_positions(segments))
        loss = loss + h.sum() + stats.square.sum() + window_consistency(h, 3, segments, backend=backend)
        return h.detach(), loss.detach(), *torch.autograd.grad(loss, leaf)

    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        step()
    torch.cuda.current_stream().wait_stream(other)
    torch.cuda.set_sync_debug_mode("error")
    try:
        wanted = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    pre.copy_(torch.randn_like(pre))
    graph.replay()
    changed = [x.clone() for x in captured]
    assert_same_bits(changed, step())
    assert not torch.equal(changed[0], wanted[0])


@pytest.mark.gpu
@on_gpu
def test_more_than_two_to_the_31_features_cuda():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    h = torch.zeros(8192, 128, 2304, dtype=torch.bfloat16, device=DEVICE)
    h[-1] = torch.randn(128, 2304, device=DEVICE)
    stats = temporal_stats(h, backend="cuda")
    alone = temporal_stats(h[-1:].clone(), backend="cuda")
    assert_same_bits([s[-1:] for s in stats], alone)
    assert (stats.square[:-1] == 0).all()
