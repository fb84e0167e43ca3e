"""The last screen of `make gpu-check`: what became of each step, and the figures beside their targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.gpu.runner import Outcome

LINES, WIDTH = 100, 150
FAILURES = 4
"""Failed tests or last lines of output that are shown per step."""

SHARE = 0.85
"""Of the copy's bandwidth that statistics, forward and backward pass must reach."""

EAGER_LOOP, BEST_COMPILED = 50.0, 3.0
"""How many times faster than these alternatives the default backend must be, forward and backward."""

TRIGGER, PER_ELEMENT, SAE_LENS = 1.15, 1.10, 0.60
"""The most time relative to relu, to T = 128, and to a training step of SAELens."""

BOTH = "forward + backward"


class Figure(NamedTuple):
    """A figure. target: the least value or, if `at_most`, the largest; None if there is none."""

    name: str
    value: float
    unit: str = ""
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.target is None or (self.value <= self.target if self.at_most else self.value >= self.target)

    def __str__(self) -> str:
        text = f"{self.name}: {self.value:.3g}{self.unit}"
        if self.target is None:
            return f"       {text}"
        sign = "<=" if self.at_most else ">="
        return f"{'ok    ' if self.met else 'MISSED'} {text} (target {sign} {self.target:g})"


def read(measurements: Path) -> list[dict[str, Any]]:
    """The measurements; a line cut short by the end of a process is left out."""
    out = []
    for line in measurements.read_text().splitlines() if measurements.exists() else ():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def quick_figures(lines: Sequence[dict[str, Any]]) -> list[Figure]:
    """Shares of the copy's bandwidth, of every backend in bfloat16 and float32; targets for bfloat16."""
    out = []
    for line in lines:
        if line.get("part") != "quick" or "backend" not in line:
            continue
        target = SHARE if line["dtype"] == "bfloat16" and line["case"] == "relu" else None
        for name in ("statistics", "forward", "backward"):
            share = line.get(f"{name}_of_copy")
            if share is not None:
                label = f"{line['backend']} {name}, {line['dtype']} {line['case']}, of copy bandwidth"
                out.append(Figure(label, share, target=target))
    return out


def benchmark_figures(lines: Sequence[dict[str, Any]]) -> list[Figure]:
    """What the speed requirements of benchmarks/ ask for, from the measurements that were taken."""
    out = []
    cases = {line["case"]: line for line in lines if line.get("part") == "benchmarks" and not line.get("smoke")}
    for name in (f"statistics, {p}" for p in ("forward", "backward")):
        out += _share(cases, name)
    for name in (f"relu, {p}" for p in ("forward", "backward")):
        out += _share(cases, name)
    relu = cases.get(f"relu, {BOTH}")
    if relu:
        times, own = _times(relu), relu["own"]
        if "eager loop" in times:
            out.append(Figure(f"{own} against the eager loop", times["eager loop"] / times[own], " x", EAGER_LOOP))
        compiled = {name: value for name, value in times.items() if name.endswith(", compiled")}
        if compiled:
            best = min(compiled, key=lambda name: compiled[name])
            out.append(Figure(f"{own} against {best}", compiled[best] / times[own], " x", BEST_COMPILED))
        backends = [row["variant"] for row in relu["rows"] if row["kind"] == "backend"]
        out += [Figure(f"{name}, {BOTH}", 1e3 * times[name], " ms") for name in backends]
    out += _ratio(cases, f"schmitt, {BOTH}", "{own}", "{own}, relu only", TRIGGER)
    for length in (512, 2048):
        out += _ratio(cases, "time per element", f"{{backend}}, T = {length}", "{own}", PER_ELEMENT)
    out += _ratio(cases, f"packed segments, {BOTH}", "{own}", "{own}, whole sequences", None)
    for precision in ("bfloat16 autocast", "float32"):
        case = cases.get(f"training step, {precision}")
        if case:
            out.append(Figure(f"training step, {precision}", case["notes"]["tokens per second"], " tokens/s"))
            target = SAE_LENS if "autocast" in precision else None
            out += _ratio(cases, f"training step, {precision}", "{own}", "SAELens TopK", target)
    return out


def _times(case: dict[str, Any]) -> dict[str, float]:
    return {row["variant"]: row["seconds"] for row in case["rows"]}


def _share(cases: dict[str, dict[str, Any]], name: str) -> list[Figure]:
    """Own bandwidth of a case as a fraction of the copy's."""
    case = cases.get(name)
    if case is None:
        return []
    copy = next((row for row in case["rows"] if row["kind"] == "copy"), None)
    own = next(row for row in case["rows"] if row["variant"] == case["own"])
    if copy is None or not own["bytes"]:
        return []
    share = (own["bytes"] / own["seconds"]) / (2 * case["tensor_bytes"] / copy["seconds"])
    return [Figure(f"{case['own']} {name}, of copy bandwidth (benchmark)", share, target=SHARE)]


def _ratio(cases: dict[str, dict[str, Any]], name: str, variant: str, base: str, target: float | None) -> list[Figure]:
    """The time of one variant relative to another's, at most `target`."""
    case = cases.get(name)
    if case is None:
        return []
    times, own = _times(case), case["own"]
    names = [text.format(own=own, backend=own.split(",")[0]) for text in (variant, base)]
    if not set(names) <= set(times):
        return []
    value = times[names[0]] / times[names[1]]
    return [Figure(f"{name}: {names[0]} / {names[1]}", value, " x", target, at_most=True)]


def train_figures(lines: Sequence[dict[str, Any]]) -> list[Figure]:
    out = []
    for line in lines:
        if line.get("part") == "train" and "tokens_per_second" in line:
            out.append(Figure("demo on the small model", line["tokens_per_second"], " tokens/s"))
            out += [Figure(f"demo: {name}", line[name]) for name in ("explained_variance", "l0") if name in line]
    return out


def screen(outcomes: Sequence[Outcome], measurements: Path) -> str:
    """At most `LINES` lines: the machine, the steps with what failed, the figures; figures give way to failures."""
    lines = read(measurements)
    device = [line for line in lines if line.get("part") == "probe" and "device" in line]
    head = [
        f"{d['device']}, driver {d.get('driver', '?')}, torch {d['torch']}, triton {d['triton']}" for d in device[-1:]
    ]
    head.append("")
    for outcome in outcomes:
        status = outcome.status.upper() if outcome.status in ("fail", "limit") else outcome.status
        head.append(f"{status:11} {outcome.part}: {outcome.name}, {outcome.seconds:.0f} s  {outcome.detail}")
        head += [f"{'':12}{failure}" for failure in outcome.failures[:FAILURES]]
        if len(outcome.failures) > FAILURES:
            head.append(f"{'':12}and {len(outcome.failures) - FAILURES} more, see log.txt")
    figures = [*quick_figures(lines), *benchmark_figures(lines), *train_figures(lines)]
    figures.sort(key=lambda figure: (figure.met, figure.target is None))  # the missed ones first, then targets
    missed = sum(not figure.met for figure in figures)
    targets = sum(figure.target is not None for figure in figures)
    counts = {status: sum(o.status == status for o in outcomes) for status in dict.fromkeys(o.status for o in outcomes)}
    last = f"{', '.join(f'{n} {status}' for status, n in counts.items())}; {targets - missed} of {targets} targets met"
    body = [*head[: LINES - 10], "", *map(str, figures)][: LINES - 2]
    return "\n".join(line[:WIDTH] for line in [*body, "", last]) + "\n"
