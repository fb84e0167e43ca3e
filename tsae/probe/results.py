"""Results of probes: `probes.json`, and a table of runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tsae.probe.probes import CHANCE, KS, Score, difference
from tsae.probe.problems import Problem
from tsae.utils.output import tables


@dataclass(frozen=True)
class Results:
    """The probes of several runs on one text."""

    text: dict[str, Any]
    """The text: data, part, tokens, documents, seed."""
    problems: list[Problem]
    left_out: dict[str, str]
    """Problems that the text does not support, and why."""
    dense: dict[str, Score]
    """By problem."""
    sparse: dict[str, dict[str, dict[int, Score]]]
    """By run, problem and k; the other runs are compared with the first."""


def as_json(results: Results, run: str) -> dict[str, Any]:
    """The content of a run's probes.json."""
    problems = {}
    for problem in results.problems:
        scores = {str(k): score for k, score in results.sparse[run][problem.name].items()}
        scores["dense"] = results.dense[problem.name]
        by_label = zip(*(score.per_label for score in scores.values()), strict=True)
        problems[problem.name.replace(" ", "_")] = {
            "train_tokens": int(problem.train.sum()),
            "test_tokens": int(problem.test.sum()),
            "auc": {key: score.auc for key, score in scores.items()},
            "stderr": {key: score.stderr for key, score in scores.items()},
            "auc_by_label": {
                label: dict(zip(scores, areas, strict=True))
                for label, areas in zip(problem.labels, by_label, strict=True)
            },
        }
    left_out = {name.replace(" ", "_"): why for name, why in results.left_out.items()}
    return {"text": results.text, "chance": CHANCE, "problems": problems, "left_out": left_out}


def print_results(results: Results, console: Console | None = None) -> None:
    """Print the table, in several parts if the terminal is too narrow, and below it the text."""
    console = console or tables()
    runs = list(results.sparse)
    beside = len(runs)
    if console.is_terminal:
        beside = max(1, (console.width - 36) // 18)
    else:
        console.width = max(console.width, 36 + 18 * beside + max(map(len, runs)))  # a file needs no folding
    for start in range(0, len(runs), beside):
        console.print(_table(results, runs[start : start + beside], runs[0]))
    for name, why in results.left_out.items():
        console.print(f"Left out: {name}; {why}.", markup=False, highlight=False)
    text = results.text
    part = f"{text['data']} ({text['part']})"
    console.print(f"{text['tokens']:,} tokens, {text['documents']} documents of {part}.", markup=False, highlight=False)
    if len(runs) > 1:
        console.print(f"Below each figure: the difference from {runs[0]}.", markup=False, highlight=False)


def _table(results: Results, runs: list[str], first: str) -> Table:
    title = "Probes: area under the ROC curve, one label against the rest ± standard error"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("label", no_wrap=True)
    table.add_column("probe on", no_wrap=True)
    for run in runs:
        table.add_column(Text(run), justify="right", overflow="fold")
    for problem in results.problems:
        table.add_section()
        heading = [Text(problem.name, "bold"), Text(f"{len(problem.labels)} of them", "dim")]
        for k in KS:
            cells = []
            for run in runs:
                score = results.sparse[run][problem.name][k]
                cells.append(Text(f"{score.auc:.3f} ± {score.stderr:.3f}"))
                if run != first:
                    change, error = difference(score, results.sparse[first][problem.name][k])
                    cells[-1].append(f"\n{change:+.3f} ± {error:.3f}", "dim")
            table.add_row(heading.pop(0) if heading else "", f"{k} feature{'s' * (k > 1)}", *cells)
        bound = results.dense[problem.name]
        table.add_row("", "activations, all", *[f"{bound.auc:.3f} ± {bound.stderr:.3f}"] * len(runs))
        table.add_row("", "nothing (chance)", *[f"{CHANCE:.3f}        "] * len(runs))
    return table
