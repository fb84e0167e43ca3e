"""What counting transitions adds to `activate_with_stats`: the same call with and without, interleaved.

relu with the Schmitt trigger, on [16, 128, 2304] float32 features on a CPU and [256, 128, 2304] bfloat16 features on a
GPU. The table's column "x own" has the ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import device_name
from benchmarks.measure import Variant, compare
from benchmarks.results import Measurement
from benchmarks.workload import DEVICES, RELEASE, THRESHOLD, backends
from tsae_kernels import CountedStats, TemporalStats, activate_with_stats

ROTATION = 4


@pytest.mark.parametrize("name", DEVICES)
def test_transitions(
    benchmark: Any, record: Callable[[Measurement], None], device: torch.device, smoke: bool, name: str
) -> None:
    if name not in backends(device):
        pytest.skip(f"{name} is not available on {device}")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = (2, 16, 32) if smoke else (16 if device.type == "cpu" else 256, 128, 2304)
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(ROTATION)]

    def call(i: int, transitions: bool, backend: str = name) -> tuple[Tensor, TemporalStats | CountedStats]:
        arguments = inputs[i % ROTATION], None, "relu", THRESHOLD, RELEASE
        return activate_with_stats(*arguments, transitions=transitions, backend=backend)

    found, wanted = (call(0, True, each)[1] for each in (name, "reference"))
    assert torch.equal(found[-1], wanted[-1])
    without = Variant("statistics", "backend", lambda i: call(i, False))
    counted = Variant("statistics and transitions", "backend", lambda i: call(i, True))
    timings = compare(benchmark, without, [counted], device, rounds=2 if smoke else 41, memory=False)
    case, kind = f"counting transitions, {name}", str(dtype).removeprefix("torch.")
    measurement = Measurement(case, without.name, device_name(device), list(shape), kind, 0)
    measurement.add([without, counted], timings)
    record(measurement)
