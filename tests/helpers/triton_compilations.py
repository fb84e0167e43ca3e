"""A pytest plugin that counts the Triton kernels that tests would compile on a GPU, without one.

    TRITON_INTERPRET=0 pytest -p triton_compilations tests/tsae_kernels -k triton

Tests see the `triton` backend as available, on CPU tensors. Its launchers run as they would on an H100, with kernels
that record what Triton would specialize them for; the results come from the CPU's default backend. Prints the number
of distinct kernels, and with TSAE_COMPILATIONS=FILE writes each with the test that needs it first.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.compile_triton import specialization

os.environ["TRITON_INTERPRET"] = "0"  # tests/conftest.py would set it to 1

from tsae_kernels import scan_ops
from tsae_kernels.backends import registry
from tsae_kernels.backends.triton import launch, scan_launch

_FASTEST = registry.choose_backend(None, torch.device("cpu"))
ON_CPU, SCANS_ON_CPU = registry.get_backend(_FASTEST), scan_ops._backend(_FASTEST)
MULTIPROCESSORS = 132
"""Of an H100."""

_current_test = ""
_compiled: dict[str, str] = {}  # what a kernel is specialized for -> the first test


class _Recorder:
    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        kinds = [{str(k): str(v) for k, v in part.items()} for part in specialization(self.kernel, args, kwargs)]
        key = f"{self.kernel.__name__} {json.dumps(kinds, sort_keys=True)}"
        _compiled.setdefault(key, _current_test)


def _activate_with_mask(*arguments: Any) -> tuple[torch.Tensor, ...]:
    from kernels_oracle import active_words  # after the backend is made available

    h, *statistics = ON_CPU.activate_with_stats(*arguments)
    return active_words(h), *statistics


def _recorded(launcher: Callable[..., Any], result: Callable[..., Any]) -> Callable[..., Any]:

    def call(first: torch.Tensor, *rest: Any) -> Any:
        launched = launcher(first, *rest)
        return launched if first.is_meta else result(first, *rest)

    return call


def pytest_configure() -> None:
    for module_name in ("forward", "backward", "steps", "scans"):
        module = importlib.import_module(f"tsae_kernels.backends.triton.{module_name}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, _Recorder(getattr(module, name)))
    for name in (
        "activate_with_stats",
        "activate_with_mask",
        "temporal_stats",
        "activate_with_stats_backward",
        "step_energy",
        "step_energy_backward",
    ):
        result = _activate_with_mask if name == "activate_with_mask" else getattr(ON_CPU, name)
        setattr(launch, name, _recorded(getattr(launch, name), result))
    for name in ("viterbi_path", "leaky_recurrence", "leaky_recurrence_backward"):
        setattr(scan_launch, name, _recorded(getattr(scan_launch, name), getattr(SCANS_ON_CPU, name)))
    launch._programs_wanted = lambda x: 8 * MULTIPROCESSORS
    registry._AVAILABLE["triton"] = launch
    registry._UNAVAILABLE.pop("triton", None)
    registry._DEVICE_TYPES["triton"] = "cpu"


def pytest_runtest_setup(item: Any) -> None:
    global _current_test
    _current_test = item.nodeid


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{len(_compiled)} Triton kernels")
    if file := os.environ.get("TSAE_COMPILATIONS"):
        Path(file).write_text(json.dumps(_compiled, indent=1))
