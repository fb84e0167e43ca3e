"""The papers' figures beside ours: results.json, a Markdown table, and the same on the terminal."""

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

from tsae.config import TrainConfig
from tsae.data.sequences import TokenBatch
from tsae.lm.hooks import activations
from tsae.lm.loading import LanguageModel
from tsae.reproduce.papers import INPUTS, Paper
from tsae.table import metric

__all__ = ["COLUMNS", "collect", "markdown", "print_results", "zero_output"]

# Heading, key of eval.json, digits.
COLUMNS = (
    ("EV", "explained_variance", 3),
    ("L0", "l0", 2),
    ("L1", "l1", 2),
    ("cosine", "cossim", 3),
    ("L2 ratio", "l2_ratio", 3),
    ("relative bias", "relative_reconstruction_bias", 2),
    ("CE score", "ce_loss_score", 3),
)
# In results.json only.
FURTHER = ("mse", "ce_loss_with_sae", "ce_loss_without_sae", "frac_alive", "temporal.persistence_excess")


@torch.no_grad()
def zero_output(lm: LanguageModel, batches: Iterable[TokenBatch], layer: int, size: int) -> dict[str, Any]:
    """What an autoencoder that outputs zero scores on raw activations: EV = 1 - E|x|^2 / Var(x) = -|mean|^2 / Var(x).

    batches: tokens [N, 1 + T] with BOS first, segments [N, T]
    size: sequences in one pass
    out: for `content` (the positions that count) and `with_bos` (BOS besides): `explained_variance`, `mean_norm` |E x|
        and `rms_norm` sqrt(E|x|^2)
    """
    sums: dict[str, list[Any]] = {"content": [0, 0.0, 0.0], "with_bos": [0, 0.0, 0.0]}
    for batch in batches:
        for tokens, segments in zip(batch.tokens.split(size), batch.segments.split(size), strict=True):
            x = activations(lm, tokens, layer).cpu().double()  # [N, 1 + T, d]
            content = x[:, 1:][segments >= 0]
            for name, part in (("content", content), ("with_bos", torch.cat([content, x[:, 0]]))):
                sums[name][0] += part.shape[0]
                sums[name][1] = sums[name][1] + part.sum(0)
                sums[name][2] += float(part.square().sum())
    out = {}
    for name, (n, total, square) in sums.items():
        mean_square, mean = square / n, float((total / n).square().sum())
        out[name] = {
            "explained_variance": -mean / max(mean_square - mean, 1e-300),
            "mean_norm": mean**0.5,
            "rms_norm": mean_square**0.5,
        }
    return out


def collect(
    paper: Paper, cfg: TrainConfig, runs: dict[str, dict[str, Any]], zero: dict[str, Any], seconds: float | None
) -> dict[str, Any]:
    """The content of results.json.

    runs: of `sweep.json`, finished
    zero: from `zero_output`
    seconds: the whole command took; None for a resumed one
    """
    rows = []
    for name, experiment in paper.experiments.items():
        keys = [key for _, key, _ in COLUMNS]
        keys += FURTHER
        row: dict[str, Any] = {"run": name, "what": experiment.what}
        row["paper"] = {key: experiment.paper.get(key) for key in [*keys, "steps"]}
        for given in INPUTS:
            run = runs[f"{name}-{given}"]
            values = {key: metric(run["metrics"], key) if run["metrics"] else None for key in keys}
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
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() and cfg.device != "cpu" else "cpu",
            "torch": torch.__version__,
        },
        "seconds": seconds,
        "zero_output": zero,
        "rows": rows,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return f"{names[0]}, {os.cpu_count()} cores seen"
    return platform.processor() or platform.machine()


def _cells(results: dict[str, Any]) -> list[list[str]]:
    """The table: one line for each run and source."""
    lines = []
    for row in results["rows"]:
        for source in ("paper", *INPUTS):
            values = row[source]
            numbers = [_number(values[key], digits) for _, key, digits in COLUMNS]
            steps = "–" if values["steps"] is None else f"{values['steps']}"
            steps += " (stopped)" if values.get("error") else ""
            lines.append([row["run"] if source == "paper" else "", source, *numbers, steps])
    return lines


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def _notes(results: dict[str, Any]) -> list[str]:
    content, with_bos = results["zero_output"]["content"], results["zero_output"]["with_bos"]
    notes = [
        f"On the same activations an autoencoder that outputs zero scores EV = -|mean|^2 / Var = "
        f"{content['explained_variance']:.3f} (|mean| {content['mean_norm']:.1f}, root mean square norm "
        f"{content['rms_norm']:.1f}); with BOS counted, {with_bos['explained_variance']:.3f} (|mean| "
        f"{with_bos['mean_norm']:.1f}, root mean square norm {with_bos['rms_norm']:.1f})."
    ]
    for row in results["rows"]:
        notes += [f"{row['run']}, {given}: {row[given]['error']}" for given in INPUTS if row[given]["error"]]
    return notes


def markdown(results: dict[str, Any]) -> str:
    """The table, what the runs are, and the notes, as Markdown."""
    head = ["run", "", *(heading for heading, _, _ in COLUMNS), "steps"]
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
    table = Table(title=results["title"], title_justify="left", box=None, pad_edge=False)
    for i, heading in enumerate(("run", "", *(heading for heading, _, _ in COLUMNS), "steps")):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for cells in _cells(results):
        table.add_row(*cells, style="dim" if cells[1] == "paper" else "")
    console = console or Console()
    console.print(table)
    for note in _notes(results):
        console.print(note, markup=False, highlight=False)
