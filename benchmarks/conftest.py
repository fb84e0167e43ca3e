"""Fixtures of the benchmarks: smoke mode, device, model, recorded measurements; and the table at the end."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import keep_freed_memory
from benchmarks.results import Measurement, table

SMOKE = bool(os.environ.get("TSAE_BENCH_SMOKE"))
"""Small sizes and few rounds: checks that the suite runs; the times mean nothing."""

LINES = os.environ.get("TSAE_BENCH_LINES")
"""A file that gets every measurement as a line of JSON as soon as it is taken."""

MEASURED = pytest.StashKey[dict[str, Measurement]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}
    keep_freed_memory()


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with PyTorch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' * (threads != 1)}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info |= {"device": device_name(device), "torch": torch.__version__, "smoke": SMOKE}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = list(config.stash[MEASURED].values())
    if not measured:
        return
    terminalreporter.section("measured")
    if SMOKE:
        terminalreporter.line("smoke mode: tiny sizes, few rounds; these times mean nothing")
    terminalreporter.line(f"{measured[0].device}, torch {torch.__version__}")
    terminalreporter.line("")
    for line in table(measured).splitlines():
        terminalreporter.line(line)
    terminalreporter.line("")
    terminalreporter.line("x copy: relative to h.clone(); x own: to the bold variant; peak: memory beyond the inputs")
    for measurement in measured:
        for line in remarks(measurement):
            terminalreporter.line(line)


def remarks(m: Measurement) -> list[str]:
    """What the table does not show: results that the gate refuses, and a batch smaller than intended."""
    out = [f"refused in {m.case!r}, timed all the same: {row.refused}" for row in m.rows if row.refused]
    if "sequences intended" in m.notes:
        out.append(f"{m.case!r}: {m.shape[0]} sequences, not {m.notes['sequences intended']}: too little free memory")
    return out


@pytest.fixture(scope="session")
def smoke() -> bool:
    return SMOKE


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def record(benchmark: Any, pytestconfig: pytest.Config) -> Callable[[Measurement], None]:
    """Records a measurement for the table, for the speed requirements and for the `--benchmark-json` file."""

    def keep(measurement: Measurement) -> None:
        pytestconfig.stash[MEASURED][measurement.case] = measurement
        benchmark.extra_info["measurement"] = measurement.to_dict()
        if LINES:
            with Path(LINES).open("a") as file:
                file.write(json.dumps({"part": "benchmarks", "smoke": SMOKE, **measurement.to_dict()}) + "\n")

    return keep


@pytest.fixture
def measured(smoke: bool, pytestconfig: pytest.Config) -> Callable[[str], Measurement]:
    """A case's measurement, to check a requirement; skips in smoke mode and if the case did not run."""

    def find(case: str) -> Measurement:
        if smoke:
            pytest.skip("times in smoke mode mean nothing")
        found = pytestconfig.stash[MEASURED].get(case)
        if found is None:
            pytest.skip(f"the case {case!r} was not measured in this session")
        return found

    return find


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 2 decoder of the demo model's width and depth with a small vocabulary; tiny in smoke mode."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    d, inner, layers = (64, 128, 4) if SMOKE else (640, 2048, 18)
    config = Gemma2Config(
        vocab_size=1000,
        hidden_size=d,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=d // 4,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder
