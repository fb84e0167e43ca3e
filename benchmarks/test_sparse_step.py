"""The sparse training step and each of its kernels on a GPU: against the dense step, the encoder's product and a copy.

d = 2304, 16,384 tokens, about 40 of 16,384 or 65,536 features active, bfloat16, Schmitt trigger and temporal loss,
without the optimizer. On a CPU the cases run in smoke mode only. `sparse_model.py` has the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import sparse_model
from benchmarks.conftest import device_name
from benchmarks.measure import Variant, compare
from benchmarks.results import Measurement
from tsae_kernels import MULTISCALE, activate_with_stats
from tsae_kernels.backends.registry import choose_backend
from tsae_kernels.bands import flatten_bands
from tsae_kernels.sparse_features import SparseFeatures, decode_sparse_features, encode_sparse, squared_errors
from tsae_kernels.sparse_ops import Entries, backend_for_lists
from tsae_kernels.sparse_weights import DeferredGradients, weight_gradients

pytestmark = pytest.mark.timeout(1200)

WIDTHS = (16_384, 65_536)
SPARSE, DENSE, PRODUCT, COPY = "sparse step", "dense step", "x W_enc", "h.clone()"
WITHIN_FLOOR = 1.3
_ops = torch.ops.tsae_kernels


class Problem:
    """Activations with lag-1 correlation 0.7, weights of unit-norm features, and thresholds for the wanted L0."""

    def __init__(self, step: sparse_model.Step, device: torch.device, dtype: torch.dtype) -> None:
        self.step, self.device, self.dtype = step, device, dtype
        generator = torch.Generator().manual_seed(0)
        B = step.tokens // step.length
        x = torch.randn(B, step.length, step.d, generator=generator)
        for t in range(1, step.length):
            x[:, t] = 0.7 * x[:, t - 1] + (1 - 0.7**2) ** 0.5 * x[:, t]
        weight = torch.randn(step.features, step.d, generator=generator)
        weight /= weight.norm(dim=1, keepdim=True)
        self.x = x.to(device, dtype)
        self.W_enc, self.W_dec = (weight.to(device, dtype).clone().requires_grad_() for _ in range(2))  # [k, d]
        self.b_enc = torch.zeros(step.features, device=device, requires_grad=True)
        self.segments = torch.zeros(B, step.length, dtype=torch.int32, device=device)
        self.weights = torch.tensor((0.01, 0.005, 0.001), device=device)[None, :, None]
        self.threshold, self.release = self._levels()

    @torch.no_grad()
    def _levels(self) -> tuple[Tensor, Tensor]:
        """The threshold at which, with a release of 0.3 of it, `active` features are on; by bisection."""
        pre = self.x[:8] @ self.W_enc.T
        low, high = 0.0, float(pre.max())
        for _ in range(20):
            middle = (low + high) / 2
            h, _ = activate_with_stats(pre, None, "relu", middle, 0.3 * middle, ((1, 1),))
            if (h != 0).sum() / h[..., 0].numel() > self.step.active:
                low = middle
            else:
                high = middle
        return torch.tensor(high, device=self.device), torch.tensor(0.3 * high, device=self.device)

    def loss(self, xhat: Tensor, differences: Tensor) -> Tensor:
        return squared_errors(self.x.flatten(0, 1), xhat).mean() + (differences * self.weights).sum() / self.step.tokens

    def encode(self, deferred: DeferredGradients | None = None) -> tuple[SparseFeatures, Any]:
        arguments = self.threshold, self.release, MULTISCALE, self.segments
        capacity = self.step.capacity
        return encode_sparse(self.x, self.W_enc.T, self.b_enc, *arguments, capacity=capacity, deferred=deferred)

    def sparse(self) -> list[Tensor]:
        """One step: rows of the gradients of W_enc and W_dec, the gradient of b_enc, and which features fired."""
        deferred = DeferredGradients()
        features, stats = self.encode(deferred)
        xhat = decode_sparse_features(features, self.W_dec, deferred=deferred)
        self.loss(xhat, stats.differences).backward()
        return list(weight_gradients(deferred)[:4])

    def dense(self) -> list[Tensor]:
        """The gradients of W_enc, W_dec and b_enc."""
        pre = self.x @ self.W_enc.T
        arguments = self.threshold, self.release, MULTISCALE, self.segments
        h, stats = activate_with_stats(pre, self.b_enc, "relu", *arguments)
        loss = self.loss(h.flatten(0, 1) @ self.W_dec, stats.differences)
        return list(torch.autograd.grad(loss, (self.W_enc, self.W_dec, self.b_enc)))

    def check(self) -> float:
        """Require the gradients of both steps to agree; returns the mean number of active features."""
        features, _ = self.encode()
        assert not features.overflow, f"a token has more than {self.step.capacity} active features"
        *rows, fired = self.sparse()
        for got, wanted in zip(rows, self.dense(), strict=True):
            got = torch.where(fired if got.dim() == 1 else fired[:, None], got, 0).double()
            error = (got - wanted.double()).norm() / wanted.double().norm()
            assert error < (2e-2 if self.dtype == torch.bfloat16 else 1e-4), f"the gradients differ by {error:.1e}"
        return features.counts.float().mean().item()

    def errors(self, xhat: Tensor) -> Callable[[], object]:
        """The reconstruction error and its gradient, with b_dec."""
        b_dec = torch.zeros(self.step.d, device=self.device, dtype=self.dtype)
        x, ones = self.x.flatten(0, 1), torch.ones(self.step.tokens, device=self.device)
        chosen = backend_for_lists(choose_backend(None, self.device))

        def call() -> tuple[Tensor, Tensor]:
            shifted = xhat + b_dec
            error = _ops.squared_errors(x, shifted, chosen)
            return error, _ops.squared_errors_backward(x, shifted, ones, chosen).sum(0)

        return call

    def product(self) -> Tensor:
        with torch.no_grad():
            return self.x @ self.W_enc.T

    @torch.no_grad()
    def kernels(self) -> dict[str, Callable[[], object]]:
        """Each kernel of the step on inputs made once, by the names of `sparse_model.kernels`."""
        chosen = choose_backend(None, self.device)
        lists, step, k = backend_for_lists(chosen), self.step, self.step.features
        pre = self.product()
        arguments = self.b_enc.detach(), self.threshold, self.release, flatten_bands(MULTISCALE), self.segments, chosen
        active, *_ = _ops.activate_with_mask(pre, *arguments)
        values, indices, counts = _ops.sparse_compress(active, pre, self.b_enc.detach(), step.capacity, lists)
        weight, grad = self.W_dec.detach(), torch.randn(1, step.tokens, step.d, device=self.device).to(self.dtype)
        entries = Entries(*_ops.sparse_sort_entries(indices, values, k, lists))
        differences = self.weights.expand(len(self.segments), -1, k)
        by_feature = entries.values, entries.order, entries.features, entries.tokens, k
        of_stats = values, differences, None, None, flatten_bands(MULTISCALE), self.segments, step.length, lists
        grad_pre = _ops.sparse_stats_backward(*by_feature, *of_stats)
        rows = entries.features, entries.tokens, entries.offsets, grad_pre, self.x.flatten(0, 1), entries.values, grad
        part = functools.partial
        return {
            PRODUCT: self.product,
            "activation, statistics, mask": part(_ops.activate_with_mask, pre, *arguments),
            "lists": part(_ops.sparse_compress, active, pre, self.b_enc.detach(), step.capacity, lists),
            "decoder": part(_ops.sparse_decode, values, indices, counts, weight, [k], self.dtype, lists),
            "reconstruction error": self.errors(grad[0]),
            "gradient of values": part(
                _ops.sparse_decode_backward, grad, indices, counts, weight, [k], self.dtype, lists
            ),
            "order by feature": part(_ops.sparse_sort_entries, indices, values, k, lists),
            "gradient of statistics": part(_ops.sparse_stats_backward, *by_feature, *of_stats),
            "gradients of weights": part(_ops.sparse_weight_gradients, *rows, None, [k], False, lists),
        }


@pytest.fixture(scope="module")
def make_problem(smoke: bool, device: torch.device) -> Callable[[int], Problem]:
    """A problem for a dictionary's width; only the latest is kept."""
    if device.type == "cpu" and not smoke:
        pytest.skip("the sparse step is for GPUs; on a CPU it runs in smoke mode only (TSAE_BENCH_SMOKE=1)")
    kept: dict[int, Problem] = {}

    def make(features: int) -> Problem:
        if features not in kept:
            kept.clear()
            step = sparse_model.Step(features=features, capacity=128)
            if smoke:
                step = sparse_model.Step(tokens=32, d=16, features=64, active=5, capacity=64, length=16)
            kept[features] = Problem(step, device, torch.float32 if smoke else torch.bfloat16)
        return kept[features]

    return make


