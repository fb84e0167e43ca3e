"""`python -m benchmarks.report FILE.json [--out docs/figures/benchmarks.png]`: benchmark results as table and figure.

FILE.json is the output of `pytest benchmarks --benchmark-json=FILE.json`. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.results import Measurement, Row, read_json, table, write_json

COLOURS = {"copy": "#6F7780", "backend": "#009E73", "alternative": "#0072B2", "step": "#009E73", "peer": "#E69F00"}
NAMES = {"copy": "copy of h", "backend": "tsae_kernels", "alternative": "PyTorch", "step": "tsae", "peer": "SAELens"}
INK = "#20252B"


def heading(measurements: list[Measurement], machine: dict[str, Any]) -> str:
    """Device and versions in one line."""
    version = f"torch {machine['torch']}" if "torch" in machine else "torch of unknown version"
    python = f"Python {machine['python_version']}" if "python_version" in machine else ""
    smoke = "SMOKE MODE: these times mean nothing" if machine.get("smoke") else ""
    return ", ".join(part for part in (measurements[0].device, version, python, smoke) if part)


def floor(m: Measurement) -> float | None:
    """The lower bound on a case's time, in copies of h: its minimum memory traffic at the copy's bandwidth."""
    needed = {row.bytes for row in m.rows if row.kind == "backend" and row.variant == m.own}
    return max(needed) / (2 * m.tensor_bytes) if needed and m.tensor_bytes and max(needed) else None


def draw(measurements: list[Measurement], machine: dict[str, Any]) -> Figure:
    """A panel of bars per case on log axes: time in copies of h if the case has a copy, else in milliseconds."""
    heights = [len(m.rows) for m in measurements]
    figure, axes = pyplot.subplots(
        len(measurements),
        1,
        figsize=(9.0, 0.24 * sum(heights) + 0.75 * len(heights) + 0.8),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, m in zip(axes[:, 0], measurements, strict=True):
        _panel(axis, m)
    kinds = list(dict.fromkeys(row.kind for m in measurements for row in m.rows))
    handles = [Patch(color=COLOURS[kind], label=label) for kind, label in NAMES.items() if kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(heading(measurements, machine), fontsize=9.5, color=INK)
    return figure


def _panel(axis: Axes, m: Measurement) -> None:
    in_copies = m.copy_seconds is not None

    def length(row: Row) -> float:
        copies = m.copies(row)
        return 1e3 * row.seconds if copies is None else copies

    rows = sorted(m.rows, key=length)
    lengths = [length(row) for row in rows]
    axis.barh([row.variant for row in rows], lengths, color=[COLOURS[row.kind] for row in rows], height=0.72)
    axis.set_xscale("log")
    axis.set_xlim(min(lengths) / 2, max(lengths) * 2.5)
    for i, (row, value) in enumerate(zip(rows, lengths, strict=True)):
        text = f" {value:.1f} ({1e3 * row.seconds:.1f} ms)" if in_copies else f" {value:.0f} ms"
        axis.text(value, i, text, va="center", fontsize=7, color=INK)
    limit = floor(m)
    if limit is not None:
        axis.axvline(limit, color=INK, linewidth=1, linestyle="--")
        axis.text(limit, 1.01, f"floor {limit:g}", transform=axis.get_xaxis_transform(), fontsize=7, ha="center")
    axis.invert_yaxis()
    shape = " x ".join(map(str, m.shape))
    axis.set_title(f"{m.case}   [{shape}] {m.dtype}", fontsize=9, loc="left", fontweight="bold", color=INK, pad=12)
    axis.set_xlabel("time, in copies of h" if in_copies else "time of a step, ms", fontsize=8)
    axis.tick_params(labelsize=7.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path, help="output of `pytest benchmarks --benchmark-json=FILE`")
    parser.add_argument("--out", type=Path, help="write the figure to this file")
    parser.add_argument("--json", type=Path, help="write the measurements in the compact form of docs/results")
    chosen = parser.parse_args(arguments)
    try:
        measurements, machine = read_json(chosen.file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{chosen.file} is not the output of `pytest benchmarks --benchmark-json=FILE`: {error!r}")
    if not measurements:
        sys.exit(f"{chosen.file} contains no measurement from benchmarks/")
    print(heading(measurements, machine) + "\n")
    print(table(measurements))
    if chosen.json is not None:
        write_json(chosen.json, measurements, machine)
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        figure = draw(measurements, machine)
        figure.savefig(chosen.out, dpi=120, metadata={"Software": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main()
