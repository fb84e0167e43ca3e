"""The papers' figures beside ours: results.json, and a table in Markdown and on the terminal."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tsae.config import TrainConfig
from tsae.data.sequences import TokenBatch
from tsae.evaluation.catalogue import METRICS, Metric, lookup
from tsae.lm.hooks import activations
from tsae.lm.loading import LanguageModel
from tsae.reproduce.papers import INPUTS, Paper
from tsae.sae.model import SparseAutoencoder
from tsae.utils.output import tables

# Columns of the table; all but the second are metrics of eval.json.
COLUMNS = (
    METRICS["explained_variance"],
    Metric("explained_variance_with_bos", "explained variance with BOS", heading="with BOS"),
    *(METRICS[key] for key in ("ce_loss_score", "temporal.support_bits", "temporal.total_bits", "l0", "l1")),
    *(METRICS[key] for key in ("cossim", "l2_ratio", "relative_reconstruction_bias")),
)
# Only in results.json.
FURTHER = ("mse", "ce_loss_with_sae", "ce_loss_without_sae", "frac_alive", "temporal.persistence_excess")


class _Sums:
    """Sums over positions, float64: the count, x, |x|^2, and |x - xhat|^2 by autoencoder."""

    def __init__(self) -> None:
        self.n, self.total, self.square = 0, torch.zeros(()), torch.zeros(())
        self.residual: dict[str, float] = {}

    def add(self, x: Tensor, reconstructions: dict[str, Tensor]) -> None:
        """Count x [n, d] and its reconstruction by each autoencoder."""
        x = x.double()
        self.n, self.total, self.square = self.n + x.shape[0], self.total + x.sum(0), self.square + x.square().sum()
        for name, xhat in reconstructions.items():
            self.residual[name] = self.residual.get(name, 0.0) + float((x - xhat).square().sum())

    def compute(self) -> dict[str, Any]:
        mean, mean_square = float((self.total / self.n).square().sum()), float(self.square / self.n)
        variance = max(mean_square - mean, 1e-300)
        return {
            "zero_output": -mean / variance,
            "mean_norm": mean**0.5,
            "rms_norm": mean_square**0.5,
            "runs": {name: 1 - residual / self.n / variance for name, residual in self.residual.items()},
        }


@torch.no_grad()
def explained_variance(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, batches: Iterable[TokenBatch], layer: int
) -> dict[str, Any]:
    """Explained variance 1 - E|x - xhat|^2 / Var(x) with and without BOS, beside the score of a zero output.

    The latter is 1 - E|x|^2 / Var(x) = -|mean|^2 / Var(x). BOS's activation can be many times longer than all others,
    and the papers do not say that they left it out.

    saes: by name, on raw activations; none was trained on BOS
    batches: tokens [N, 1 + T] with BOS first, segments [N, T]; one pass each
    out: for `content` (non-excluded positions) and `with_bos` (BOS too): `zero_output`, `runs` by name, and the norms
        behind `zero_output`: `mean_norm` |E x| and `rms_norm` sqrt(E|x|^2)
    """
    sums = {"content": _Sums(), "with_bos": _Sums()}
    for batch in batches:
        x = activations(lm, batch.tokens, layer).float()  # [N, 1 + T, d]
        segments = batch.segments.to(x.device)
        counted = segments >= 0
        content = {name: sae(x[:, 1:], segments)[counted] for name, sae in saes.items()}
        bos = {name: sae(x[:, :1])[:, 0] for name, sae in saes.items()}
        for each in sums.values():
            each.add(x[:, 1:][counted], content)
        sums["with_bos"].add(x[:, 0], bos)
    return {name: each.compute() for name, each in sums.items()}


def collect(
    paper: Paper, cfg: TrainConfig, runs: dict[str, dict[str, Any]], explained: dict[str, Any], seconds: float | None
) -> dict[str, Any]:
    """The content of results.json.

    runs: from `sweep.json`, all ended
    explained: from `explained_variance`
    seconds: duration of the command; None if it was resumed
    """
    rows = []
    for name, experiment in paper.experiments.items():
        keys = [*(metric.key for metric in COLUMNS), *FURTHER]
        row: dict[str, Any] = {"run": name, "what": experiment.what}
        row["paper"] = {key: experiment.paper.get(key) for key in [*keys, "steps"]}
        for given in INPUTS:
            run = runs[f"{name}-{given}"]
            metrics = run["metrics"] or {}
            if metrics:
                metrics["explained_variance_with_bos"] = explained["with_bos"]["runs"][f"{name}-{given}"]
            # Bits are missing where features fall below 0, as with gelu.
            found = {key: lookup(metrics, key) for key in keys}
            values = {key: value if isinstance(value, (int, float)) else None for key, value in found.items()}
            row[given] = values | {"steps": run["steps"], "error": run["error"]}
        rows.append(row)
    return {
        "title": paper.title,
        "model": cfg.model,
        "layer": cfg.layer,
        "data": cfg.data,
        "steps": cfg.steps,
        "sequences_per_step": cfg.batch,
        "d_sae": cfg.sae.d_sae,
        "seed": cfg.seed,
        "date": date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() and cfg.device != "cpu" else "cpu",
            "torch": torch.__version__,
        },
        "seconds": seconds,
        "zero_output": {
            name: {key: value for key, value in values.items() if key != "runs"} for name, values in explained.items()
        },
        "rows": rows,
    }


def processor() -> str:
    """The processor's name, and how many cores are seen."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return f"{names[0]}, {os.cpu_count()} cores seen"
    return platform.processor() or platform.machine()


