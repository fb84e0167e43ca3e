"""Forward and backward of the kernels' default backend, with a copy of the input as the floor."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from conftest import interleaved

from tsae_kernels import activate_with_stats, temporal_stats


@pytest.mark.parametrize("which", ["statistics", "activation"])
def test_kernels_forward_and_backward(benchmark: Any, which: str, smoke: bool) -> None:
    """The default backend at [16, 128, 2304] float32, with a copy of the input as the floor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (2, 128, 64) if smoke else (16, 128, 2304)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(1 if smoke else 4)]
    threshold = torch.full((shape[2],), 2.0, device=device)
    turn = 0

    def step() -> None:
        nonlocal turn
        turn += 1
        x = inputs[turn % len(inputs)]  # rotated, so that the cache is cold
        if which == "statistics":
            temporal_stats(x).differences.sum().backward()
        else:
            h, stats = activate_with_stats(x, None, "relu", threshold, 0.3 * threshold)
            (h.sum() + stats.differences.sum()).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    def copy_() -> None:
        inputs[turn % len(inputs)].detach().clone()
        if device == "cuda":
            torch.cuda.synchronize()

    times = interleaved({"step": step, "copy": copy_}, rounds=1 if smoke else 7)
    benchmark.extra_info["copies"] = statistics.median(times["step"]) / statistics.median(times["copy"])
    benchmark.pedantic(step, rounds=1 if smoke else 3)
