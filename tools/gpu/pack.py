"""`make gpu-pack`: what must be copied to a machine with a GPU and no network, and its size.

gpu-pack/wheels: the packages of wheels.txt; gpu-pack/stubs: an empty module wandb, which SAELens imports;
tsae_kernels/*.so: both compiled libraries; gpu-pack/model: the small model. `make gpu-check` finds all of them there.
What cannot be made is named with the reason, and the exit status is 1.

Variables: PACK_PYTHON, an interpreter with a CUDA build of torch, not newer than the machine's, for the CUDA library
(default: this one); PACK_TARGET, the machine's version of Python (3.12).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.gpu.check import PACK, ROOT

LIMIT = 64 * 2**20
"""Bytes that one copy may hold."""

WHEELS = Path(__file__).with_name("wheels.txt")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
ARCHITECTURES = "9.0a"  # H100 and H200


class Item(NamedTuple):
    """Something to copy. problem: why it could not be made, or "" """

    name: str
    paths: tuple[Path, ...]
    problem: str = ""


def size(paths: Sequence[Path]) -> int:
    """Bytes of these files and of all files in these folders."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files)


def run(*command: str, **variables: str) -> str:
    """Why the command failed, its last lines; "" if it did not."""
    environment = {**os.environ, **variables}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if result.returncode == 0:
        return ""
    return "; ".join((result.stderr or result.stdout).strip().splitlines()[-2:]) or f"exit code {result.returncode}"


def requirements(text: str) -> list[str]:
    """The lines of wheels.txt. Raises ValueError unless each pins a version."""
    lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
    loose = [line for line in lines if line.count("==") != 1]
    if loose:
        raise ValueError(f"wheels.txt must pin every version with ==, got {', '.join(loose)}")
    return lines


def wheels(folder: Path, target: str) -> Item:
    """Download each wheel, and build those that exist as sources only."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = (sys.executable, "-m", "pip")
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    binary = ("--only-binary=:all:", "--python-version", target, "--implementation", "cp", *platforms)
    problems = []
    for requirement in requirements(WHEELS.read_text()):
        problem = run(*pip, "download", "--quiet", "--no-deps", *binary, "--dest", str(folder), requirement)
        if problem:
            options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
            problem = run(*pip, "wheel", *options, requirement)
        if problem:
            problems.append(f"{requirement}: {problem}")
    foreign = [file.name for file in folder.glob("*.whl") if not file.stem.endswith("-any")]
    problems += [f"{name} is not pure Python" for name in foreign]
    return Item("wheels", (folder,), "; ".join(problems))


def stub(folder: Path) -> Item:
    """An empty `wandb`, which SAELens imports and does not use in a training step."""
    module = folder / "wandb" / "__init__.py"
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text('"""Stands in for wandb, which is imported and not used."""\n')
    return Item("stub of wandb", (module.parent,))


def why_no_cuda(python: str) -> str:
    """Why this interpreter cannot build the CUDA library; "" if it can."""
    code = "import setup_check as s; r = s.why_no_cpu_build() or s.why_no_cuda_build(); print(r)"
    source = (ROOT / "setup.py").read_text().replace("setup(**build_arguments())", "")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "setup_check.py").write_text(source)
        result = subprocess.run(
            [python, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": folder},
        )
    if result.returncode:
        return f"{python} cannot say: {(result.stderr.strip().splitlines() or ['no output'])[-1]}"
    return result.stdout.strip()


def libraries_of_cuda(python: str, folder: Path) -> dict[str, str]:
    """For the linker: `libcudart.so` from torch's own packages, if CUDA_HOME lacks it."""
    code = (
        "import pathlib, sys; found = sorted(p for root in sys.path if root for p in "
        "pathlib.Path(root).glob('nvidia/*/lib/libcudart.so.*')); print(found[0] if found else '')"
    )
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    library = result.stdout.strip()
    if not library:
        return {}
    (folder / "libcudart.so").symlink_to(library)
    return {"LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LIBRARY_PATH", "")]))}


def compiled(python: str) -> Item:
    """Both compiled libraries, in place. What is built before stays if it cannot be built."""
    package = ROOT / "tsae_kernels"
    problem = why_no_cuda(python)
    if not problem:
        with tempfile.TemporaryDirectory() as folder:
            variables = {"TSAE_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
            variables |= libraries_of_cuda(python, Path(folder))
            problem = run(python, "setup.py", "build_ext", "--inplace", **variables)
    found = tuple(sorted(package.glob("*.so")))
    if problem:
        names = ", ".join(file.name for file in found) or "none"
        problem = f"the CUDA library is not made: {problem} Libraries that are there: {names}"
    return Item("compiled libraries", found, problem)


def model(folder: Path) -> Item:
    """The small model; what was made before is kept."""
    files = (folder / "packed.gguf", folder / "text.jsonl")
    problem = ""
    if not all(file.is_file() for file in files):
        problem = run(sys.executable, "-m", "tools.gpu.small_model", "pack", str(folder), PYTHONPATH=str(ROOT))
    return Item("small model", tuple(file for file in files if file.is_file()), problem)


def report(items: Sequence[Item], sources: int) -> str:
    """Sizes against the limit of one copy, and what is missing."""
    lines = [f"{'sources (tracked files)':40} {sources / 2**20:8.1f} MiB"]
    lines += [f"{item.name:40} {size(item.paths) / 2**20:8.1f} MiB" for item in items]
    *first, last = items
    copies = {
        "first copy: all but the small model": sources + sum(size(item.paths) for item in first),
        "second copy: sources and small model": sources + size(last.paths),
        "both at once": sources + sum(size(item.paths) for item in items),
    }
    lines.append("")
    for name, amount in copies.items():
        verdict = "fits" if amount <= LIMIT else "TOO LARGE"
        lines.append(f"{name:40} {amount / 2**20:8.1f} MiB, {verdict} in {LIMIT / 2**20:.0f} MiB")
    lines += [f"\nnot made, {item.name}: {item.problem}" for item in items if item.problem]
    return "\n".join(lines)


def tracked() -> int:
    """Bytes of the tracked files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return size([ROOT / name for name in listed.split("\0") if name])


def main(variables: Mapping[str, str] = os.environ) -> int:
    folder = ROOT / PACK
    print(f"collecting in {folder}, takes minutes", flush=True)
    items = [
        wheels(folder / "wheels", variables.get("PACK_TARGET") or "3.12"),
        stub(folder / "stubs"),
        compiled(variables.get("PACK_PYTHON") or sys.executable),
        model(folder / "model"),
    ]
    print(report(items, tracked()))
    return int(any(item.problem for item in items))


if __name__ == "__main__":
    sys.exit(main())
