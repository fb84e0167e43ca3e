"""The wheel in an empty environment: the README's first commands, on a tiny model and a text file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from tiny_runs import options

ROOT = Path(__file__).parents[2]
SOURCES = ("csrc", "tsae", "tsae_kernels")
COMPILED = sorted((ROOT / "tsae_kernels").glob("_cpu*.so"))


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run it outside the source tree's PYTHONPATH; its stdout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment | variables, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of the source tree, with the compiled kernels that `make install` put into it, if any."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    built = tree / "build" / f"lib.{sysconfig.get_platform()}-cpython-{version}" / "tsae_kernels"
    built.mkdir(parents=True)
    for library in COMPILED:  # newer than its sources, so that it is not compiled again
        (built / library.name).write_bytes(library.read_bytes())
    how = {"TSAE_BUILD": "cpu" if COMPILED else "none"}
    run(sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", folder, cwd=tree, **how)
    (made,) = folder.glob("*.whl")
    assert ("-cp310-abi3-" if COMPILED else "-py3-none-any") in made.name
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel and what it requires, in the versions of constraints.txt."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, symlinks=True)
    own = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", own, "install", "--quiet", "--no-compile")
    run(*pip, "--constraint", ROOT / "constraints.txt", wheel, cwd=folder)
    return own


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes on idle cores, most of them for the installation
def test_the_first_commands_run_from_the_wheel(python: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    where = (
        "import tsae, tsae_kernels, pathlib as p; print(p.Path(tsae.__file__).parent, p.Path(tsae_kernels.__file__))"
    )
    for path in run(python, "-c", where, cwd=tmp_path).split():
        assert Path(path).is_relative_to(python.parents[1]), "not the source tree"
    states = run(python, "-m", "tsae_kernels", cwd=tmp_path)
    assert bool(re.search(r"^ *cpp +ok", states, re.M)) == bool(COMPILED), states
    assert "--sae.d-sae" in run(python, "-m", "tsae.train", "--help", cwd=tmp_path)
    run(python, "-m", "tsae.train", *options(tiny_llama, text_file, Path("runs/a")), cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs" / "a" / "eval.json").read_text())
    assert metrics["l0"] > 0
    table = run(python, "-m", "tsae.evaluate", "runs/a", cwd=tmp_path)
    assert "explained variance" in table.lower()
    run(python, "-m", "tsae.view", "runs/a", cwd=tmp_path)  # its page needs the files of package data