def measure(
    benchmark: Any,
    record: Callable[[Measurement], None],
    case: str,
    problem: Problem,
    variants: list[Variant],
    smoke: bool,
) -> None:
    timings = compare(benchmark, variants[0], variants[1:], problem.device, rounds=2 if smoke else 21)
    step = problem.step
    dtype, shape = str(problem.dtype).removeprefix("torch."), [step.tokens, step.d, step.features]
    size = step.tokens * step.features * problem.dtype.itemsize
    measurement = Measurement(case, variants[0].name, device_name(problem.device), shape, dtype, size)
    measurement.add(variants, timings)
    record(measurement)


def floor_bytes(kernel: sparse_model.Kernel, device: sparse_model.Device = sparse_model.H100) -> int:
    """The model's bytes from memory, and those from the cache as bytes that take memory as long."""
    return int(max(kernel.memory, kernel.l2 * device.memory / device.l2))


@pytest.mark.parametrize("width", WIDTHS)
def test_step(
    benchmark: Any,
    record: Callable[[Measurement], None],
    make_problem: Callable[[int], Problem],
    width: int,
    smoke: bool,
) -> None:
    problem = make_problem(width)
    active = problem.check()
    assert abs(active / problem.step.active - 1) < 0.25, f"{active:.1f} active features per token"
    variants = [
        Variant(SPARSE, "step", lambda i: problem.sparse()),
        Variant(DENSE, "alternative", lambda i: problem.dense()),
        Variant(PRODUCT, "product", lambda i: problem.product()),
    ]
    measure(benchmark, record, f"sparse step, {width} features", problem, variants, smoke)


