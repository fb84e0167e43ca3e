"""Runs steps under a deadline: output and outcomes are on disk as they come, and a step is interrupted at its limit."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from tools.gpu.parts import Step

GRACE = 12.0
"""Seconds between SIGINT and SIGKILL: for pytest to print its table and write its JSON.

After a quarter of them what the step has started is killed, because pytest waits that long for each of its workers.
"""

LEAST = 5.0
"""A step is not started with fewer seconds left."""

KEPT = 2**20
"""Characters of a step's output that the log keeps."""

_COUNTS = re.compile(r"\b(\d+) (passed|failed|errors?|skipped)\b")


class Outcome(NamedTuple):
    """What became of a step.

    status: "pass", "fail", "limit" (interrupted), "skipped" (something is missing) or "not reached" (no time left)
    detail: the counts of pytest, the reason for skipping, or the exit code
    failures: names of failed tests, or the last lines of another program that failed
    """

    part: str
    name: str
    status: str
    seconds: float
    detail: str = ""
    failures: tuple[str, ...] = ()


class Log:
    """The log and the file of measurements; both are flushed line by line."""

    def __init__(self, results: Path) -> None:
        results.mkdir(parents=True, exist_ok=True)
        self.measurements = results / "measurements.jsonl"
        self._file = (results / "log.txt").open("a", buffering=1, encoding="utf-8", errors="replace")
        self._lock = threading.Lock()

    def line(self, text: str) -> None:
        with self._lock:
            self._file.write(text.rstrip("\n") + "\n")

    def measurement(self, values: Mapping[str, Any]) -> None:
        with self._lock, self.measurements.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        self._file.close()


def restore_sigint() -> None:
    """In a step's process: SIGINT interrupts it, although this program ignores it when a script started it with `&`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Child:
    """A step's process, its output copied to the log line by line."""

    def __init__(self, step: Step, log: Log, environment: Mapping[str, str], folder: Path) -> None:
        self.step, self._log = step, log
        self.begin = time.monotonic()
        self.interrupted = False
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**environment, **dict(step.environment)},
            cwd=folder,
            start_new_session=True,  # so that a signal reaches all of its processes
            preexec_fn=restore_sigint,
        )
        self._copier = threading.Thread(target=self._copy, args=(self.process.stdout,), daemon=True)
        self._copier.start()

    def _copy(self, stream: IO[str]) -> None:
        length = 0
        for line in stream:
            self.lines.append(line.rstrip("\n"))
            length += len(line)
            if length <= KEPT:
                self._log.line(f"[{self.step.name}] {line}")

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _kill_started(self) -> None:
        """SIGKILL for every process of the step's group but the first."""
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):
                group = int(file.read_text().rpartition(")")[2].split()[2])
                if group == self.process.pid != int(file.parent.name):
                    os.kill(int(file.parent.name), signal.SIGKILL)

    def wait(self, until: float) -> None:
        """Wait for its end; at the time `until` interrupt it, and kill it if it does not end."""
        try:
            self.process.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self.interrupted = True
            self._send(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE / 4)
            self._kill_started()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3 * GRACE / 4)
        self._send(signal.SIGKILL)  # what it started and left running, too
        self.process.wait()
        self._copier.join(GRACE)

    def outcome(self) -> Outcome:
        code = self.process.returncode
        status = "limit" if self.interrupted else "fail" if code else "pass"
        detail = summary(self.lines) or (f"exit code {code}" if code else "")
        failures = [line for line in self.lines if line.startswith(("FAILED ", "ERROR "))]
        if not failures and status != "pass":
            failures = [line for line in self.lines if line.strip()][-3:]
        return Outcome(self.step.part, self.step.name, status, time.monotonic() - self.begin, detail, tuple(failures))


def summary(lines: Sequence[str]) -> str:
    """pytest's counts in its last line that has any: "3 failed, 10 passed"; "" if there are none."""
    for line in reversed(lines):
        counts = _COUNTS.findall(line)
        if counts and " in " in line:
            return ", ".join(f"{number} {what}" for number, what in counts)
    return ""


def missing(need: str, environment: Mapping[str, str], folder: Path) -> str:
    """Why a step with this need cannot run; "" if it can."""
    kind, _, name = need.partition(":")
    if kind == "program":
        return "" if shutil.which(name, path=environment.get("PATH")) else f"{name} is not on the PATH"
    if kind == "file":
        return "" if (folder / name).exists() else f"there is no {name}"
    if kind == "module":
        places = [Path(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        if any((place / name).is_dir() or (place / f"{name}.py").is_file() for place in places):
            return ""
        return "" if importlib.util.find_spec(name) else f"the Python package {name} is not installed"
    raise ValueError(f"a need must be program:, module: or file:, got {need!r}")


class Runner:
    """Runs steps until `deadline` (seconds from now). environment: that of the steps; folder: where they run."""

    def __init__(self, log: Log, deadline: float, environment: Mapping[str, str], folder: Path) -> None:
        self._log, self._environment, self._folder = log, environment, folder
        self._end = time.monotonic() + deadline
        self.outcomes: list[Outcome] = []
        self._stop = ""

    def left(self) -> float:
        """Seconds that a step may take, with time for its end and for the report."""
        return self._end - time.monotonic() - GRACE

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        numbered = enumerate(steps)
        for _, group in itertools.groupby(numbered, key=lambda item: item[1].together or item[0]):
            self._run_together([step for _, step in group])
        return self.outcomes

    def _run_together(self, steps: Sequence[Step]) -> None:
        ready = []
        for step in steps:
            reason = self._reason(step)
            if reason is None:
                ready.append(step)
            else:
                self._keep(Outcome(step.part, step.name, *reason))
        children = []
        for step in ready:
            self._log.line(f"== {step.part}: {step.name}: {' '.join(step.command)}")
            try:
                children.append(Child(step, self._log, self._environment, self._folder))
            except OSError as error:
                self._keep(Outcome(step.part, step.name, "fail", 0.0, str(error)))
        until = [child.begin + min(child.step.limit, max(self.left(), 0)) for child in children]
        waiting = [threading.Thread(target=child.wait, args=(end,)) for child, end in zip(children, until, strict=True)]
        for thread in waiting:  # so that all are interrupted at once
            thread.start()
        for thread in waiting:
            thread.join()
        for child in children:
            self._keep(child.outcome())
            if child.step.essential and self.outcomes[-1].status != "pass":
                self._stop = f"{child.step.name} failed"

    def _reason(self, step: Step) -> tuple[str, float, str] | None:
        """Status, seconds and detail of a step that does not run, else None."""
        if self._stop:
            return "not reached", 0.0, self._stop
        reasons = [reason for need in step.needs if (reason := missing(need, self._environment, self._folder))]
        if step.unless and self.left() >= LEAST and self._succeeds(step.unless):
            return "skipped", 0.0, "not necessary"
        if reasons:
            return "skipped", 0.0, "; ".join(reasons)
        if self.left() < LEAST:
            return "not reached", 0.0, "no time left"
        return None

    def _succeeds(self, command: Sequence[str]) -> bool:
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                env=self._environment,
                cwd=self._folder,
                timeout=max(min(self.left(), 60), 1),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return result.returncode == 0

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._log.measurement({"part": outcome.part, "outcome": outcome._asdict()})
        self._log.line(f"== {outcome.part}: {outcome.name}: {outcome.status}, {outcome.seconds:.1f} s {outcome.detail}")
