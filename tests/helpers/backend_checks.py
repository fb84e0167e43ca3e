"""Checks shared by the tests of the `cpp`, `cuda` and `triton` backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tsae_kernels import MULTISCALE, activate_with_stats, window_consistency

EIGHT_BANDS = ((1, 1), (2, 3), (5, 9), (10, 20), (30, 33), (34, 60), (61, 64), (100, 2000))
SCHMITT = {"activation": "relu", "threshold": 0.8, "release": 0.2}
ACTIVATIONS = {name: {"activation": name} for name in ("relu", "gelu", "identity")} | {"schmitt": SCHMITT}
RTOL = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def everything(
    pre: Tensor,
    bias: Tensor | None = None,
    segments: Tensor | None = None,
    bands: Any = MULTISCALE,
    shared: bool = True,
    **options: Any,
) -> list[Tensor]:
    """Every output and gradient of one call, with incoming gradients for every output.

    shared: the gradient of the differences is the same for every sequence, with stride 0
    """
    generator = torch.Generator().manual_seed(9)
    pre = pre.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    h, stats = activate_with_stats(pre, bias, segments=segments, bands=bands, **options)
    shape = stats.differences.shape
    weights = torch.rand(1 if shared else shape[0], *shape[1:], generator=generator, dtype=stats.square.dtype)
    incoming = [
        torch.randn(h.shape, generator=generator).to(h),
        weights.to(pre.device).expand(shape),
        torch.randn(stats.total.shape, generator=generator).to(stats.total),
        torch.randn(stats.square.shape, generator=generator).to(stats.square),
    ]
    grads = torch.autograd.grad([h, *stats], [x for x in (pre, bias) if x is not None], incoming)
    return [h.detach(), *(s.detach() for s in stats), *grads]


def window_loss(h: Tensor, window: int, segments: Tensor | None, backend: str) -> list[Tensor]:
    """The window loss and its gradient."""
    leaf = h.detach().clone().requires_grad_()
    loss = window_consistency(leaf, window, segments, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


def assert_as_reference(results: list[Tensor], reference: list[Tensor], rtol: float = 1e-5) -> None:
    for got, wanted in zip(results, reference, strict=True):
        assert got.dtype == wanted.dtype
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * scale)


def assert_same_bits(results: Any, others: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def check_against_reference(
    pre: Tensor, backend: str, rtol: float | None = None, stats_rtol: float = 1e-5, **options: Any
) -> None:
    """Every output and gradient; if h is a copy (identity without bias), statistics to `stats_rtol` in any dtype."""
    rtol = rtol or RTOL[pre.dtype]
    results, reference = (everything(pre, backend=name, **options) for name in (backend, "reference"))
    assert_as_reference(results, reference, rtol)
    if options.get("activation") == "identity" and "bias" not in options:
        assert_as_reference(results[1:4], reference[1:4], min(rtol, stats_rtol))


def check_every_output_is_written(pre: Tensor, bias: Tensor, segments: Tensor, backend: str, **options: Any) -> None:
    """With deterministic algorithms PyTorch fills new tensors with NaN. Also, two runs give the same bits."""
    clean = everything(pre, bias, segments, backend=backend, **options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        poisoned = everything(pre, bias, segments, backend=backend, **options)
        window = window_loss(pre, 3, segments, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(clean, poisoned)
    assert all(x.isfinite().all() for x in window)


def check_strides(views: Any, backend: str, **options: Any) -> None:
    """Features of any strides give the bits of contiguous ones."""
    for view in views:
        assert not view.is_contiguous()
        assert_same_bits(
            everything(view, backend=backend, **options), everything(view.contiguous(), backend=backend, **options)
        )


def check_gradient_strides(x: Tensor, grads: Any, backend: str, **options: Any) -> None:
    """Gradients of h of any strides give the bits of contiguous ones. x, grads: [B, T, k]."""
    x = x.detach().clone().requires_grad_()
    for grad_h in grads:
        results = [
            torch.autograd.grad(activate_with_stats(x, backend=backend, **options)[0], x, g)[0]
            for g in (grad_h, grad_h.contiguous())
        ]
        assert torch.equal(*results)


def check_16_bit_conversions(dtype: torch.dtype, backend: str, device: str = "cpu", bands: Any = MULTISCALE) -> None:
    """Every 16-bit number is read and written exactly, and results are rounded as in PyTorch."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).to(device)
    x = bits.view(dtype).reshape(1, 1, -1)
    out, _ = activate_with_stats(x, activation="identity", bands=bands, backend=backend)
    assert torch.equal(out.view(torch.int16)[~x.isnan()], x.view(torch.int16)[~x.isnan()])
    assert out[x.isnan()].isnan().all()
    # With a bias, sums of every magnitude need rounding.
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.randint(-9, 5, bits.shape, generator=generator)
    bias = (torch.randn(x.shape[2], generator=generator) * scale).to(device)
    out, _ = activate_with_stats(x, bias, "identity", bands=bands, backend=backend)
    torch.testing.assert_close(out, (x.float() + bias).to(dtype), rtol=0, atol=0, equal_nan=True)


def check_gelu_accuracy(points: int, backend: str, device: str = "cpu", bands: Any = MULTISCALE) -> None:
    """The errors of gelu and of its gradient are at most twice PyTorch's."""
    tails = torch.tensor([0.0, -0.0, 60.0, -60.0, 1e30, -1e30, 3e38, -3e38])
    z = torch.cat([torch.linspace(-14, 14, points), tails]).reshape(1, 1, -1).to(device)
    exact = z.double().requires_grad_()
    wanted = torch.nn.functional.gelu(exact)
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), exact)

    def errors(function: Any) -> tuple[Tensor, Tensor]:
        x = z.clone().requires_grad_()
        out = function(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
        return ((out - wanted).abs() / z.abs().clamp_min(1)).max(), (grad - wanted_grad).abs().max()

    found = errors(lambda x: activate_with_stats(x, activation="gelu", bands=bands, backend=backend)[0])
    assert all(ours <= 2 * torchs for ours, torchs in zip(found, errors(torch.nn.functional.gelu), strict=True))


def check_refusals(ops: Any, device: str = "cpu", more: Any = lambda h: ()) -> None:
    """The operators refuse tensors and bands that would make them read out of bounds."""
    h = torch.randn(2, 6, 3, device=device)

    def zeros(*shape: int, **options: Any) -> Tensor:
        return torch.zeros(*shape, device=device, **options)

    calls = (
        lambda: ops.forward(h, zeros(2), 1, None, None, [], None, True),
        lambda: ops.forward(h, None, 1, zeros(2, 5), None, [], None, True),
        lambda: ops.forward(h, None, 7, None, None, [], None, True),
        lambda: ops.forward(h, None, 1, None, None, [0, 3], None, True),
        lambda: ops.forward(h, None, 1, None, None, [1, 3], zeros(2, 5, dtype=torch.int64), True),
        lambda: ops.forward(h[:, :0], None, 1, None, None, [1, 3], None, True),
        lambda: ops.backward(h, None, h[:1], None, None, None, 1, [1, 3], None),
        lambda: ops.backward(h, None, h, zeros(1, 2, 3), None, None, 1, [1, 3], None),
        lambda: ops.step_energy(h, zeros(2, 6, dtype=torch.float64)),
        lambda: ops.step_energy_backward(h, zeros(2, 6), zeros(())),
    )
    for call in (*calls, *more(h)):
        with pytest.raises(RuntimeError):
            call()
