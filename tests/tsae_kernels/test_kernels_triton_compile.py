"""The Triton kernels compiled for GPUs that are not there: every one in registers, its loads vectorised."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.slow,
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_no_kernel_spills_a_register(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("triton_offline.py")
    command = [sys.executable, str(script), capability]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) == 32
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["reg"] <= 255, kernel
        if "backward" not in kernel["kernel"] or "f32" in kernel["kernel"]:
            assert kernel["vector_loads"] > 0 or "backward" in kernel["kernel"], kernel
