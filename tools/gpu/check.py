"""`make gpu-check`: everything that needs a GPU, in a given time, on a machine that may have no network.

Environment variables: DEADLINE, the seconds in all (560); PARTS, the parts to run (all); OUT, the folder of results
(gpu-results); MODEL, the folder of the small model that `make gpu-pack` makes (gpu-pack/model); LOOP=1 also compiles
PyTorch's loop over 127 offsets. The folder then holds log.txt, measurements.jsonl (a line of JSON per measurement and
per step), summary.txt (the last screen) and the benchmarks' JSON. Wheels in gpu-pack/wheels are installed into
gpu-pack/site, which the steps can import from; nothing else is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tools.gpu.parts import PARTS, filled, steps
from tools.gpu.runner import Log, Runner
from tools.gpu.verdicts import screen

ROOT = Path(__file__).resolve().parents[2]
PACK = Path("gpu-pack")
BAD_ARGUMENTS = 2


def chosen_parts(text: str) -> list[str]:
    """The parts named in PARTS, separated by spaces or commas. Raises ValueError for an unknown one."""
    names = text.replace(",", " ").split()
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"PARTS must be some of {' '.join(PARTS)}, got {' '.join(unknown)}")
    return names or list(PARTS)


def seconds(text: str) -> float:
    """DEADLINE. Raises ValueError unless it is a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"DEADLINE must be a number of seconds above 0, got {text!r}")
    return value


def environment_of_steps(inherited: Mapping[str, str], root: Path) -> dict[str, str]:
    """The environment of the steps: the source tree and the unpacked wheels are importable, output is not held back."""
    path = [str(root), *(str(root / PACK / name) for name in ("site", "stubs"))]
    path += filter(None, [inherited.get("PYTHONPATH")])
    return {**inherited, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "TSAE_BACKEND": ""}


def install_wheels(root: Path, python: str) -> str:
    """Unpack the wheels that `make gpu-pack` collected, if any; what went wrong, or ""."""
    wheels = sorted(map(str, (root / PACK / "wheels").glob("*.whl")))
    if not wheels or (root / PACK / "site").exists():
        return ""
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    command = [python, "-m", "pip", "install", *options, "--target", str(root / PACK / "site"), *wheels]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "it takes longer than 60 s"
    return "" if result.returncode == 0 else (result.stderr.strip() or "pip failed").splitlines()[-1]


def main() -> int:
    begin = time.monotonic()
    variables = os.environ
    try:
        deadline = seconds(variables.get("DEADLINE") or "560")
        parts = chosen_parts(variables.get("PARTS", ""))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    results = Path(variables.get("OUT") or "gpu-results").absolute()
    model = Path(variables.get("MODEL") or ROOT / PACK / "model").absolute()
    log = Log(results)
    print(f"{' '.join(parts)}: at most {deadline:.0f} s, results in {results}", flush=True)
    problem = install_wheels(ROOT, sys.executable)
    if problem:
        log.line(f"the wheels in {PACK}/wheels cannot be installed: {problem}")
        print(f"the wheels in {PACK}/wheels cannot be installed: {problem}", flush=True)
    table = [filled(step, results, model, sys.executable) for step in steps(loop=variables.get("LOOP") == "1")]
    runner = Runner(log, deadline - (time.monotonic() - begin), environment_of_steps(variables, ROOT), ROOT)
    outcomes = runner.run([step for step in table if step.part in parts])
    log.close()
    text = screen(outcomes, log.measurements)
    (results / "summary.txt").write_text(text)
    print(text, end="", flush=True)
    return int(any(outcome.status in ("fail", "limit") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
