"""What sweeps found: a Markdown table of means over seeds, and the frontier as a figure.

    python experiments/summary.py SWEEP_DIRECTORY ... [--figure docs/figures/frontier.png]

The mean over runs that differ in the seed alone, and half the distance between the extremes. `plain` is the yardstick.
What `python -m tsae.evaluate RUN --release-ratio R` found of a run stands beside it, as RUN@R.
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

from tsae.evaluation.catalogue import METRICS, lookup

COLUMNS = tuple(
    METRICS[key]
    for key in (
        *("explained_variance", "ce_loss_score", "l0", "frac_alive"),
        *("temporal.persistence_excess", "temporal.persistence_excess_shuffled"),
        *("temporal.relative_difference.1", "temporal.relative_difference_per_feature.1", "temporal.smoothness"),
    )
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


def collect(directories: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Configuration -> the metrics of its seeds, of runs that ended well and of their other release ratios."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for directory in directories:
        for name, run in json.loads((directory / "sweep.json").read_text())["runs"].items():
            if run.get("metrics") is None:
                print(f"{name}: {run.get('error') or 'not finished'}")
                continue
            configuration = re.sub(r"-seed\d+$", "", name)
            found[configuration].append(run["metrics"])
            for path in sorted((directory / name).glob("eval-release-*.json")):
                measured = json.loads(path.read_text())
                if measured["source"]:
                    print(f"{path}: of other text, {measured['source']['data']}; left out")
                    continue
                found[f"{configuration}@{measured['release']['ratio']:g}"].append(measured)
    return dict(found)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """One row a configuration: means, and half ranges where there is more than one seed."""
    lines = [
        "| run | seeds | " + " | ".join(metric.column for metric in COLUMNS) + " |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    for name, runs in found.items():
        cells = []
        for metric in COLUMNS:
            values = [lookup(run, metric.key) for run in runs]
            spread = f" ± {metric.full((max(values) - min(values)) / 2)}" if len(values) > 1 else ""
            cells.append(metric.full(mean(values)) + spread)
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_plain(found: dict[str, list[dict[str, Any]]]) -> str:
    """Every configuration against `plain`, ratios and differences of means."""

    def average(name: str, key: str) -> float:
        return mean(lookup(run, key) for run in found[name])

    def over_control(name: str) -> float:
        return average(name, "temporal.persistence_excess") - average(name, "temporal.persistence_excess_shuffled")

    lines = [
        f"| against plain | {' | '.join(m.column for m in COLUMNS[:5])} | excess less control | "
        f"{' | '.join(m.column for m in COLUMNS[6:])} |",
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
            f"{average(name, COLUMNS[4].key) / average('plain', COLUMNS[4].key):.2f} x | "
            f"{over_control(name) / over_control('plain'):.2f} x | "
            + " | ".join(f"{average(name, m.key) / average('plain', m.key) - 1:+.1%}" for m in COLUMNS[6:])
            + " |"
        )
    return "\n".join(lines)


def figure(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Explained variance against persistence beyond chance; points of one family are joined."""
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
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    found = collect(arguments.sweeps)
    print(table(found))
    if "plain" in found:
        print("\n" + against_plain(found))
    if arguments.figure:
        figure(found, arguments.figure)


if __name__ == "__main__":
    main()
