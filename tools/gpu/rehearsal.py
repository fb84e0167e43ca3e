"""`make gpu-rehearsal`: `make gpu-check` without a GPU, so that no typing error costs time on one.

1. Every command of `parts.py` is checked: pytest collects a test with its paths and its -k, modules parse their
   arguments, the options of CUDA's programs are among those known here.
2. The programs of `tools/gpu` run on the CPU at a tiny size.
3. All steps run as in `make gpu-check`, in the same order, with a stand-in for each command; then with stand-ins that
   fail, do not end, or ignore an interruption, and with too little time.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tools.gpu import runner, verdicts
from tools.gpu.check import ROOT, environment_of_steps
from tools.gpu.parts import PARTS, Step, filled, steps
from tools.gpu.runner import Log, Outcome, Runner

# Options of CUDA's programs that the steps may use, and whether each takes a value.
OPTIONS = {
    "compute-sanitizer": {"--tool": True, "--error-exitcode": True},
    "ncu": {"--clock-control": True, "--section": True},
    "nvidia-smi": {},
}
TOOLS = {"memcheck", "racecheck", "initcheck", "synccheck"}
SECTIONS = {"SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis"}
TINY = {
    "tools.gpu.quick": ["--device", "cpu", "--shape", "2,20,4", "--rounds", "1"],
    "tools.gpu.every_launch": ["--device", "cpu"],
}


class RehearsalError(Exception):
    """A step that would not do what it should."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RehearsalError(message)


def without_program(step: Step) -> tuple[str, ...]:
    """The Python command that a program of CUDA is to run, its own options checked; () if there is none."""
    program, *rest = step.command
    require(program in OPTIONS, f"{step.name}: {program} is not a program that the rehearsal knows")
    known = OPTIONS[program]
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        require(option in known, f"{step.name}: {program} has no option {option} that the rehearsal knows")
        if known[option]:
            value = rest.pop(0)
            require(option != "--tool" or value in TOOLS, f"{step.name}: there is no tool {value}")
            require(option != "--section" or value in SECTIONS, f"{step.name}: there is no section {value}")
    return tuple(rest)


