"""Summarize sweeps: Markdown tables of means over seeds, and explained variance against bits as a figure.

    python experiments/summary.py SWEEP ... [--figure docs/figures/frontier.png] [--json docs/results/frontier.json]

SWEEP is a sweep's directory or a file that `--json` wrote. Runs that differ in the seed alone are averaged; ± is half
the range over seeds. The second table compares every configuration with `plain`, or with the one that `--against`
names; the third compares its bits with those of the best baseline at equal explained variance
(`tsae.reports.frontier`): for that, the baselines are measured at two sizes or more, `plain-k30-seed0`,
`plain-k36-seed0`. `--at 0.915` adds the bits of all methods at one explained variance. Measurements of a run at another
release ratio (`python -m tsae.evaluate RUN --release-ratio R`) are listed as RUN@R.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from tsae.evaluation.catalogue import lookup
from tsae.reports.frontier import (
    BASELINES,
    CE,
    EV,
    SUPPORT,
    TOTAL,
    Estimate,
    Frontier,
    difference_at_equal,
    run_name,
)

# Quality and bits stand first.
COLUMNS = (
    ("EV", EV, 4),
    ("EV without massive", "massive.explained_variance_without", 4),
    ("support bits", SUPPORT, 1),
    ("total bits", TOTAL, 1),
    ("CE score", CE, 4),
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
    "rate": "#D55E00",
    "demo": "#D55E00",
}
OTHER = "#CC79A7"
POINT: dict[str, Any] = {"marker": "o", "markersize": 4.5}
OURS: dict[str, dict[str, Any]] = {
    "rate": {"marker": "*", "markersize": 11},
    "demo": {"marker": "D", "markersize": 7, "markerfacecolor": "none"},
}
"""Markers of our methods in the figure; the others have `POINT`."""
EXCESS, SHUFFLED = "temporal.persistence_excess", "temporal.persistence_excess_shuffled"
STEPS = tuple(key for _, key, _ in COLUMNS[-3:])
"""Relative differences at lag 1, and smoothness."""


Runs = dict[str, dict[str, Any]]  # name -> metrics
Named = list[tuple[str, dict[str, Any]]]


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
            if not measured(run, key):
                continue
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


def measured(run: dict[str, Any], key: str) -> bool:
    """Whether a run has the metric; those of earlier versions lack some."""
    value = lookup(run, key)
    return isinstance(value, (int, float)) and math.isfinite(value)


def by_configuration(sweeps: dict[str, Runs]) -> dict[str, list[dict[str, Any]]]:
    """Configuration (a run's name without its seed) -> the metrics of its seeds."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for runs in sweeps.values():
        for name, run in runs.items():
            found[without_seed(name)].append(run)
    return dict(found)


def without_seed(name: str) -> str:
    """The name of a run without its seed."""
    seed = run_name(name).seed
    return name.replace(f"-seed{seed}", "", 1) if seed else name


def of_seed(sweeps: dict[str, Runs], seed: str) -> dict[str, Runs]:
    """The runs whose name ends with this seed."""
    return {
        sweep: {name: run for name, run in runs.items() if run_name(name).seed == seed}
        for sweep, runs in sweeps.items()
    }


def named(sweeps: dict[str, Runs]) -> Named:
    """The runs of all sweeps."""
    return [run for runs in sweeps.values() for run in runs.items()]


def average(found: dict[str, list[dict[str, Any]]], name: str, key: str) -> float:
    """The mean over seeds; NaN if a seed lacks the metric."""
    return mean(lookup(run, key) if measured(run, key) else math.nan for run in found[name])


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """One row per configuration: the mean, and ± half the range over seeds. Columns that any run has."""
    columns = [column for column in COLUMNS if any(measured(run, column[1]) for runs in found.values() for run in runs)]
    lines = [
        "| run | seeds | " + " | ".join(heading for heading, _, _ in columns) + " |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    for name, runs in found.items():
        cells = []
        for _, key, digits in columns:
            if not all(measured(run, key) for run in runs):
                cells.append("–")
                continue
            values = [lookup(run, key) for run in runs]
            spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against(found: dict[str, list[dict[str, Any]]], reference: str = "plain") -> str:
    """Every configuration against one of them: differences and ratios of means. Not at equal explained variance."""

    def difference(name: str, key: str) -> str:
        return f"{average(found, name, key) - average(found, reference, key):+.4f}"

    def change(name: str, key: str) -> str:
        return f"{average(found, name, key) / average(found, reference, key) - 1:+.1%}"

    def over_control(name: str) -> float:
        return average(found, name, EXCESS) - average(found, name, SHUFFLED)

    bits = [
        (heading, key)
        for heading, key in (("support bits", SUPPORT), ("total bits", TOTAL))
        if all(measured(run, key) for run in found[reference])
    ]
    heads = [f"against {reference}", "EV", *(heading for heading, _ in bits), "CE score", "L0", "alive", "excess"]
    heads += ["excess minus control", "lag 1 pooled", "per feature", "smoothness"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name in found:
        if name == reference:
            continue
        cells = [name, difference(name, EV), *(change(name, key) for _, key in bits), difference(name, CE)]
        cells += [
            change(name, "l0"),
            f"{average(found, name, 'frac_alive') / average(found, reference, 'frac_alive'):.1%}",
        ]
        cells += [f"{average(found, name, EXCESS) / average(found, reference, EXCESS):.2f} x"]
        cells += [f"{over_control(name) / over_control(reference):.2f} x", *(change(name, key) for key in STEPS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(found: Estimate, form: str) -> str:
    """A value and half its range over seeds; a dash if there is none."""
    if found.value is None:
        return "–"
    spread = f" ± {found.half_range:{form.replace('+', '')}}" if found.seeds > 1 else ""
    value = f"{found.value:{form}}"
    return (value.replace("-", "+") if float(value.rstrip("%")) == 0 else value) + spread  # no -0.0


def at_equal_quality(runs: Named, baselines: tuple[str, ...] = BASELINES, quality: str = EV) -> str:
    """Bits of every configuration relative to the best of the baselines at equal explained variance; "" without bits.

    Of each bits: the configuration's, how many per cent fewer or more than the best baseline, and which that is. Last,
    the CE score less that of the best baseline of the total bits. Below the table, which baselines could not be
    compared, and why.
    """
    label = {EV: "EV", CE: "CE score"}.get(quality, quality)
    frontiers = [Frontier(runs, bits, quality) for bits in (SUPPORT, TOTAL)]
    if not frontiers[0].configurations:
        return ""
    heads = [f"at equal {label}", label]
    for heading in ("support bits", "total bits"):
        heads += [heading, "relative", "best baseline"]
    scored = quality != CE and any(measured(run, CE) for _, run in runs)
    heads += ["CE score, difference"] if scored else []
    lines, notes = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"], []
    for name in frontiers[0].configurations:
        found = [frontier.relative(name, baselines) for frontier in frontiers if name in frontier.configurations]
        cells = [name, shown(found[0].quality, ".4f")]
        for each in found:
            cells += [shown(each.bits, ".1f"), shown(each.difference, "+.1%"), each.baseline or "–"]
            notes += [f"{name}: {note}" for note in (*each.notes, each.difference.why) if note]
        if scored:
            cells.append(shown(difference_at_equal(runs, name, found[-1].baseline, CE, quality), "+.4f"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", *(f"* {note}" for note in dict.fromkeys(notes))] if notes else [])])


def at_one_quality(runs: Named, at: float, quality: str = EV) -> str:
    """Bits of every method at one explained variance, interpolated between its sizes."""
    frontiers = [Frontier(runs, bits, quality) for bits in (SUPPORT, TOTAL)]
    lines = [f"| at {quality} {at:g} | support bits | total bits |", "| --- | --- | --- |"]
    notes = []
    for method in frontiers[0].methods:
        found = [frontier.bits_at(method, at) for frontier in frontiers]
        notes += [each.why for each in found if each.why]
        lines.append(f"| {method} | " + " | ".join(shown(each, ".1f") for each in found) + " |")
    return "\n".join([*lines, *(["", *(f"* {note}" for note in dict.fromkeys(notes))] if notes else [])])


def start_figure(columns: int) -> tuple[Any, Any, Any]:
    """matplotlib.pyplot, a figure, and its panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(7.5 if columns == 1 else 11, 5), layout="constrained", sharey=True, squeeze=False
    )
    for ax in axes[0]:
        ax.grid(alpha=0.3)
    return pyplot, figure, axes[0]


def colours(methods: list[str]) -> dict[str, Any]:
    """A colour for each method: its own, or the next one of a palette."""
    import matplotlib

    palette = matplotlib.colormaps["tab20"].colors
    others = palette[2::2] + palette[3::2]  # strong ones first
    return {method: COLOURS.get(method, others[i % len(others)]) for i, method in enumerate(methods)}


def figure(runs: Named, path: Path, quality: str = EV, lowest: float | None = None) -> None:
    """Explained variance against support bits and against total bits; a line joins the sizes of one method.

    lowest: runs of a lower quality are left out
    """
    if lowest is not None:
        runs = [
            (name, metrics)
            for name, metrics in runs
            if measured(metrics, quality) and lookup(metrics, quality) > lowest
        ]
    pyplot, drawing, axes = start_figure(2)
    for ax, (bits, label) in zip(axes, ((SUPPORT, "support bits"), (TOTAL, "total bits")), strict=True):
        frontier = Frontier(runs, bits, quality)
        chosen = colours(list(frontier.methods))
        for method in frontier.methods:
            points = sorted(
                (mean(p[0] for p in seeds), mean(p[1] for p in seeds), run_name(name).size)
                for name, seeds in frontier.configurations.items()
                if run_name(name).method == method
            )
            colour = chosen[method]
            style = OURS.get(method, POINT)
            ax.plot([p[0] for p in points], [p[1] for p in points], color=colour, label=method, **style)
        ax.set_xlabel(f"{label} per token")
    axes[0].set_ylabel({EV: "explained variance (share)", CE: "cross-entropy recovered (share)"}.get(quality, quality))
    drawing.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)


def persistence_figure(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Explained variance against persistence beyond chance; a line joins the points of one method."""
    pyplot, drawing, (axes,) = start_figure(1)
    families: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for name in found:
        parts = run_name(name)
        families[parts.method].append((average(found, name, EXCESS), average(found, name, EV), parts.size))
    for family, points in families.items():
        colour = COLOURS.get(family, OTHER)
        ordered = sorted(points, key=lambda point: float(point[2].lstrip("k") or 0))
        style = {"marker": "*", "markersize": 13} if family == "default" else {"marker": "o"}
        axes.plot(*zip(*[point[:2] for point in ordered], strict=True), color=colour, label=family, **style)
        for x, y, value in ordered:
            axes.annotate(value, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, color=colour)
    axes.set_xlabel("persistence beyond chance (probability)")
    axes.set_ylabel("explained variance (share)")
    axes.legend(frameon=False)
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--figure", type=Path, help="draw explained variance against bits into this file")
    parser.add_argument("--lowest", type=float, help="of the quality in the figure")
    parser.add_argument("--methods", nargs="+", help="only these in the figure, such as plain")
    parser.add_argument("--persistence", type=Path, help="draw explained variance against persistence into this file")
    parser.add_argument("--json", type=Path, help="write the metrics of every run in compact form into this file")
    parser.add_argument("--at", type=float, help="the bits of all methods at this explained variance")
    parser.add_argument("--quality", default=EV, help=f"what is equal or drawn instead of {EV}, such as {CE}")
    parser.add_argument("--baselines", nargs="+", default=BASELINES, help="the methods to compare with")
    parser.add_argument("--against", default="plain", help="the configuration of the second table, such as plain-k36")
    parser.add_argument("--seed", help="only runs with this seed")
    arguments = parser.parse_args()
    sweeps = read_sweeps(arguments.sweeps)
    if arguments.seed is not None:
        sweeps = of_seed(sweeps, arguments.seed)
    if arguments.json:
        write_json(sweeps, arguments.json)
    found = by_configuration(sweeps)
    if arguments.against not in ("plain", *found):
        parser.error(f"--against {arguments.against}: there is no such configuration; name one of {', '.join(found)}")
    print(table(found))
    if arguments.against in found:
        print("\n" + against(found, arguments.against))
    runs = named(sweeps)
    if relative := at_equal_quality(runs, tuple(arguments.baselines), arguments.quality):
        print("\n" + relative)
    if arguments.at is not None:
        print("\n" + at_one_quality(runs, arguments.at, arguments.quality))
    if arguments.figure:
        drawn = [run for run in runs if not arguments.methods or run_name(run[0]).method in arguments.methods]
        figure(drawn, arguments.figure, arguments.quality, arguments.lowest)
    if arguments.persistence:
        persistence_figure(found, arguments.persistence)


if __name__ == "__main__":
    main()
