"""What `pip install` and `python -m build` produce from the source tree, without compiling."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = ("-c", "import sys, runpy; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')")
NO_TORCH = ("-c", "import sys; sys.modules['torch'] = None; " + SETUP[1])  # as in pip's isolated environment


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, because builds write beside them."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "tsae", "tsae_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def run(tree: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAE_BUILD": "", **variables}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=tree)


def wheel(tree: Path, out: Path, *how: str, **variables: str) -> tuple[Path, str]:
    """The wheel, and what was said while it was built."""
    shutil.rmtree(tree / "build", ignore_errors=True)
    result = run(tree, *how, "-q", "bdist_wheel", "--dist-dir", str(out), **variables)
    assert result.returncode == 0, result.stderr
    (file,) = out.glob("*.whl")
    return file, result.stderr


LIST_DEPENDENCIES = """
import runpy, setuptools
setuptools.setup = lambda **given: print(*(file for each in given["ext_modules"] for file in each.depends))
runpy.run_path("setup.py", run_name="__main__")
"""


def test_every_header_rebuilds_the_extension() -> None:
    """Without ninja setuptools looks at these files alone."""
    result = run(ROOT, "-c", LIST_DEPENDENCIES, TSAE_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    known = set(result.stdout.split())
    headers = {
        str(path.relative_to(ROOT)) for folder in ("cpu", "shared") for path in (ROOT / "csrc" / folder).glob("*.h")
    }
    assert "csrc/cpu/ring.h" in headers
    assert headers <= known


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_no_header_has_the_name_of_a_system_header() -> None:
    """One that has shadows the C library's where its folder is on the include path."""
    names = {path.name for path in (ROOT / "csrc").rglob("*.*h")}
    source = "".join(f"#if __has_include(<{name}>)\n#error {name}\n#endif\n" for name in sorted(names))
    result = subprocess.run(["c++", "-E", "-x", "c++", "-"], input=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    control = subprocess.run(
        ["c++", "-E", "-x", "c++", "-"], input="#if __has_include(<features.h>)\n#error features.h\n#endif\n",
        capture_output=True, text=True,
    )  # fmt: skip
    assert control.returncode != 0, "this C library has no <features.h>, so the test shows nothing"


@pytest.mark.parametrize(("how", "choice"), [(SETUP, "none"), (NO_TORCH, "")], ids=["none", "without torch"])
def test_the_wheel_of_python_alone_is_for_every_machine(tree: Path, tmp_path: Path, how: tuple, choice: str) -> None:
    file, said = wheel(tree, tmp_path, *how, TSAE_BUILD=choice)
    assert file.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(file).namelist()
    assert "tsae_kernels/backends/eager.py" in names
    assert "tsae/py.typed" in names
    assert {"tsae/view/template.html", "tsae/view/view.css", "tsae/view/view.js"} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cpp", ".cu"))]
    if not choice:
        assert "torch is not in the build environment. For the compiled kernels run `pip install --no-build" in said


def test_the_wheel_with_a_library_is_for_every_python(tree: Path, tmp_path: Path) -> None:
    """Its tag: with --skip-build nothing is compiled."""
    shutil.rmtree(tree / "build", ignore_errors=True)
    command = ("-q", "bdist_wheel", "--skip-build", "--dist-dir", str(tmp_path))
    result = run(tree, *SETUP, *command, TSAE_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in file.name
    assert not file.name.endswith("-any.whl")


@pytest.mark.parametrize(
    ("how", "choice", "words"),
    [
        (NO_TORCH, "cpu", ["TSAE_BUILD=cpu, but torch is not in the build environment", "--no-build-isolation"]),
        (NO_TORCH, "cuda", ["TSAE_BUILD=cuda, but torch is not in the build environment", "--no-build-isolation"]),
        (SETUP, "gpu", ["TSAE_BUILD must be cuda, cpu or none", "'gpu'"]),
    ],
)
def test_what_cannot_be_built_says_what_to_do(tree: Path, how: tuple, choice: str, words: list[str]) -> None:
    result = run(tree, *how, "-q", "bdist_wheel", TSAE_BUILD=choice)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_without_a_compiler_the_package_is_python_alone(tree: Path, tmp_path: Path) -> None:
    file, said = wheel(tree, tmp_path, *SETUP, CXX="no-such-compiler")
    assert file.name.endswith("-py3-none-any.whl")
    assert "there is no C++ compiler (no-such-compiler). Install g++" in said


def test_the_source_distribution_holds_what_is_compiled(tree: Path, tmp_path: Path) -> None:
    result = run(tree, *SETUP, "-q", "sdist", "--dist-dir", str(tmp_path), TSAE_BUILD="none")
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    wanted = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()}
    assert {"csrc/shared/recurrence.h", "csrc/cuda/forward.cu", "csrc/cpu/ops.cpp"} <= wanted
    assert not wanted - names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "tsae_kernels/backends/eager.py"} <= names
    (unpacked,) = [folder for folder in tmp_path.iterdir() if folder.is_dir()]
    result = run(unpacked, *SETUP, "-q", "bdist_wheel", TSAE_BUILD="none")
    assert result.returncode == 0, result.stderr
