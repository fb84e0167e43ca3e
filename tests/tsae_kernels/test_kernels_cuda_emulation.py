"""The CUDA kernels without a GPU, compiled for the host: all tests of backends; and tools/compile_cuda.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation.build import build, compiler
from once import made_once

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

needs_compiler = pytest.mark.skipif(compiler() is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    try:
        folder = made_once(tmp_path_factory, "cuda_emulation", lambda folder: build(folder / "emulated.so"))
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{' '.join(error.cmd)}\n{error.stderr}")
    return folder / "emulated.so"


def run(library, *command, **variables):
    inherited = [path for path in [os.environ.get("PYTHONPATH")] if path]
    path = [ROOT, HERE, ROOT / "tests" / "helpers", HERE / "cuda_emulation", *inherited]
    environment = {**os.environ, "TSAE_EMULATED_LIBRARY": str(library), **variables}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    environment.pop("TSAE_BACKEND", None)
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [("activation", "losses", "ops", "transitions"), ("scans",), ("cuda", "gradients", "properties", "stats")],
    ids="-".join,
)
def test_the_backends_tests_pass_on_the_emulated_kernels(library, parts):
    files = [str(HERE / f"test_kernels_{part}.py") for part in parts]
    # torch.compile works the same for all backends.
    selection = ("-k", "cuda and not compiles_without", "-p", "emulated_backend", "-p", "no:cacheprovider")
    out = run(library, "-m", "pytest", *selection, *files)
    assert "passed" in out


_DIGEST = """
import hashlib, emulated_backend, torch
from backend_checks import everything
from tsae_kernels import window_consistency
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for k in (1, 66, 131):
        for T in (5, 128, 300):
            pre, segments = torch.randn(2, T, k).to(dtype), (torch.arange(T) // 40 - 1).expand(2, T).contiguous()
            for options in ({}, {"threshold": 0.6, "release": 0.1, "segments": segments}, {"activation": "gelu"}):
                results = everything(pre, torch.ones(k), backend="cuda", **options)
                results.append(window_consistency(pre, 3, options.get("segments"), backend="cuda"))
                for x in results:
                    assert not x.isnan().any()
                    digest.update(x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@needs_compiler
def test_the_order_of_a_blocks_threads_does_not_matter(library):
    digests = [run(library, "-c", _DIGEST, TSAE_EMULATION_ORDER=order) for order in ("", "reverse")]
    assert digests[0] == digests[1]


@needs_compiler
def test_it_loads_beside_the_cuda_library_and_keeps_the_callers_path(library, monkeypatch):
    """Where the CUDA library is built it is loaded too, and one name for two libraries ends the process."""
    monkeypatch.setenv("PYTHONPATH", "/a/folder")
    code = (
        "import sys, torch, emulated_backend\n"
        "from tsae_kernels.backends import extension\n"
        "built = extension.load_cuda_library().built_for or torch.library.Library('tsae_kernels_cuda', 'DEF')\n"
        "print(sys.path, torch.ops.tsae_kernels_cuda_emulated.forward)"
    )
    out = run(library, "-c", code)
    assert "/a/folder" in out
    assert "tsae_kernels_cuda_emulated.forward" in out


_spec = importlib.util.spec_from_file_location("compile_cuda", ROOT / "tools" / "compile_cuda.py")
compile_cuda = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compile_cuda)

_REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_90a'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z3badv' for 'sm_80'
ptxas info    : Function properties for _Z3badv
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size
"""


def test_a_spill_in_the_compilers_report_is_found():
    kernels = compile_cuda.parse(_REPORT)
    assert kernels == [("_Z4goodv", "90a", 40, 0, 0), ("_Z3badv", "80", 168, 16, 32)]
    names = {"_Z4goodv": "good", "_Z3badv": "bad"}
    assert compile_cuda.spilling(kernels, names) == ["bad for sm_80"]
    assert "168 (16 stack, 32 spilled)" in compile_cuda.table(kernels, names)


@pytest.mark.skipif(compile_cuda.find_nvcc() is None, reason="nvcc is not installed")
def test_the_smallest_source_compiles_without_a_warning(tmp_path):
    """`make cuda-compile` compiles all; this one takes seconds."""
    source = compile_cuda.SOURCES / "segment_ends.cu"
    (kernel,) = compile_cuda.compile_kernels(compile_cuda.find_nvcc(), source, "90a", tmp_path)
    assert "segment_ends" in kernel.name
    assert kernel.stack == kernel.spills == 0
