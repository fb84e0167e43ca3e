"""Inputs of the kernel benchmarks, and the variants of each case, checked by `gate.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.alternatives import DIFFERENCES, STATES, Output, activation_with_statistics, statistics
from benchmarks.measure import Call, Variant
from tsae_kernels import MULTISCALE, Bands, activate_with_stats, available_backends, temporal_stats

Function = Callable[[Tensor], Output]

BOTH = "forward + backward"
THRESHOLD, RELEASE = 1.0, 0.3
FAR = 100.0
"""Mean of every eighth feature, in standard deviations: a variant that does not centre is inaccurate there."""

DEVICES = {"eager": ("cpu", "cuda"), "cpp": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}
"""Device types to benchmark each backend on; neither `reference` nor Triton's interpreter is made for speed."""


def backends(device: torch.device) -> list[str]:
    """The available backends to benchmark on the device, the fastest last."""
    states = available_backends()
    return [name for name, devices in DEVICES.items() if device.type in devices and states.get(name) == "ok"]


def packed_segments(batch: int, length: int, device: torch.device) -> Tensor:
    """Documents packed into sequences, [B, T] int32: runs of 1 to T positions, 3 to 4 per sequence, at any position."""
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 2.5 / length
    return starts.cumsum(1).to(device, torch.int32)


