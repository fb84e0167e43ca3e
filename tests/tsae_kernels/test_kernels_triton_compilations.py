"""How many kernels Triton compiles: counted without a GPU by the plugin tests/helpers/triton_compilations.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels_oracle import parameters

ROOT = Path(__file__).parents[2]

SHAPES = """
import itertools, torch
from tsae_kernels import MULTISCALE
from tsae_kernels.backends.interface import Activation, Gradients
from tsae_kernels.backends.triton import launch, scan_launch

def test_shapes():
    for T, k in itertools.product((1, 7, 127, 129, 600), (2, 33, 2304, 2312)):
        for layout in range(2):
            x = torch.empty(T, 3, k) if layout else torch.empty(3, T, k)
            x = x.transpose(0, 1) if layout else x
            ids = torch.zeros(3, T, dtype=torch.int64) if T % 2 else None
            bias = torch.empty(k) if k % 2 else None
            total = torch.empty(3, k) if k == 33 else None
            level = torch.empty(()) if layout else torch.empty(k)
            grads = Gradients(x, torch.empty(1, 3, k).expand(3, 3, k), total, None)
            launch.activate_with_stats(x, Activation("relu", bias, None if T == 1 else level), MULTISCALE, ids)
            launch.activate_with_stats_backward(x, grads, Activation("relu"), MULTISCALE, ids)
            launch.step_energy(x, torch.empty(3, T))
            decay = torch.empty(k)
            scan_launch.viterbi_path(x, torch.empty(2, 2, k), torch.empty(2, k), ids)
            scan_launch.leaky_recurrence(x, decay, ids)
            scan_launch.leaky_recurrence_backward(x, decay, x if T % 3 else None, x if T % 3 else None, ids)
"""

pytestmark = list(parameters(["triton"])[0].marks)


def compiled(folder: Path, *tests: str) -> dict[str, str]:
    """What each distinct kernel is compiled for -> the first of the tests that launches it."""
    file = folder / "compilations.json"
    paths = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TSAE_COMPILATIONS": str(file),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "triton_compilations", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    return json.loads(file.read_text())


def test_no_shape_stride_or_absent_argument_of_the_same_kind_compiles_a_kernel(tmp_path):
    """20 shapes in two layouts.

    What compiles: whether rows are aligned, how many features a program has, whether a window covers the sequence, and
    whether the sums have a gradient.
    """
    (tmp_path / "test_shapes.py").write_text(SHAPES)
    kernels = compiled(tmp_path, str(tmp_path / "test_shapes.py"))
    counts = {name: sum(key.startswith(f"{name}_kernel ") for key in kernels) for name in ("forward", "backward")}
    assert counts["forward"] <= 3
    assert counts["backward"] <= 6
    walks = ("viterbi_path", "leaky_recurrence", "leaky_recurrence_backward")
    counts = {name: sum(key.startswith(f"{name}_kernel ") for key in kernels) for name in walks}
    assert all(0 < count <= 2 for count in counts.values())
    assert len(kernels) <= 17


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tests_compile_at_most_73_kernels_on_a_gpu_of_which_11_count_transitions(tmp_path):
    """Those of statistics and their gradient; the kernels on lists and of Adam compile in under a second each.

    Nor the walks along T, of which every dtype and alignment compiles one.
    """
    selection = "triton and not compil and not sparse and not adam and not scans"
    kernels = compiled(tmp_path, "tests/tsae_kernels", "-k", selection)
    counting = [key for key in kernels if '"COUNTED": "True"' in key]
    assert 0 < len(counting) <= 11
    assert len(kernels) <= 73
