"""The papers' Figure 1 redrawn: (a) metrics across runs, (b) training dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tsae.evaluation.catalogue import METRICS
from tsae.reports.figure import BLUE, GREY, INK, RED, STYLE, plain
from tsae.reports.records import read_history
from tsae.reproduce.papers import INPUTS
from tsae.rundir import layout
from tsae.utils.atomic import atomic_write

SOURCES = (("paper", "#9AA2AA"), ("literal", RED), ("fixed", BLUE))
PANELS = ("explained_variance", "l0", "cossim", "l2_ratio", "ce_loss_score")


def write_figure(results: dict[str, Any], directory: Path) -> Path:
    """Draw DIRECTORY/figure1.png from `results` and the runs' metrics.jsonl; returns its path."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(40 / 3, 8.4), dpi=120, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1.0, 1.0)))
        model = str(results["model"]).rstrip("/").rsplit("/", 1)[-1]
        title = f"(a) Metrics across runs, {model} layer {results['layer']}, {results['steps']} steps"
        plain(top.suptitle(title, x=0.01, ha="left", fontweight="bold"))
        for ax, key in zip(top.subplots(1, len(PANELS)), PANELS, strict=True):
            _bars(ax, results, key)
        top.legend(
            handles=[
                *(Patch(color=color, label=source) for source, color in SOURCES),
                Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (3, 2)), label="outputs zero"),
            ],
            loc="upper right",
            ncols=4,
            bbox_to_anchor=(1.0, 1.0),
        )
        bottom.suptitle("(b) Training dynamics", x=0.01, ha="left", fontweight="bold")
        for ax, given in zip(bottom.subplots(1, 2, sharey=True), INPUTS, strict=True):
            _dynamics(ax, results, directory, given)
        path = directory / layout.REPRODUCTION_FIGURE
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def _bars(ax: Axes, results: dict[str, Any], key: str) -> None:
    ax.set_title(METRICS[key].column)
    rows = results["rows"]
    places, values = np.arange(len(rows))[::-1], []
    for i, (source, color) in enumerate(SOURCES):
        for place, row in zip(places, rows, strict=True):
            y, value = place + 0.27 * (1 - i), row[source][key]
            if value is None:
                reason = "not stated" if source == "paper" else "stopped"
                ax.text(0.0, y, f" {reason}", fontsize=6.5, color=GREY, va="center")
                continue
            values.append(value)
            ax.barh(y, value, height=0.25, color=color)
            ax.plot([value], [y], marker="|", color=INK, markersize=4)  # so that a bar of 0 is visible
    if key == "explained_variance":
        zero = results["zero_output"]["content"]["zero_output"]
        ax.axvline(zero, color=INK, linewidth=1.0, linestyle=(0, (3, 2)))
        values.append(zero)
    if values and max(abs(value) for value in values) > 20 and min(values) < 0:
        ax.set_xscale("symlog", linthresh=1.0)
    ax.axvline(0, color="#B8BEC5", linewidth=0.8)
    ax.tick_params(axis="y", left=False)
    ax.set_yticks(places, [row["run"] for row in rows] if key == PANELS[0] else [])
    ax.grid(axis="y", visible=False)


def _dynamics(ax: Axes, results: dict[str, Any], directory: Path, given: str) -> None:
    ax.set_title({"literal": "literal: raw activations", "fixed": "fixed: centred and scaled"}[given])
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(results["rows"])))
    for row, color in zip(results["rows"], colours, strict=True):
        history = read_history(directory / f"{row['run']}-{given}" / layout.METRICS)
        if "explained_variance" not in history:
            continue
        steps, explained = history["explained_variance"]
        ax.plot(steps, np.clip(1 - explained, 1e-6, None), color=color, linewidth=1.2, label=row["run"])
        if row[given]["error"]:
            ax.plot(steps[-1:], np.clip(1 - explained[-1:], 1e-6, None), "x", color=color, markersize=8)
    zero = 1 - results["zero_output"]["content"]["zero_output"]
    ax.axhline(zero, color=INK, linewidth=1.0, linestyle=(0, (3, 2)))
    ax.axhline(1, color="#B8BEC5", linewidth=0.8)
    ax.text(0.995, zero, "outputs zero ", transform=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    ax.text(0.995, 1, "outputs the mean ", transform=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("error / variance of the batch")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(ncols=3, fontsize=7.5, loc="lower left")  # "best" takes seconds and warns