class Workload:
    """Rotating inputs [B, T, k] and gradients, and variants that run on them.

    The gradient of h is dense, like the decoder's; that of the differences, [S, k], is shared by all rows, like that of
    a temporal loss over the batch; `total` and `square` get none.

    packed: with `packed_segments`; only backends support it, not the alternatives
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        rotation: int,
        bands: Bands = MULTISCALE,
        packed: bool = False,
    ) -> None:
        self.shape, self.dtype, self.device, self.rotation, self.bands = shape, dtype, device, rotation, bands
        generator = torch.Generator(device).manual_seed(0)
        k = shape[2]
        mean = torch.where(torch.arange(k, device=device) % 8 == 0, FAR, 0.0)

        def normal(offset: Tensor | float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) + offset).to(dtype)

        self.pre = [normal(mean).requires_grad_(True) for _ in range(rotation)]
        self.grad_h = [normal() for _ in range(rotation)]
        self.grad_differences = 0.01 * torch.rand(len(bands), k, generator=generator, device=device)
        self.threshold = torch.full((k,), THRESHOLD, device=device)
        self.release = torch.full((k,), RELEASE, device=device)
        self.segments = packed_segments(*shape[:2], device) if packed else None
        self._checked = gate.checked_sequences(shape[0], device)
        self._expected: dict[tuple[str, ...], dict[str, Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Size of h in bytes."""
        return self.pre[0].nbytes

    @property
    def statistics_bytes(self) -> int:
        """Size of the statistics, float32, in bytes."""
        return self.shape[0] * (len(self.bands) + 2) * self.shape[2] * 4

    def copy(self) -> Variant:
        return Variant("h.clone()", "copy", lambda i: self.pre[i % self.rotation].detach().clone(), 2 * self.bytes)

    def levels(self, kind: str) -> tuple[Tensor | None, Tensor | None]:
        """Threshold and release of a kind."""
        threshold = self.threshold if kind in ("threshold", "schmitt") else None
        return threshold, self.release if kind == "schmitt" else None

    def backend(self, name: str, kind: str) -> Function:
        if kind == "statistics":
            return lambda h: Output(h, *temporal_stats(h, self.bands, self.segments, backend=name))
        threshold, release = self.levels(kind)

        def function(pre: Tensor) -> Output:
            levels = (threshold, release, self.bands, self.segments)
            h, stats = activate_with_stats(pre, None, "relu", *levels, backend=name)
            return Output(h, *stats)

        return function

    def alternative(self, differences: str, kind: str, states: str | None = None) -> Function:
        assert self.segments is None, "the alternatives have no segments"
        make = DIFFERENCES[differences](self.shape[1], self.device, self.dtype, self.bands)
        find = None if states is None else STATES[states]
        threshold, release = self.levels(kind)

        def function(x: Tensor) -> Output:
            if kind == "statistics":
                return statistics(x, make)
            return activation_with_statistics(x, threshold, release, make, find)

        return function

    def variant(self, name: str, family: str, function: Function, kind: str, passes: str) -> Variant:
        """A variant for `passes`: "forward", "backward" or "forward + backward".

        Its bytes: the forward pass reads the input and writes the statistics and, with an activation, h; the backward
        pass reads h and (if there is one) the gradient of h, and writes the input's gradient. Both read the segments.

        Raises `WrongResultError` for a backend; an alternative is then marked as refused and timed all the same.
        """
        tensors = {"forward": 1 if kind == "statistics" else 2, "backward": 2 if kind == "statistics" else 3}
        count = sum(n * self.bytes for pass_, n in tensors.items() if pass_ in passes)
        count += self.statistics_bytes if "forward" in passes else 0
        count += 0 if self.segments is None else self.segments.nbytes * (1 + (passes == BOTH))
        call = {"forward": self._forward, "backward": self._backward, "forward + backward": self._both}[passes]
        run = self._in_memory(call(function, kind), function, kind, passes)
        refused = ""
        try:
            self._gate(name, run(0), kind, passes)
        except gate.WrongResultError as error:
            if family != "alternative":
                raise
            refused = str(error)
        return Variant(name, family, run, count, refused)

    def _outputs(self, out: Output, kind: str) -> list[Tensor]:
        return [out.differences] if kind == "statistics" else [out.h, out.differences]

    def _grads(self, i: int, kind: str, rows: slice = slice(None)) -> list[Tensor]:
        grad_h = self.grad_h[i % self.rotation][rows]
        grad_differences = self.grad_differences.expand(grad_h.shape[0], -1, -1)
        return [grad_differences] if kind == "statistics" else [grad_h, grad_differences]

    def _forward(self, function: Function, kind: str) -> Call:
        def call(i: int) -> dict[str, Tensor]:
            with torch.no_grad():
                return function(self.pre[i % self.rotation])._asdict()

        return call

    def _both(self, function: Function, kind: str, rows: int | None = None) -> Call:
        def call(i: int) -> dict[str, Tensor]:
            x = self.pre[i % self.rotation]
            parts = []
            step = rows or x.shape[0]
            for begin in range(0, x.shape[0], step):
                chosen = slice(begin, begin + step)
                part = x if rows is None else x.detach()[chosen].requires_grad_(True)
                out = function(part)
                (grad,) = torch.autograd.grad(self._outputs(out, kind), part, self._grads(i, kind, chosen))
                parts.append({name: value.detach() for name, value in out._asdict().items()} | {"grad": grad})
            return parts[0] if rows is None else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

        return call

    def _backward(self, function: Function, kind: str) -> Call:
        graphs = [function(x) for x in self.pre]

        def call(i: int) -> dict[str, Tensor]:
            out, x = graphs[i % self.rotation], self.pre[i % self.rotation]
            (grad,) = torch.autograd.grad(self._outputs(out, kind), x, self._grads(i, kind), retain_graph=True)
            return {"grad": grad}

        return call

    def _in_memory(self, call: Call, function: Function, kind: str, passes: str) -> Call:
        """`call`; if it exceeds GPU memory, the same in slices of the batch, halved until they fit."""
        rows = self.shape[0]
        while True:
            try:
                call(0)
                return call
            except torch.OutOfMemoryError:
                if passes != "forward + backward" or rows == 1:
                    raise
            torch.cuda.empty_cache()
            rows //= 2
            call = self._both(function, kind, rows)

    def _gate(self, name: str, found: object, kind: str, passes: str) -> None:
        assert isinstance(found, dict)
        rows = self._checked
        key = (kind, "forward" if passes == "forward" else "backward")
        if key not in self._expected:
            gradients: tuple[Tensor | None, Tensor | None] = (None, None)
            if passes != "forward":
                gradients = (None if kind == "statistics" else self.grad_h[0][rows], self.grad_differences)
            activation = "identity" if kind == "statistics" else "relu"
            segments = None if self.segments is None else self.segments[rows]
            inputs = (self.pre[0][rows], activation, *self.levels(kind), *gradients)
            self._expected[key] = gate.reference(*inputs, self.bands, segments)
        for quantity, value in found.items():
            if value.shape[0] != self.shape[0]:
                raise gate.WrongResultError(f"{name}: {quantity} has {value.shape[0]} sequences, not {self.shape[0]}")
        gate.check(name, {quantity: value[rows] for quantity, value in found.items()}, self._expected[key], self.dtype)