def collected(arguments: Sequence[str]) -> tuple[int, str]:
    """How many tests pytest collects with these arguments, and what it prints."""
    import pytest

    class Count:
        number = 0

        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.number = len(session.items)

    count, output = Count(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = pytest.main([*arguments, "--collect-only", "-q", "-p", "no:xdist"], plugins=[count])
    return count.number if status == 0 else 0, output.getvalue()


def check_pytest(step: Step, arguments: Sequence[str]) -> int:
    """The number of tests that a step collects. Raises RehearsalError if there are none."""
    kept = list(arguments)
    if "-n" in kept:  # options of a plugin that is not loaded to collect
        begin = kept.index("-n")
        require(kept[begin + 1].isdigit() and kept[begin + 2 : begin + 3] == ["--maxprocesses"], f"{step.name}: {kept}")
        del kept[begin : begin + 4]
    kept = [each for each in kept if not each.startswith("--benchmark-json=")]
    number, output = collected(kept)
    require(number > 0, f"{step.name}: pytest collects no test with {' '.join(arguments)}\n{output}")
    return number


def check_training(step: Step, options: Sequence[str]) -> None:
    """Parse the options of a training run."""
    from tsae.errors import UserError
    from tsae.train import command

    try:
        command([*options, "--out", "run"])[0].check()
    except (UserError, SystemExit) as error:
        raise RehearsalError(f"{step.name}: tsae.train does not take {' '.join(options)}: {error}") from error


def run_tiny(step: Step, module: str, arguments: Sequence[str]) -> None:
    """Run a module of tools/gpu on the CPU; options given twice take the last value."""
    import importlib

    from tsae_kernels import available_backends

    backend = "cpp" if available_backends()["cpp"] == "ok" else "eager"
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = importlib.import_module(module).main([*arguments, *TINY[module], "--backends", backend])
        except SystemExit as error:
            status = error.code
    require(status == 0, f"{step.name}: {module} {' '.join(arguments)} failed\n{output.getvalue()}")


def check_command(step: Step) -> str:
    """What was checked of a step's command. Raises RehearsalError if it would not work."""
    command = step.command
    if command[0] != sys.executable:
        command = without_program(step)
        if not command:
            return "its options"
    if command[1] == "-m":
        module, arguments = command[2], command[3:]
        if module == "pytest":
            return f"collects {check_pytest(step, arguments)} tests"
        if module in TINY:
            run_tiny(step, module, arguments)
            return "runs at a tiny size"
        if module == "tools.gpu.train":
            require(arguments[0] == "--lines", f"{step.name}: the first option must be --lines")
            check_training(step, arguments[2:])
            return "its options"
        if module == "tools.gpu.probe":
            import tools.gpu.probe as probe

            expected = 0 if "--imports" in arguments else int(not torch.cuda.is_available())
            with contextlib.redirect_stdout(io.StringIO()):
                require(probe.main(arguments) == expected, f"{step.name} failed")
            return "runs"
        if module == "tools.gpu.small_model":
            import tools.gpu.small_model as small_model

            require(callable(small_model.unpack) and arguments[0] == "unpack", f"{step.name}: {arguments}")
            return "its options"
    elif command[1:] == ("setup.py", "build_ext", "--inplace"):
        require((ROOT / "setup.py").is_file(), "there is no setup.py")
        return "its options"
    raise RehearsalError(f"{step.name}: the rehearsal cannot check {' '.join(step.command)}")


STAND_IN = """
import sys, time
print("3 passed, 1 skipped in 0.01s", flush=True)
"""
FAILS = "print('FAILED tests/a.py::test_b - AssertionError'); print('1 failed, 2 passed in 0.01s'); raise SystemExit(1)"
HANGS = """
import time
try:
    print("working", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("2 passed in 0.30s")
    raise SystemExit(2)
"""
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


def stand_in(step: Step, code: str = STAND_IN, limit: int | None = None) -> Step:
    """The step with another command, and without what it needs."""
    command = (sys.executable, "-S", "-c", code)
    return step._replace(command=command, needs=(), unless=(), limit=limit or step.limit)


def play(table: Sequence[Step], deadline: float, folder: Path) -> tuple[list[Outcome], str]:
    """Run stand-ins; the outcomes and the last screen."""
    log = Log(folder)
    outcomes = Runner(log, deadline, environment_of_steps(os.environ, ROOT), ROOT).run(table)
    log.close()
    recorded = [line["outcome"] for line in verdicts.read(log.measurements) if "outcome" in line]
    require(
        recorded == [o._asdict() | {"failures": list(o.failures)} for o in outcomes], "not every outcome is recorded"
    )
    text = verdicts.screen(outcomes, log.measurements)
    require(len(text.splitlines()) <= verdicts.LINES, f"the last screen has {len(text.splitlines())} lines")
    return outcomes, text


def statuses(outcomes: Sequence[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def rehearse_order(table: Sequence[Step], folder: Path) -> str:
    """Every step is reached, in the order of the table; the last screen."""
    outcomes, text = play([stand_in(step) for step in table], 300, folder)
    require([o.name for o in outcomes] == [step.name for step in table], "the steps ran in another order")
    require(set(statuses(outcomes)) == {"pass"}, f"a stand-in did not pass: {outcomes}")
    require({o.detail for o in outcomes} == {"3 passed, 1 skipped"}, "pytest's counts are not found")
    require({step.part for step in table} == set(PARTS), f"the parts must be {' '.join(PARTS)}")
    return text


def rehearse_trouble(table: Sequence[Step], folder: Path) -> str:
    """A failure, an interruption and a kill are told apart, and what comes after them still runs; the last screen."""
    a, b, c, d = table[2:6]
    trouble = [stand_in(a._replace(essential=False), FAILS), stand_in(b, HANGS, 1), stand_in(c, DEAF, 1), stand_in(d)]
    outcomes, text = play(trouble, 300, folder / "trouble")
    require(statuses(outcomes) == ["fail", "limit", "limit", "pass"], f"wrong outcomes: {outcomes}")
    require(outcomes[0].failures == ("FAILED tests/a.py::test_b - AssertionError",), "a failed test is not named")
    require(outcomes[1].detail == "2 passed", "what an interrupted step prints is lost")
    none_left, _ = play([stand_in(step) for step in table[:2]], runner.GRACE + runner.LEAST - 1, folder / "late")
    require(set(statuses(none_left)) == {"not reached"}, f"steps ran after the deadline: {none_left}")
    essential, _ = play([stand_in(a._replace(essential=True), FAILS), stand_in(b)], 300, folder / "essential")
    require(statuses(essential) == ["fail", "not reached"], f"an essential step did not end it: {essential}")
    return text


@contextlib.contextmanager
def short_grace(seconds: float) -> Iterator[None]:
    real = runner.GRACE
    runner.GRACE = seconds
    try:
        yield
    finally:
        runner.GRACE = real


def main() -> int:
    begin = time.monotonic()
    os.chdir(ROOT)
    sys.argv[0] = "pytest"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        table = [filled(step, place, place / "model", sys.executable) for step in steps(loop=True)]
        try:
            os.environ.setdefault("TRITON_INTERPRET", "1")
            import tools.gpu.pretend  # noqa: F401  before anything reads the table of backends

            checked: dict[tuple[str, ...], str] = {}
            for step in table:
                command = step.command if step.command[0] == sys.executable else without_program(step)
                if command not in checked:  # the tools of compute-sanitizer run the same one
                    checked[command] = check_command(step)
                print(f"{step.part}: {step.name}: {checked[command]}", flush=True)
            with short_grace(1):
                text = rehearse_order(table, place / "order") + "\n" + rehearse_trouble(table, place)
        except RehearsalError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print("\n" + text)
        print(f"rehearsed {len(table)} steps in {time.monotonic() - begin:.0f} s; nothing ran on a GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
