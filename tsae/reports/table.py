"""The metrics of an `eval.json` as a table on the terminal, and of several side by side."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tsae.evaluation.catalogue import GROUPS, METRICS, lookup
from tsae.utils.output import tables

# Columns of the side-by-side table.
COMPARED = (
    *("explained_variance", "ce_loss_score", "temporal.support_bits", "temporal.total_bits", "l0", "frac_alive"),
    *("temporal.persistence_excess", "temporal.persistence_excess_shuffled"),
    *("temporal.relative_difference.1", "temporal.relative_difference_per_feature.1", "temporal.smoothness"),
)


def print_comparison(
    runs: dict[str, dict[str, Any]], console: Console | None = None, title: str = "Sweep", what: str = "run"
) -> None:
    """Print the runs of a `sweep.json` side by side, and below them why any of them stopped; see `comparison`."""
    console = console or tables(160)
    console.print(comparison(runs, title, what))
    for name, run in runs.items():
        if run["error"]:
            console.print(f"{name}: {run['error']}", markup=False, highlight=False)


def comparison(runs: dict[str, dict[str, Any]], title: str = "Sweep", what: str = "run") -> Table:
    """The runs of a `sweep.json` side by side.

    title, what: of the table, and of its first column
    """
    table = Table(
        title=Text(title, "table.title"), title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column(f"\n{what}", overflow="fold")
    metrics, above = [METRICS[key] for key in COMPARED], ""
    for metric in metrics:
        first, *rest = metric.heading.split("\n")
        width = max(map(len, (first, *rest, metric.short(-0.5))))
        heading = "\n".join(["" if rest and first == above else first, *rest])  # neighbours share a first line
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
        above = first
    for name, run in runs.items():
        table.add_row(Text(name), *(metric.short(lookup(run["metrics"] or {}, metric.key)) for metric in metrics))
    return table


def print_table(metrics: dict[str, Any], console: Console | None = None, text: str | None = None) -> None:
    """Print the metrics of an eval.json as a table, on stdout unless a console is given; see `listing`."""
    (console or tables()).print(listing(metrics, text))


def listing(metrics: dict[str, Any], text: str | None = None) -> Table:
    """The metrics of an eval.json, one in a row.

    text: the text that was measured, if it is not the evaluation part of the run's own
    """
    title = "Evaluation" if text is None else f"Evaluation on other text: {text}"
    table = Table(title=Text(title, "table.title"), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("unit", style="dim", no_wrap=True)
    for group, listed in GROUPS.items():
        table.add_section()
        table.add_row(Text(group, "bold"), "", "")
        for metric in listed:
            value = lookup(metrics, metric.key)
            if isinstance(value, dict):
                for part, entry in value.items():
                    table.add_row(f"{metric.row}, {metric.at(part).label}", metric.full(entry), metric.unit)
            else:
                table.add_row(metric.row, metric.full(value), metric.unit)
    return table