def _cells(results: dict[str, Any]) -> list[list[str]]:
    """The rows of the table, one for each run and source."""
    lines = []
    for row in results["rows"]:
        for source in ("paper", *INPUTS):
            values = row[source]
            show = _quoted if source == "paper" else _number
            steps = "–" if values["steps"] is None else f"{values['steps']}"
            steps += " (stopped)" if values.get("error") else ""
            lines.append([row["run"] if source == "paper" else "", source])
            lines[-1] += [*(show(values[metric.key], metric) for metric in COLUMNS), steps]
    return lines


def _quoted(value: float | None, metric: Metric) -> str:
    """A paper's figure, with its own digits."""
    return "–" if value is None else f"{value}"


def _number(value: float | None, metric: Metric) -> str:
    if value is not None and abs(value) >= 1000:
        return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.2e}"
    return metric.short(None if value is None else round(value, metric.short_digits) + 0.0)  # no -0.00


def _notes(results: dict[str, Any]) -> list[str]:
    content, with_bos = results["zero_output"]["content"], results["zero_output"]["with_bos"]
    notes = [
        f"On the same activations, an autoencoder that outputs zero scores EV = -|mean|^2 / Var = "
        f"{content['zero_output']:.3f} (|mean| {content['mean_norm']:.1f}, root mean square norm "
        f"{content['rms_norm']:.1f}); with BOS included, {with_bos['zero_output']:.3f} (|mean| "
        f"{with_bos['mean_norm']:.1f}, root mean square norm {with_bos['rms_norm']:.1f}).",
        "L1 is in the units of the raw activations, or, with gelu or layer normalization, of the given input.",
    ]
    for row in results["rows"]:
        notes += [f"{row['run']}, {given}: {row[given]['error']}" for given in INPUTS if row[given]["error"]]
    return notes


def markdown(results: dict[str, Any]) -> str:
    """The table, a line about each run, and the notes, as Markdown."""
    head = ["run", "", *(metric.column for metric in COLUMNS), "steps"]
    lines = [
        f"*{results['title']}*: the paper's figures beside ours. {results['model']}, layer {results['layer']}, "
        f"{results['data']}, {results['steps']} steps of {results['sequences_per_step']} x 128 tokens, "
        f"{results['d_sae']} features, seed {results['seed']}.",
        "",
        f"| {' | '.join(head)} |",
        f"| --- | --- |{' ---: |' * (len(head) - 2)}",
        *(f"| {' | '.join(cells)} |" for cells in _cells(results)),
        "",
        *(f"* `{row['run']}`: {row['what']}" for row in results["rows"]),
        "",
    ]
    for note in _notes(results):
        lines += [note, ""]
    machine = results["machine"]
    took = "" if results["seconds"] is None else f" {results['seconds'] / 60:.1f} minutes."
    lines.append(
        f"{results['date']}, {machine['processor']}, {machine['threads']} threads, {machine['device']}, torch "
        f"{machine['torch']}.{took}"
    )
    return "\n".join(lines) + "\n"


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """Print the table and the notes."""
    table = Table(
        title=Text(results["title"], "table.title"),
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, heading in enumerate(("run", "", *(metric.column for metric in COLUMNS), "steps")):
        table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=i > 1)
    for cells in _cells(results):
        table.add_row(*cells, style="dim" if cells[1] == "paper" else "")
    console = console or tables(120)
    console.print(table)
    for note in _notes(results):
        console.print(note, markup=False, highlight=False)
