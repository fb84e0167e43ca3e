"""A compiled library that cannot be used is unavailable, with the reason and the command that fixes it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tsae_kernels
from tsae_kernels.backends import extension

PACKAGE = Path(tsae_kernels.__file__).parent
ROOT = PACKAGE.parent
BUILT = extension._find("_cpu")
needs_library = pytest.mark.skipif(bool(extension.load_library().error), reason=extension.load_library().error)


def run(*command, root, **variables):
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TSAE_BACKEND": "", **variables}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=root)


@pytest.fixture
def package(tmp_path):
    """A copy of the packages without compiled libraries, in which tests put their own."""
    for folder in (PACKAGE, ROOT / "tsae"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def write_library(kind, library):
    if kind == "foreign":  # a valid library without our functions
        shutil.copy(Path(torch.__file__).parent / "lib" / "libshm.so", library)
    elif kind == "text":
        library.write_text("not a library\n")
    elif kind == "empty":
        library.touch()
    else:
        whole = BUILT[0].read_bytes()
        library.write_bytes(whole[: int(len(whole) * float(kind))])


@needs_library
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("0.5", "is truncated"),
        ("0.999", "is truncated"),
        ("0.00005", "is truncated"),
        ("empty", "does not load"),
        ("text", "does not load"),
        ("foreign", "does not load"),
    ],
)
def test_a_broken_library_is_reported_with_a_remedy(monkeypatch, tmp_path, kind, reason):
    library = tmp_path / "_cpu.abi3.so"
    write_library(kind, library)
    monkeypatch.setattr(extension, "_find", lambda name: [library])
    error = extension.load_library.__wrapped__().error
    assert reason in error
    assert error.endswith(f"`rm {library}`, then {extension.REMEDY}")


@needs_library
def test_with_a_truncated_library_everything_else_works(package):
    write_library("0.5", package / "tsae_kernels" / "_cpu.abi3.so")
    out = run("-m", "tsae_kernels", root=package)
    assert out.returncode == 0, out.stderr
    (line,) = [line for line in out.stdout.splitlines() if line.split()[:1] == ["cpp"]]
    assert "is truncated" in line
    assert "pip install --no-build-isolation ." in line
    assert "default on cpu: eager" in out.stdout


def test_without_a_library_eager_is_the_default_and_tsae_imports(package):
    pytest.importorskip("tsae.sae.model", reason="the requirements of tsae are not installed")
    code = (
        "import torch, tsae, tsae.sae.model, tsae_kernels as tk\n"
        "h, stats = tk.activate_with_stats(torch.randn(2, 9, 3, requires_grad=True), threshold=0.5, release=0.1)\n"
        "stats.differences.sum().backward()\n"
        "assert tk.__file__.startswith(sys.argv[1])\n"
        "try: tk.temporal_stats(h, backend='cpp')\n"
        "except RuntimeError as error: print(error)\n"
    )
    out = run("-c", "import sys\n" + code, str(package), root=package)
    assert out.returncode == 0, out.stderr
    assert "backend='cpp' is not available: not built: with torch and a C++ compiler run `pip install" in out.stdout


@needs_library
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(extension, "INTERFACE", -1)
    error = extension.load_library.__wrapped__().error
    assert "was built from another version of the sources" in error
    assert extension.REMEDY in error


def test_the_table_is_printed_even_if_the_variable_is_invalid():
    out = run("-m", "tsae_kernels", root=ROOT, TSAE_BACKEND="nonsense")
    assert out.returncode == 0, out.stderr
    assert "default on cpu: none. TSAE_BACKEND" in out.stdout


LEVELS = {"DEFAULT": ("default", "baseline"), "AVX2": ("avx2", "avx2"), "AVX512": ("avx512", "avx512")}

_RESULTS = """
import sys, torch
import tsae_kernels as tk
from tsae_kernels.backends.extension import load_library
results = [load_library().selected]
for pre, bias in torch.load(sys.argv[1]):  # torch's random numbers depend on the instruction set
    for options in ({}, {"threshold": 0.6, "release": 0.2}, {"activation": "gelu"}):
        leaves = [pre.clone().requires_grad_(), bias.clone().requires_grad_()]
        h, stats = tk.activate_with_stats(*leaves, **options, backend="cpp")
        window = tk.window_consistency(leaves[0], 3, backend="cpp")
        grads = torch.autograd.grad(h.float().sum() + stats.differences.sum() + window, leaves)
        results += [x.detach() for x in (h, *stats, window, *grads)]
torch.save(results, sys.argv[2])
"""


@needs_library
def test_every_instruction_set_of_this_processor_gives_the_same_results(tmp_path):
    """Selected at run time with PyTorch's own variable. All other tests run the widest."""
    torch.manual_seed(0)
    inputs = [
        (torch.randn(2, 140, k).to(dtype), torch.randn(k))
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for k in (3, 100)
    ]
    torch.save(inputs, tmp_path / "inputs.pt")
    widest = torch.backends.cpu.get_cpu_capability()
    if widest not in LEVELS:
        pytest.skip(f"one instruction set on {widest}")
    outcomes = []
    for variable, name in list(LEVELS.values())[: list(LEVELS).index(widest) + 1]:
        file = tmp_path / f"{name}.pt"
        out = run("-c", _RESULTS, str(tmp_path / "inputs.pt"), str(file), root=ROOT, ATEN_CPU_CAPABILITY=variable)
        assert out.returncode == 0, out.stderr
        chosen, *results = torch.load(file)
        assert chosen == name
        outcomes.append(results)
    for results in outcomes[1:]:
        for got, wanted in zip(results, outcomes[0], strict=True):
            rtol = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[got.dtype]
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * wanted.abs().max().item())
