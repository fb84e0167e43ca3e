"""The walks along T: every backend against a copy and against PyTorch (`eager`).

On a CPU with [16, 128, 2304] float32 features, on a GPU with [2048, 128, 2304] bfloat16 features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import device_name
from benchmarks.measure import Call, Variant, compare
from benchmarks.results import Measurement
from benchmarks.workload import BOTH, backends
from tsae_kernels import leaky_recurrence, viterbi_path

pytestmark = pytest.mark.timeout(1200)

Find = Callable[[str], Measurement]
PATH, LEAKY = "viterbi path, forward", f"leaky recurrence, {BOTH}"
WIDTH, LENGTH, COPY = 2304, 128, "h.clone()"
ROTATION = 4


class Scans:
    """Rotating inputs [B, T, k], costs of about 7 bits to switch on and 1 to stay, and decays of 0.5 to 0.999."""

    def __init__(self, device: torch.device, smoke: bool) -> None:
        batch = 2048 if device.type == "cuda" and not smoke else 16
        self.shape = (batch, 16, 32) if smoke else (batch, LENGTH, WIDTH)
        self.dtype, k = torch.float32 if device.type == "cpu" else torch.bfloat16, self.shape[2]
        generator = torch.Generator(device).manual_seed(0)
        self.device, self.smoke = device, smoke
        rotation = ROTATION if device.type == "cpu" else 2  # a GPU's inputs exceed its caches anyway
        self.x, self.grad = (
            [torch.randn(self.shape, generator=generator, device=device).to(self.dtype) for _ in range(rotation)]
            for _ in range(2)
        )
        costs = torch.tensor([[0.01, 7.0], [1.2, 0.8]], device=device)
        self.transition = 0.3 * costs[..., None].expand(2, 2, k).contiguous()
        self.decay = torch.linspace(0.5, 0.999, k, device=device)

    def path(self, name: str) -> Callable[[int], Tensor]:
        return lambda i: viterbi_path(self.x[i % len(self.x)], self.transition, self.transition[0], backend=name)

    def leaky(self, name: str) -> Callable[[int], tuple[Tensor, ...]]:
        def call(i: int) -> tuple[Tensor, ...]:
            a = self.x[i % len(self.x)].detach().requires_grad_(True)
            decay = self.decay.detach().requires_grad_(True)
            h = leaky_recurrence(a, decay, backend=name)
            return h.detach(), *torch.autograd.grad(h, (a, decay), self.grad[i % len(self.grad)])

        return call

    def measure(self, benchmark: Any, case: str, make: Callable[[str], Call], count: int) -> Measurement:
        """`count`: bytes of the variants. The default backend is the last."""
        names = backends(self.device)
        copied = Variant(COPY, "copy", lambda i: self.x[i % len(self.x)].clone(), 2 * self.x[0].nbytes)
        variants = [copied, *(Variant(name, "backend", make(name), count) for name in names)]
        timings = compare(benchmark, variants[-1], variants[:-1], self.device, rounds=2 if self.smoke else 21)
        dtype = str(self.dtype).removeprefix("torch.")
        shape, size = list(self.shape), self.x[0].nbytes
        measurement = Measurement(case, names[-1], device_name(self.device), shape, dtype, size)
        measurement.add(variants, timings)
        return measurement


@pytest.fixture(scope="module")
def scans(device: torch.device, smoke: bool) -> Scans:
    return Scans(device, smoke)


def test_viterbi_path(benchmark: Any, record: Callable[[Measurement], None], scans: Scans) -> None:
    """Bytes: z in, the mask out."""
    masks = [scans.path(name)(0) for name in backends(scans.device)]
    assert all((mask != masks[0]).double().mean() < 1e-5 for mask in masks)  # costs that are equal but for rounding
    record(scans.measure(benchmark, PATH, scans.path, scans.x[0].nbytes + scans.x[0].numel()))


def test_leaky_recurrence(benchmark: Any, record: Callable[[Measurement], None], scans: Scans) -> None:
    """Bytes: a in and h out; the gradient of h, a and h in, the gradient of a out."""
    tolerance = 1e-4 if scans.dtype == torch.float32 else 2e-2
    results = [scans.leaky(name)(0) for name in backends(scans.device)]
    for found in results[1:]:
        for ours, wanted in zip(found, results[0], strict=True):
            scale = wanted.abs().max().item()
            torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance * scale)
    record(scans.measure(benchmark, LEAKY, scans.leaky, 6 * scans.x[0].nbytes))


@pytest.mark.parametrize("case", [PATH, LEAKY])
def test_bar_faster_than_eager(measured: Find, case: str) -> None:
    """The default backend, where it is another one."""
    m = measured(case)
    if m.own == "eager":
        pytest.skip("no other backend is available")
    factor = m.seconds("eager") / m.seconds(m.own)
    assert factor > 1, f"{case}: {factor:.2f} times as fast as eager"
