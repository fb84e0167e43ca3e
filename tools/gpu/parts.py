"""The steps of `make gpu-check`, in the order they run: what is worth most comes first.

To check another kernel, add a case to `quick.py` and `every_launch.py`, or a `Step` here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

PARTS = ("probe", "quick", "tests", "sanitizer", "step", "train", "bench", "profile")

PYTHON, RESULTS, MODEL, MEASUREMENTS = "{python}", "{results}", "{model}", "{measurements}"
"""In a command: the interpreter, the folder of results, the small model's folder, the file of measurements."""


class Step(NamedTuple):
    """One command.

    limit: seconds after which it gets SIGINT, and SIGKILL if it is still there after `runner.GRACE`
    needs: what must be there, else the step is skipped with the reason: `program:NAME`, `module:NAME`, `file:PATH`
    unless: the step is skipped if this command succeeds
    together: neighbouring steps with the same name here run side by side
    essential: if it fails, nothing else runs
    """

    part: str
    name: str
    command: tuple[str, ...]
    limit: int
    needs: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    together: str = ""
    essential: bool = False


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", name, *arguments)


def pytest(*arguments: str, workers: int = 0) -> tuple[str, ...]:
    """pytest that reports failures and the slowest tests, on `workers` processes if it has the plugin."""
    parallel = workers and importlib.util.find_spec("xdist") is not None
    more = ("-n", str(workers), "--maxprocesses", str(workers)) if parallel else ()
    return module("pytest", *arguments, "-p", "no:cacheprovider", "-rfE", "--durations=5", *more)


KERNELS = "tests/tsae_kernels"
SLOWEST = "not gradcheck_of_every_output and not gradcheck_at_many_lengths"
"""Of Triton's tests these two functions take most of the time: they compile kernels for hundreds of shapes."""

ONE_THREAD = (("OMP_NUM_THREADS", "1"),)
BUILT = "import sys, tsae_kernels.backends.extension as e; sys.exit(not e.load_cuda_library().built_for)"


def sanitizer(tool: str, *environment: tuple[str, str]) -> Step:
    return Step(
        "sanitizer",
        tool,
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *module("tools.gpu.every_launch")),
        90,
        needs=("program:compute-sanitizer",),
        environment=environment,
        together="sanitizer",
    )


def benchmarks(name: str, path: str, limit: int, *, compiled: str = "none", needs: tuple[str, ...] = ()) -> Step:
    json = f"--benchmark-json={RESULTS}/{name.replace(' ', '-')}.json"
    environment = (("TSAE_BENCH_LINES", MEASUREMENTS), ("TSAE_BENCH_COMPILED", compiled))
    part = "step" if "training_step" in path else "bench"
    selection = ("-k", "test_case or test_schmitt or test_bar") if compiled != "none" else ()
    needs = ("module:pytest_benchmark", *needs)
    return Step(part, name, pytest(path, *selection, json), limit, needs=needs, environment=environment)


def steps(loop: bool = False) -> list[Step]:
    """Every step. loop: also compile PyTorch's loop over 127 offsets, which takes minutes."""
    tsae = ("module:tyro",)
    out = [
        Step("probe", "device", module("tools.gpu.probe", "--lines", MEASUREMENTS), 60, essential=True),
        Step("probe", "nvidia-smi", ("nvidia-smi",), 20, needs=("program:nvidia-smi",)),
        Step(
            "probe",
            "build",
            (PYTHON, "setup.py", "build_ext", "--inplace"),
            200,
            unless=(PYTHON, "-c", BUILT),
            needs=("program:nvcc",),
            environment=(("TSAE_BUILD", "cuda"),),
        ),
        Step("probe", "imports", module("tools.gpu.probe", "--imports", "--lines", MEASUREMENTS), 45),
        Step("quick", "quick", module("tools.gpu.quick", "--lines", MEASUREMENTS), 100),
        Step("tests", "cuda", pytest(f"{KERNELS}/test_kernels_cuda.py"), 60),
        Step(
            "tests",
            "backend cuda elsewhere",
            pytest(
                KERNELS,
                f"--ignore={KERNELS}/test_kernels_cuda.py",
                f"--ignore={KERNELS}/test_kernels_cuda_emulation.py",
                "-m",
                "not slow",
                "-k",
                "cuda and not triton",
                workers=8,
            ),
            75,
            environment=ONE_THREAD,
        ),
        sanitizer("memcheck", ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")),  # the allocator hides the ends of tensors
        sanitizer("racecheck"),
        sanitizer("initcheck"),
        Step("tests", "trainer", pytest("tests/training/test_training_cuda.py"), 90, needs=tsae),
        Step(
            "tests",
            "triton",
            pytest(KERNELS, "-m", "not slow", "-k", f"triton and not cuda and {SLOWEST}", workers=12),
            150,
            environment=ONE_THREAD,
        ),
        benchmarks("training step", "benchmarks/test_training_step.py", 90, needs=tsae),
        Step(
            "train",
            "unpack",
            module("tools.gpu.small_model", "unpack", MODEL, f"{MODEL}/unpacked"),
            60,
            needs=(f"file:{MODEL}/packed.gguf", "module:gguf", *tsae),
        ),
        Step(
            "train",
            "demo",
            module(
                "tools.gpu.train",
                "--lines",
                MEASUREMENTS,
                "demo",
                "--device",
                "cuda",
                "--model",
                f"{MODEL}/unpacked",
                "--data",
                f"{MODEL}/text.jsonl",
                "--steps",
                "400",
                "--evaluation.sequences",
                "64",
            ),
            120,
            needs=(f"file:{MODEL}/packed.gguf", "module:gguf", *tsae),
        ),
        benchmarks("kernels", "benchmarks/test_kernels.py", 180),
        benchmarks("transitions", "benchmarks/test_transitions.py", 45),
        benchmarks("harvest", "benchmarks/test_harvest.py", 45, needs=tsae),
        Step(
            "profile",
            "ncu",
            (
                *("ncu", "--clock-control", "none", "--section", "SpeedOfLight", "--section", "Occupancy"),
                *("--section", "WarpStateStats", *module("tools.gpu.quick", "--once", "--shape", "256,128,2304")),
            ),
            60,
            needs=("program:ncu",),
        ),
        benchmarks("compiled", "benchmarks/test_kernels.py", 240, compiled="most"),
    ]
    if loop:
        out.append(benchmarks("compiled loop", "benchmarks/test_kernels.py", 420, compiled="all"))
    return out


def filled(step: Step, results: Path, model: Path, python: str) -> Step:
    """The step with the placeholders of its command, needs and environment replaced."""
    values = {PYTHON: python, RESULTS: str(results), MODEL: str(model)}
    values[MEASUREMENTS] = str(results / "measurements.jsonl")

    def fill(text: str) -> str:
        for placeholder, value in values.items():
            text = text.replace(placeholder, value)
        return text

    return step._replace(
        command=tuple(map(fill, step.command)),
        needs=tuple(map(fill, step.needs)),
        unless=tuple(map(fill, step.unless)),
        environment=tuple((name, fill(value)) for name, value in step.environment),
    )
