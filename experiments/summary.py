"""Summarize sweeps: a Markdown table of means over seeds, and explained variance against persistence as a figure.

    python experiments/summary.py SWEEP ... [--figure docs/figures/frontier.png] [--json docs/results/frontier.json]

SWEEP is a sweep's directory or a file that `--json` wrote. Runs that differ in the seed alone are averaged; ± is half
the range over seeds. The second table compares every configuration with `plain`. Measurements of a run at another
release ratio (`python -m tsae.evaluate RUN --release-ratio R`) are listed as RUN@R.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from tsae.evaluation.catalogue import lookup

COLUMNS = (
    ("EV", "explained_variance", 4),
    ("CE score", "ce_loss_score", 4),
    ("L0", "l0", 1),
    ("alive", "frac_alive", 3),
    ("excess", "temporal.persistence_excess", 3),
    ("shuffled", "temporal.persistence_excess_shuffled", 3),
    ("lag 1 pooled", "temporal.relative_difference.1", 3),
    ("lag 1 per feature", "temporal.relative_difference_per_feature.1", 3),
    ("smoothness", "temporal.smoothness", 4),
)
COLOURS = {
    "plain": "#20252B",
    "schmitt": "#009E73",
    "hysteresis": "#009E73",
    "multiscale": "#0072B2",
    "window": "#E69F00",
    "default": "#D55E00",
}
OTHER = "#CC79A7"


Runs = dict[str, dict[str, Any]]  # name -> metrics


def read_sweep_directory(directory: Path) -> Runs:
    """The metrics of every finished run of a sweep, and of its evaluations at other release ratios (RUN@R)."""
    found: Runs = {}
    for name, run in json.loads((directory / "sweep.json").read_text())["runs"].items():
        if run.get("metrics") is None:
            print(f"{name}: {run.get('error') or 'not finished'}")
            continue
        found[name] = run["metrics"]
        for path in sorted((directory / name).glob("eval-release-*.json")):
            measured = json.loads(path.read_text())
            if measured["source"]:
                print(f"{path}: measured on other text, {measured['source']['data']}; left out")
                continue
            found[f"{name}@{measured['release']['ratio']:g}"] = measured
    return found


def read_sweeps(paths: list[Path]) -> dict[str, Runs]:
    """Sweep -> its runs, from sweep directories and from files that `write_json` wrote."""
    sweeps: dict[str, Runs] = {}
    for path in paths:
        sweeps |= {path.name: read_sweep_directory(path)} if path.is_dir() else json.loads(path.read_text())
    return sweeps


def write_json(sweeps: dict[str, Runs], path: Path) -> None:
    """Write the metrics that this script reads, one run per line."""

    def line(run: dict[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for _, key, _ in COLUMNS:
            *parents, leaf = key.split(".")
            inner = kept
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[leaf] = float(f"{lookup(run, key):.6g}")
        return kept

    blocks = [
        f"{json.dumps(sweep)}: {{\n"
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(line(run))}" for name, run in runs.items())
        + "\n}"
        for sweep, runs in sweeps.items()
    ]
    path.write_text("{" + ",\n".join(blocks) + "}\n")


def by_configuration(sweeps: dict[str, Runs]) -> dict[str, list[dict[str, Any]]]:
    """Configuration (a run's name without its seed) -> the metrics of its seeds."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for runs in sweeps.values():
        for name, run in runs.items():
            found[re.sub(r"-seed\d+(?=$|@)", "", name)].append(run)
    return dict(found)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """One row per configuration: the mean, and ± half the range if there are several seeds."""
    lines = [
        "| run | seeds | " + " | ".join(heading for heading, _, _ in COLUMNS) + " |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    for name, runs in found.items():
        cells = []
        for _, key, digits in COLUMNS:
            values = [lookup(run, key) for run in runs]
            spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_plain(found: dict[str, list[dict[str, Any]]]) -> str:
    """Every configuration against `plain`: differences and ratios of means."""

    def average(name: str, key: str) -> float:
        return mean(lookup(run, key) for run in found[name])

    def over_control(name: str) -> float:
        return average(name, "temporal.persistence_excess") - average(name, "temporal.persistence_excess_shuffled")

    lines = [
        "| against plain | EV | CE score | L0 | alive | excess | excess minus control | lag 1 pooled | per feature |"
        " smoothness |",
        "| --- " * 10 + "|",
    ]
    for name in found:
        if name == "plain":
            continue
        lines.append(
            f"| {name} | "
            f"{average(name, 'explained_variance') - average('plain', 'explained_variance'):+.4f} | "
            f"{average(name, 'ce_loss_score') - average('plain', 'ce_loss_score'):+.4f} | "
            f"{average(name, 'l0') / average('plain', 'l0') - 1:+.1%} | "
            f"{average(name, 'frac_alive') / average('plain', 'frac_alive'):.1%} | "
            f"{average(name, COLUMNS[4][1]) / average('plain', COLUMNS[4][1]):.2f} x | "
            f"{over_control(name) / over_control('plain'):.2f} x | "
            + " | ".join(f"{average(name, key) / average('plain', key) - 1:+.1%}" for _, key, _ in COLUMNS[6:])
            + " |"
        )
    return "\n".join(lines)


def figure(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Explained variance against persistence beyond chance; a line joins the points of one family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    families: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for name, runs in found.items():
        parts = re.fullmatch(r"(.+?)-([\d.]+)", name)
        family, value = parts.groups() if parts else (name, "")
        point = [
            mean(lookup(run, key) for run in runs) for key in ("temporal.persistence_excess", "explained_variance")
        ]
        families[family].append((point[0], point[1], value))
    for family, points in families.items():
        colour = COLOURS.get(family, OTHER)
        ordered = sorted(points, key=lambda point: float(point[2]) if point[2] else 0.0)
        style = {"marker": "*", "markersize": 13} if family == "default" else {"marker": "o"}
        axes.plot(*zip(*[point[:2] for point in ordered], strict=True), color=colour, label=family, **style)
        for x, y, value in ordered:
            axes.annotate(value, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, color=colour)
    axes.set_xlabel("persistence beyond chance (probability)")
    axes.set_ylabel("explained variance (share)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--figure", type=Path, help="draw explained variance against persistence into this file")
    parser.add_argument("--json", type=Path, help="write the metrics of every run in compact form into this file")
    arguments = parser.parse_args()
    sweeps = read_sweeps(arguments.sweeps)
    if arguments.json:
        write_json(sweeps, arguments.json)
    found = by_configuration(sweeps)
    print(table(found))
    if "plain" in found:
        print("\n" + against_plain(found))
    if arguments.figure:
        figure(found, arguments.figure)


if __name__ == "__main__":
    main()
