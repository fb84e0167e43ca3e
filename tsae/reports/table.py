"""The metrics of an `eval.json` as a table on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Rows of the table: key, what it is, its unit, digits behind the point.
_TABLE: dict[str, tuple[tuple[str, str, str, int], ...]] = {
    "Reconstruction": (
        ("explained_variance", "explained variance", "", 4),
        ("explained_variance_legacy", "  mean of per-token ratios (legacy)", "", 4),
        ("explained_variance_saebench", "  as SAEBench 0.6.0", "", 4),
        ("mse", "mean squared error", "act²", 4),
        ("cossim", "cosine similarity", "", 4),
        ("l2_ratio", "norm out / norm in", "", 4),
        ("relative_reconstruction_bias", "relative reconstruction bias", "", 4),
    ),
    "Sparsity": (
        ("l0", "active features (L0)", "per token", 2),
        ("l1", "sum of features (L1)", "act/token", 2),
        ("frac_alive", "features alive", "of all", 4),
    ),
    "Language model": (
        ("ce_loss_without_sae", "cross-entropy, untouched", "nats/token", 4),
        ("ce_loss_with_sae", "cross-entropy with the SAE", "nats/token", 4),
        ("ce_loss_with_mean_ablation", "cross-entropy, mean ablation", "nats/token", 4),
        ("ce_loss_with_ablation", "cross-entropy, zero ablation", "nats/token", 4),
        ("ce_loss_score", "loss recovered (zero ablation)", "", 4),
        ("ce_loss_score_mean_ablation", "loss recovered (mean ablation)", "", 4),
        ("kl_div_score", "KL recovered (zero ablation)", "", 4),
    ),
    "Temporal": (
        ("temporal.relative_difference", "relative difference", "", 3),
        ("temporal.relative_difference_per_feature", "  mean over features", "", 3),
        ("temporal.autocorrelation", "autocorrelation", "", 3),
        ("temporal.persistence", "P(stays on)", "", 4),
        ("temporal.persistence_excess", "  beyond chance", "", 4),
        ("temporal.persistence_excess_shuffled", "  beyond chance, tokens shuffled", "", 4),
        ("temporal.transitions", "transitions", "of pairs", 4),
        ("temporal.smoothness", "smoothness (T-SAE, lower is smoother)", "", 4),
    ),
}

# Columns of a sweep's table: heading, key, digits.
_COMPARED = (
    ("EV", "explained_variance", 3),
    ("L0", "l0", 1),
    ("CE\nscore", "ce_loss_score", 3),
    ("alive", "frac_alive", 3),
    ("stays on\nexcess", "temporal.persistence_excess", 3),
    ("\nshuffled", "temporal.persistence_excess_shuffled", 3),
    ("lag 1\npooled", "temporal.relative_difference.1", 3),
    ("\nfeature", "temporal.relative_difference_per_feature.1", 3),
    ("smooth-\nness", "temporal.smoothness", 3),
)


def metric(metrics: dict[str, Any], key: str) -> Any:
    """The value at a dotted ``key`` of an eval.json; an empty mapping where there is none."""
    value: Any = metrics
    for part in key.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    return value


def print_comparison(
    runs: dict[str, dict[str, Any]], console: Console | None = None, title: str = "Sweep", what: str = "run"
) -> None:
    """Print the runs of a `sweep.json` side by side, and below them why any of them stopped.

    title, what: of the table, and of its first column
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"\n{what}", overflow="fold")
    for heading, _, digits in _COMPARED:
        width = max(len(line) for line in (*heading.split("\n"), f"{-0.5:.{digits}f}"))
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for name, run in runs.items():
        values = [metric(run["metrics"] or {}, key) for _, key, _ in _COMPARED]
        cells = [
            f"{value:.{digits}f}" if isinstance(value, (int, float)) else "–"
            for value, (_, _, digits) in zip(values, _COMPARED, strict=True)
        ]
        table.add_row(name, *cells)
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # in a file nothing need be folded
    console.print(table)
    for name, run in runs.items():
        if run["error"]:
            console.print(f"{name}: {run['error']}", markup=False, highlight=False)


def print_table(metrics: dict[str, Any], console: Console | None = None, text: str | None = None) -> None:
    """Print the metrics of an eval.json as a table, on stdout unless a console is given.

    text: what was evaluated on, if it is not the run's own evaluation part
    """
    title = "Evaluation" if text is None else f"Evaluation on other text: {escape(text)}"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("unit", style="dim", no_wrap=True)
    for group, rows in _TABLE.items():
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]", "", "")
        for key, label, unit, digits in rows:
            value = metric(metrics, key)
            if isinstance(value, dict):
                for name, entry in value.items():
                    lag = f"lag {name}" if name.isdigit() else name.replace("_", " to ")
                    table.add_row(f"{label}, {lag}", f"{entry:.{digits}f}", unit)
            else:
                table.add_row(label, f"{value:.{digits}f}", unit)
    (console or Console()).print(table)