@pytest.mark.parametrize("width", WIDTHS)
def test_kernels(
    benchmark: Any,
    record: Callable[[Measurement], None],
    make_problem: Callable[[int], Problem],
    width: int,
    smoke: bool,
) -> None:
    """`of copy bandwidth`: what the model's bytes would take at the speed of a copy, relative to the time."""
    problem = make_problem(width)
    model = {kernel.name: kernel for kernel in sparse_model.kernels(problem.step)}
    pre = problem.product()
    variants = [Variant(COPY, "copy", lambda i: pre.clone())]

    def of_any_turn(call: Callable[[], object]) -> Callable[[int], object]:
        return lambda i: call()

    for name, call in problem.kernels().items():
        variants.append(Variant(name, "backend", of_any_turn(call), floor_bytes(model[name])))
    measure(benchmark, record, f"sparse kernels, {width} features", problem, variants, smoke)


@pytest.mark.parametrize(("width", "most"), [(16_384, 3.0), (65_536, 1.8)])
def test_bar_relative_to_the_encoder(measured: Callable[[str], Measurement], width: int, most: float) -> None:
    """With the optimizer's time by the model, which this step leaves out."""
    m = measured(f"sparse step, {width} features")
    adam = sparse_model.kernels(sparse_model.Step(features=width))[-1].seconds(sparse_model.H100)
    ratio = (m.seconds(SPARSE) + adam) / m.seconds(PRODUCT)
    assert ratio <= most, f"{ratio:.2f} times as long as the encoder's product, not {most}"


@pytest.mark.parametrize(("width", "least"), [(16_384, 1.6), (65_536, 2.5)])
def test_bar_faster_than_the_dense_step(measured: Callable[[str], Measurement], width: int, least: float) -> None:
    m = measured(f"sparse step, {width} features")
    factor = m.seconds(DENSE) / m.seconds(SPARSE)
    assert factor >= least, f"{factor:.2f} times faster than the dense step, not {least}"


@pytest.mark.parametrize("width", WIDTHS)
def test_bar_within_the_floor(measured: Callable[[str], Measurement], width: int) -> None:
    """The kernels beside the product together take at most 1.3 times as long as their bytes at the speed of a copy."""
    m = measured(f"sparse kernels, {width} features")
    assert m.copy_seconds is not None
    rows = [row for row in m.of_kind("backend") if row.variant != PRODUCT]
    floor = sum(row.bytes for row in rows) / (2 * m.tensor_bytes / m.copy_seconds)
    taken = sum(row.seconds for row in rows)
    assert taken <= WITHIN_FLOOR * floor, f"{taken / floor:.2f} times the floor, not {WITHIN_FLOOR}"
