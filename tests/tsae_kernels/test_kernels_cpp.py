"""What the compiled CPU backend promises beyond the results that all backends share."""

import kernels_oracle as oracle
import pytest
import torch
from compiled_checks import EIGHT_BANDS, assert_as_reference, everything

from tsae_kernels import activate_with_stats, available_backends, temporal_stats, window_consistency
from tsae_kernels.backends.extension import load_library
from tsae_kernels.backends.registry import choose_backend

pytestmark = pytest.mark.skipif(bool(load_library().error), reason=load_library().error)


@pytest.mark.parametrize("activation", ["relu", "gelu", "identity", "schmitt"])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("k", [5, 97])
def test_eight_bands_and_every_gradient(activation, segmented, shared, k):
    generator = torch.Generator().manual_seed(k)
    pre, bias = torch.randn(3, 150, k, generator=generator), torch.randn(k, generator=generator)
    options = {"activation": activation, "bands": EIGHT_BANDS, "shared": shared}
    if activation == "schmitt":
        options |= {"activation": "relu", "threshold": 0.8, "release": 0.2}
    if segmented:
        options["segments"] = oracle.random_segments(3, 150, generator)
    reference = everything(pre, bias, backend="reference", **options)
    assert_as_reference(everything(pre, bias, backend="cpp", **options), reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_long_sequences(dtype):
    generator = torch.Generator().manual_seed(0)
    pre = (torch.randn(1, 4096, 70, generator=generator) + 3).to(dtype)
    segments = torch.where(torch.arange(4096) < 4000, 0, 1)[None]
    bands = ((1, 3), (4, 15), (16, 127))
    rtol = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for ids in (None, segments):
        reference = everything(pre, segments=ids, bands=bands, backend="reference")
        results = everything(pre, segments=ids, bands=bands, backend="cpp")
        assert_as_reference(results[1:4], reference[1:4], min(rtol, 1e-5))
        assert_as_reference(results, reference, rtol)


@pytest.mark.parametrize("reach", [1, 2, 31, 32, 63, 64, 95, 96, 127, 300])
def test_rings_of_every_size(reach):
    """A ring that is one row too short for the widest window gives wrong sums once it has gone round."""
    generator = torch.Generator().manual_seed(reach)
    pre = torch.randn(1, 700, 3, generator=generator)
    ids = torch.where(torch.arange(700) < 610, 0, 1)[None]
    for bands in (((1, reach),), ((reach, reach),)):
        reference = everything(pre, segments=ids, bands=bands, backend="reference")
        assert_as_reference(everything(pre, segments=ids, bands=bands, backend="cpp"), reference)


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
    """Each has a loop of its own. Segments end within a block, with one, and before a band begins."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(2, 700, 70, generator=generator) + 2
    ends = torch.tensor([[3, 64, 67, 130, 192, 250, 256, 640]])
    ids = (torch.arange(700)[:, None] >= ends).sum(1).repeat(2, 1)
    ids[1] = 0
    reference = everything(pre, segments=ids, bands=bands, backend="reference")
    assert_as_reference(everything(pre, segments=ids, bands=bands, backend="cpp"), reference)


def test_features_that_go_in_step_get_what_they_get_alone():
    """Long sequences are walked a few tiles of features at a time, which share the scratch memory."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(2, 700, 450, generator=generator)
    ids = (torch.rand(2, 700, generator=generator) < 0.01).long().cumsum(1)
    ids[0, 100:300] = -1
    h, stats = activate_with_stats(pre, threshold=0.1, release=0.05, segments=ids, backend="cpp")
    for begin in range(0, 450, 50):
        part = pre[..., begin : begin + 50].contiguous()
        h_part, alone = activate_with_stats(part, threshold=0.1, release=0.05, segments=ids, backend="cpp")
        assert torch.equal(h[..., begin : begin + 50], h_part)
        for whole, one in zip(stats, alone, strict=True):
            assert torch.equal(whole[..., begin : begin + 50], one)
    everywhere = everything(pre, segments=ids, backend="cpp")
    reference = everything(pre, segments=ids, backend="reference")
    assert_as_reference(everywhere, reference)


def test_windows_do_not_drift_over_a_long_walk():
    walk = torch.randn(1, 4096, 8, generator=torch.Generator().manual_seed(1)).cumsum(1)
    got = temporal_stats(walk, backend="cpp").differences
    rtol = 1e-4 if load_library().selected == "baseline" else 5e-5  # no fused multiply-add
    torch.testing.assert_close(got, temporal_stats(walk, backend="reference").differences, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_converts_as_in_torch(dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(dtype).reshape(1, 1, -1)
    out, _ = activate_with_stats(x, activation="identity", backend="cpp")
    assert torch.equal(out.view(torch.int16)[~x.isnan()], x.view(torch.int16)[~x.isnan()])
    assert out[x.isnan()].isnan().all()
    # Rounding: with a bias come values that the dtype cannot hold, of every size.
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.randint(-9, 5, bits.shape, generator=generator)
    bias = torch.randn(x.shape[2], generator=generator) * scale
    out, _ = activate_with_stats(x, bias, "identity", backend="cpp")
    torch.testing.assert_close(out, (x.float() + bias).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [1, 33, 320])
def test_two_runs_and_any_number_of_threads_give_the_same_bits(k):
    pre, bias = torch.randn(5, 200, k), torch.randn(k)
    segments = oracle.random_segments(5, 200)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 2, 3):
            torch.set_num_threads(number)
            run = everything(pre, bias, segments, threshold=0.6, release=0.1, backend="cpp")
            leaf = pre.clone().requires_grad_()
            loss = window_consistency(leaf, 4, segments, backend="cpp")
            results.append([*run, loss.detach(), *torch.autograd.grad(loss, leaf)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(2, 9, 5), (1, 130, 64), (3, 600, 1024)])  # the last is written past the caches
def test_every_output_is_written(shape):
    """With deterministic algorithms PyTorch fills what it allocates with NaN."""
    pre, bias = torch.randn(shape), torch.randn(shape[2])
    segments = oracle.random_segments(*shape[:2])
    segments[0] = -1
    clean = everything(pre, bias, segments, backend="cpp")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        poisoned = everything(pre, bias, segments, backend="cpp")
        leaf = pre.clone().requires_grad_()
        loss = window_consistency(leaf, 3, segments, backend="cpp")
        (grad,) = torch.autograd.grad(loss, leaf)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_strided_features_and_gradients_give_the_same_bits():
    base = torch.randn(4, 40, 3, 50)
    wanted = everything(base[:, :, 1].contiguous(), backend="cpp")
    for view in (base[:, :, 1], base[:, :, 1].transpose(0, 1).contiguous().transpose(0, 1)):
        assert not view.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(everything(view, backend="cpp"), wanted, strict=True))
    x = base[:, :, 1].clone().requires_grad_()
    for grad_h in (
        torch.full((), 0.3).expand(x.shape),
        torch.randn(4, 40, 1).expand(x.shape),
        torch.randn(50, 40, 4).permute(2, 1, 0),
    ):
        grads = [
            torch.autograd.grad(activate_with_stats(x, backend="cpp")[0], x, g)[0]
            for g in (grad_h, grad_h.contiguous())
        ]
        assert torch.equal(*grads)


def test_operators_refuse_what_they_would_read_past():
    ops, h = torch.ops.tsae_kernels_cpp, torch.randn(2, 6, 3)
    calls = (
        lambda: ops.forward(h, torch.zeros(2), 1, None, None, [], None, True),
        lambda: ops.forward(h, None, 1, torch.zeros(2, 5), None, [], None, True),
        lambda: ops.forward(h, None, 7, None, None, [], None, True),
        lambda: ops.forward(h, None, 1, None, None, [0, 3], None, True),
        lambda: ops.forward(h, None, 1, None, None, [1, 3], torch.zeros(2, 5).long(), True),
        lambda: ops.forward(h[:, :0], None, 1, None, None, [1, 3], None, True),
        lambda: ops.backward(h, None, h[:1], None, None, None, 1, [1, 3], None),
        lambda: ops.backward(h, None, h, torch.zeros(1, 2, 3), None, None, 1, [1, 3], None),
        lambda: ops.step_energy(h, torch.zeros(2, 6).double()),
        lambda: ops.step_energy_backward(h, torch.zeros(2, 6), torch.zeros(())),
    )
    for call in calls:
        with pytest.raises(RuntimeError):
            call()


def test_gelu_is_as_accurate_as_in_torch():
    tails = torch.tensor([0.0, -0.0, 60.0, -60.0, 1e30, -1e30, 3e38, -3e38])
    z = torch.cat([torch.linspace(-14, 14, 100_001), tails]).reshape(1, 1, -1)

    def error(function, x=z):
        x = x.clone().requires_grad_()
        out = function(x)
        exact = z.double().requires_grad_()
        wanted = torch.nn.functional.gelu(exact)
        (grad,), (wanted_grad,) = torch.autograd.grad(out.sum(), x), torch.autograd.grad(wanted.sum(), exact)
        scale = z.abs().clamp_min(1)
        return ((out - wanted).abs() / scale).max(), (grad - wanted_grad).abs().max()

    of_torch = error(torch.nn.functional.gelu)
    of_cpp = error(lambda x: activate_with_stats(x, activation="gelu", backend="cpp")[0])
    assert all(ours <= 2 * theirs for ours, theirs in zip(of_cpp, of_torch, strict=True))


def test_it_is_the_default_on_a_cpu_only():
    assert available_backends()["cpp"] == "ok"
    assert choose_backend(None, torch.device("cpu")) == "cpp"
    with pytest.raises(ValueError, match="backend='cpp' runs on cpu tensors, got one on meta"):
        choose_backend("cpp", torch.device("meta"))
