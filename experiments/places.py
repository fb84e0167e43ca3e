"""The two demos at three places and three lengths: trains what is missing, measures it, writes JSON and a table.

    python experiments/places.py RUNS docs/results/places.json

The complete demos (`demo`, `demo-smollm2`) are evaluated in sequences of 128, 512 and 1,024 tokens. The places, the
block's output and what the MLP and attention add, have shorter runs: 200 steps, and 64 sequences for the evaluation.
One seed each. A run or evaluation that is in RUNS is not repeated.
"""
# ruff: noqa: T201

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tsae
from tsae.evaluation.catalogue import lookup

PRESETS = ("demo", "demo-smollm2")
SITES = ("resid_post", "mlp_out", "attn_out")
LENGTHS = (128, 512, 1024)
SHORT = {"steps": 200, "evaluation": {"sequences": 64, "ce_sequences": 4}}
COLUMNS = (
    ("EV", "explained_variance", 4),
    ("EV without massive", "massive.explained_variance_without", 4),
    ("L0", "l0", 1),
    ("alive", "frac_alive", 3),
    ("CE score", "ce_loss_score", 4),
    ("support bits", "temporal.support_bits", 1),
    ("memoryless", "temporal.support_bits_memoryless", 1),
    ("total bits", "temporal.total_bits", 1),
    ("P(stays on)", "temporal.persistence", 3),
    ("excess", "temporal.persistence_excess", 3),
    ("shuffled", "temporal.persistence_excess_shuffled", 3),
)


def measured(runs: Path) -> dict[str, Any]:
    """Metrics by preset, run (`complete`, or the site of a short one) and length."""
    found: dict[str, Any] = {}
    for preset in PRESETS:
        trained(preset, runs / preset)
        for length in LENGTHS:
            written = runs / preset / ("eval.json" if length == 128 else f"eval-length-{length}.json")
            if not written.is_file():
                tsae.evaluate(runs / preset, length=length)
            found[f"{preset} complete {length}"] = json.loads(written.read_text())
    for site in SITES:
        for preset in PRESETS:
            out = runs / f"{preset}-{site}"
            trained(preset, out, site=site, **SHORT)
            found[f"{preset} {site} 128"] = json.loads((out / "eval.json").read_text())
    return found


def trained(preset: str, out: Path, **options: Any) -> None:
    """Train unless it is there."""
    if not (out / "eval.json").is_file():
        tsae.train(preset, out=out, overwrite=True, **options)


def table(found: dict[str, Any]) -> str:
    """Markdown, a row for each preset, run and length."""
    head = ["preset", "run", "length", *(name for name, _, _ in COLUMNS)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for key, metrics in sorted(found.items()):
        values = [f"{lookup(metrics, name):.{digits}f}" for _, name, digits in COLUMNS]
        lines.append("| " + " | ".join([*key.split(), *values]) + " |")
    return "\n".join(lines)


def main() -> None:
    runs, out = (Path(argument) for argument in sys.argv[1:])
    found = measured(runs)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
