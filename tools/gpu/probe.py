"""What this machine has: GPU, driver, versions, backends, and which optional packages can be imported."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tsae_kernels import available_backends

PACKAGES = ("triton", "numpy", "transformers", "pytest", "tyro", "datasets", "gguf", "sae-lens")
MODULES = ("tsae.train", "tsae.training.trainer", "sae_lens")


def importable(module: str) -> str:
    """ "ok", or why the module cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever an incomplete installation raises
        return f"{type(error).__name__}: {error}"
    return "ok"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def driver() -> str:
    """The driver's version, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def found() -> dict[str, Any]:
    """Everything about the machine in one flat dictionary."""
    values: dict[str, Any] = {"part": "probe", "device": "no GPU", "driver": driver()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        values |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        values |= {"GiB": properties.total_memory / 2**30, "l2_MiB": properties.L2_cache_size / 2**20}
    values |= {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    values |= {package: version(package) for package in PACKAGES}
    return values | {f"backend {name}": state for name, state in available_backends().items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.probe", description=__doc__)
    parser.add_argument("--imports", action="store_true", help="only import the packages that some steps need")
    parser.add_argument("--lines", type=Path, help="append the findings to this file, as a line of JSON")
    chosen = parser.parse_args(arguments)
    if chosen.imports:
        values: dict[str, Any] = {"part": "probe"} | {f"import {module}": importable(module) for module in MODULES}
    else:
        values = found()
    for name, value in values.items():
        print(f"{name}: {value}")
    if chosen.lines is not None:
        with chosen.lines.open("a") as file:
            file.write(json.dumps(values) + "\n")
    if not torch.cuda.is_available() and not chosen.imports:
        print(f"error: torch {torch.__version__} sees no GPU: use another Python (make VENV=...) or check nvidia-smi")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
