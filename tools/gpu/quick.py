"""Each kernel's error against the definition in float64 and its bandwidth beside a copy's: a line as soon as known.

Errors are |found - expected| / |expected| over the first and the last sequence. Bytes are those that must move: inputs
and results once, statistics included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import seconds_of
from benchmarks.workload import packed_segments
from tsae_kernels import MULTISCALE, available_backends
from tsae_kernels.bands import flatten_bands

OPS = torch.ops.tsae_kernels
BANDS = flatten_bands(MULTISCALE)
STATISTICS = len(MULTISCALE) + 2
ROUNDS = 15
LARGEST_ERROR = {torch.bfloat16: 6e-3, torch.float32: 2e-5}
THRESHOLD, RELEASE = 1.0, 0.3


class Case(NamedTuple):
    """shape: B, T, k; kind: "relu", "schmitt" or "gelu"."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, int, int]
    packed: bool

    @property
    def name(self) -> str:
        long = f", T = {self.shape[1]}" if self.shape[1] != 128 else ""
        return self.kind + ", packed" * self.packed + long


def cases(shape: tuple[int, int, int]) -> Iterator[Case]:
    """In order of value; longer sequences and float32 have as many bytes or fewer."""
    B, T, k = shape
    for packed in (False, True):
        for kind in ("relu", "schmitt", "gelu"):
            yield Case(kind, torch.bfloat16, shape, packed)
    for factor in (4, 16):
        yield Case("relu", torch.bfloat16, (max(B // factor, 1), factor * T, k), False)
    for kind in ("relu", "schmitt", "gelu"):
        yield Case(kind, torch.float32, (max(B // 2, 1), T, k), False)


class Inputs:
    """The tensors of a case and calls on them, with any number of its sequences."""

    def __init__(self, case: Case, device: torch.device) -> None:
        B, T, k = case.shape
        self.activation = "gelu" if case.kind == "gelu" else "relu"
        self.pre, self.grad_h = (torch.randn(B, T, k, device=device, dtype=case.dtype) for _ in range(2))
        self.bias = torch.randn(k, device=device)
        self.coefficients = 0.01 * torch.rand(1, len(MULTISCALE), k, device=device)
        schmitt = case.kind == "schmitt"
        self.levels = [torch.full((k,), x, device=device) if schmitt else None for x in (THRESHOLD, RELEASE)]
        self.segments = packed_segments(B, T, device) if case.packed else None

    def forward(self, backend: str) -> tuple[Tensor, ...]:
        arguments = self.activation, *self.levels, BANDS, self.segments, backend
        found: tuple[Tensor, ...] = OPS.activate_with_stats(self.pre, self.bias, *arguments)
        return found

    def backward(self, saved: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        coefficients = self.coefficients.expand(saved.shape[0], -1, -1)
        rest = (coefficients, None, None, self.activation, BANDS, self.segments, backend)
        grad, grad_bias = OPS.activate_with_stats_backward(saved, self.bias, self.grad_h, *rest)
        return grad, grad_bias

    def in_float64(self, rows: Tensor) -> Inputs:
        """A copy with these sequences only.

        With a threshold the bias is added in float32, as in the kernels: else an element on the threshold's other side
        would count as an error.
        """
        other = object.__new__(Inputs)
        other.activation, other.levels = self.activation, self.levels
        other.pre, other.grad_h = self.pre[rows].double(), self.grad_h[rows].double()
        other.bias, other.coefficients = self.bias.double(), self.coefficients.double()
        if self.levels[0] is not None:
            other.pre, other.bias = (self.pre[rows].float() + self.bias).double(), torch.zeros_like(other.bias)
        other.segments = None if self.segments is None else self.segments[rows]
        return other


def shape_of(text: str) -> tuple[int, int, int]:
    B, T, k = map(int, text.split(","))
    return B, T, k


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; NaN if anything is not a number."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    call()
    return 1e3 * statistics.median(seconds_of(lambda i: call(), i, device) for i in range(rounds))


def measure(case: Case, backend: str, inputs: Inputs, copy: float, rounds: int) -> dict[str, Any]:
    """The row of one backend in one case. copy: milliseconds of `pre.clone()`."""
    begin = time.monotonic()
    device = inputs.pre.device
    rows = torch.tensor([0, case.shape[0] - 1], device=device)
    exact = inputs.in_float64(rows)
    found = inputs.forward(backend)
    h = found[0]
    errors = {"error": max(map(error, (x[rows] for x in found), exact.forward("reference")))}
    saved = inputs.pre if case.kind == "gelu" else h
    (grad, _), (expected, _) = inputs.backward(saved, backend), exact.backward(saved[rows].double(), "reference")
    errors["grad_error"] = error(grad[rows], expected)
    calls = {"forward": (2, lambda: inputs.forward(backend)), "backward": (3, lambda: inputs.backward(saved, backend))}
    if case.kind == "relu":
        calls["statistics"] = (1, lambda: OPS.temporal_stats(h, BANDS, inputs.segments, backend))
    times: dict[str, float] = {}
    size = inputs.pre.nbytes
    for name, (tensors, call) in calls.items():
        times[f"{name}_ms"] = milliseconds(call, device, rounds)
        written = 0 if name == "backward" else 4 * case.shape[0] * STATISTICS * case.shape[2]
        times[f"{name}_of_copy"] = (tensors * size + written) / (2 * size) * copy / times[f"{name}_ms"]
    dtype = str(case.dtype).removeprefix("torch.")
    about = {"part": "quick", "backend": backend, "dtype": dtype, "case": case.name, "shape": case.shape}
    return {**about, **errors, **times, "took": time.monotonic() - begin}


def accurate(row: dict[str, Any]) -> bool:
    """Whether both errors are below the limit of the row's dtype; NaN is not."""
    limit = LARGEST_ERROR[getattr(torch, row["dtype"])]
    return bool(row["error"] <= limit and row["grad_error"] <= limit)


def show(row: dict[str, Any], lines: Path | None) -> None:
    shown = {
        name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items() if name != "part"
    }
    print(" ".join(f"{name}={value}" for name, value in shown.items()), flush=True)
    if lines is not None:
        with lines.open("a") as file:
            file.write(json.dumps(row) + "\n")


def once(shape: tuple[int, int, int], backends: Sequence[str], device: torch.device) -> None:
    """Every kernel once, for a profiler."""
    inputs = Inputs(Case("schmitt", torch.bfloat16, shape, False), device)
    for backend in backends:
        h, *_ = inputs.forward(backend)
        inputs.backward(h, backend)
        OPS.temporal_stats(h, BANDS, None, backend)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.quick", description=__doc__)
    parser.add_argument("--shape", type=shape_of, default=(2048, 128, 2304), help="B,T,k")
    parser.add_argument("--backends", default="cuda,triton", help="names separated by commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--lines", type=Path, help="append every row to this file, as a line of JSON")
    parser.add_argument("--once", action="store_true", help="launch every kernel once and measure nothing")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    states = available_backends()
    absent = [name for name in chosen.backends.split(",") if states.get(name) != "ok"]
    for name in absent:
        print(f"error: the backend {name} is {states.get(name, 'unknown')}")
    backends = [name for name in chosen.backends.split(",") if name not in absent]
    torch.manual_seed(0)
    if chosen.once:
        once(chosen.shape, backends, device)
        return int(bool(absent))
    wrong = 0
    for case in cases(chosen.shape):
        inputs = Inputs(case, device)
        copy = milliseconds(inputs.pre.clone, device, chosen.rounds)
        speed = 2 * inputs.pre.nbytes / copy / 1e9
        show({"part": "quick", "case": f"clone of {case.name}", "copy_ms": copy, "TB_s": speed}, chosen.lines)
        for backend in backends:
            row = measure(case, backend, inputs, copy, chosen.rounds)
            row["accurate"] = accurate(row)
            show(row, chosen.lines)
            wrong += not row["accurate"]
        del inputs
    if wrong:
        print(f"error: {wrong} rows are not accurate")
    return int(bool(wrong or absent))


if __name__ == "__main__":
    sys.exit(main())
