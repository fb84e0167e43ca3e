"""The results as a table in Markdown and on the terminal, and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from tsae.reports.figure import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, STYLE
from tsae.synthetic.measure import CEILING, FEATURES
from tsae.utils.atomic import atomic_write
from tsae.utils.output import tables

COLORS = {FEATURES: GREY, "leaky": ORANGE, "hold": GREEN, "filter": BLUE, "smoother": PURPLE}
MARKERS = "osD^vPX*<>hpd"


def headings(result: dict[str, Any]) -> list[str]:
    """The columns of one setting's table."""
    groups = [f"{group['dwell']:.3g}" for group in result["groups"]]
    scores = ["of Bayes", "F1 hidden", "MCC", "EV", "on", "L0", "support bits", "bits"]
    return ["method", "read-out", *groups, "all", *scores]


def cells(result: dict[str, Any]) -> list[list[str]]:
    """The rows of one setting's table: denoising ratio and, behind it, correlation with the hidden state."""
    out = []
    for method, found in result["methods"].items():
        for i, (readout, row) in enumerate(found["rows"].items()):
            first = [method if i == 0 else "", readout if row["causal"] else f"{readout} (not causal)"]
            groups = [_pair(part) for part in (*row["groups"], row["all"])]
            numbers = [row["all"].get("of_bayes"), row["all"].get("f1_hidden")]
            quality = [found.get("mcc"), found.get("explained_variance")] if i == 0 else [None, None]
            bits = [row.get(key) for key in ("on", "l0", "support_bits", "total_bits")]
            shown = [*(_number(value, 3) for value in (*numbers, *quality)), *(_number(value, 1) for value in bits)]
            out.append([*first, *groups, *shown])
    return out


def _pair(part: dict[str, float]) -> str:
    return f"{part['ratio']:.3f} ({part['corr_hidden']:.3f})" if part["features"] else "–"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def described(name: str, result: dict[str, Any]) -> str:
    """One setting in a sentence."""
    setting, groups = result["setting"], result["groups"]
    dwell = ", ".join(f"{group['dwell']:.3g}" for group in groups)
    rho = ", ".join(f"{group['rho']:.3f}" for group in groups)
    return (
        f"{name}: {setting['features']:,} features in d = {setting['width']}, pi = {setting['pi']:g}, emission "
        f"{setting['emission']:g}, dwell times {dwell} tokens (rho {rho}); {setting['d_sae']:,} learned features, "
        f"{setting['steps']:,} steps of {setting['batch'] * setting['length']:,} tokens, {result['tokens']:,} tokens "
        "scored."
    )


LEGEND = (
    "By dwell time: the denoising ratio, correlation with the hidden over correlation with the observed state, and in "
    "parentheses the correlation with the hidden state. `truth` reads the true amplitudes with the true rates: its "
    "filter and smoother are the ceilings of causal methods and of all, its features what one token tells. `on` is the "
    "features above 0 at a token; L0 and bits are those of the code behind them, per token: of a crosscoder one code a "
    "window, of `persistent` what it integrates."
)


def markdown(results: dict[str, Any]) -> str:
    """All settings' tables."""
    lines = [LEGEND, ""]
    for name, result in results["settings"].items():
        head = headings(result)
        lines += [described(name, result), "", f"| {' | '.join(head)} |"]
        lines += [f"| --- | --- |{' ---: |' * (len(head) - 2)}"]
        lines += [f"| {' | '.join(row)} |" for row in cells(result)]
        lines.append("")
    machine = results["machine"]
    lines.append(
        f"{results['date']}, seed {results['seed']}, {machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['torch']}. {results['seconds'] / 60:.1f} minutes."
    )
    return "\n".join(lines) + "\n"


def print_results(results: dict[str, Any]) -> None:
    """Print all tables on stdout."""
    console = tables(160)
    for name, result in results["settings"].items():
        table = Table(
            title=Text(described(name, result), "table.title"),
            title_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for i, heading in enumerate(headings(result)):
            table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
        for row in cells(result):
            table.add_row(*row, style="dim" if row[0] == CEILING else "")
        console.print(table)


def write_figure(results: dict[str, Any], path: Path) -> Path:
    """Correlation with the hidden state, and the denoising ratio, against the dwell time; a column per setting."""
    settings = results["settings"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6 * len(settings) + 1.8, 8.0), dpi=120, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = cast(Any, figure.subplots(2, len(settings), squeeze=False))
        for column, (name, result) in zip(axes.T, settings.items(), strict=True):
            for ax, key, label in zip(
                column, ("corr_hidden", "ratio"), ("correlation with the hidden state", "denoising ratio"), strict=True
            ):
                _panel(ax, result, key)
                ax.set_ylabel(label)
                ax.set_title(name)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def _panel(ax: Axes, result: dict[str, Any], key: str) -> None:
    dwell = [group["dwell"] for group in result["groups"]]
    for i, (method, found) in enumerate(result["methods"].items()):
        for readout, row in found["rows"].items():
            values = [part.get(key, float("nan")) for part in row["groups"]]
            style: dict[str, Any] = (
                {"linestyle": (0, (3, 2)), "linewidth": 1.2} if method == CEILING else {"linewidth": 1.0}
            )
            ceiling = "_" if len(dwell) == 1 else ""  # a line of one point cannot be seen
            marker = ceiling if method == CEILING else MARKERS[i % len(MARKERS)]
            ax.plot(
                dwell, values, marker=marker, markersize=4, color=COLORS[readout], label=f"{method}, {readout}", **style
            )
    if key == "ratio":
        ax.axhline(1.0, color=RED, linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(dwell, [f"{each:.3g}" for each in dwell])
    ax.set_xlabel("mean dwell time (tokens)")
    ax.tick_params(colors=INK)
