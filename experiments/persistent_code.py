"""The code of a Persistent SAE: the sparse values that its recurrence integrates.

    python -m experiments.persistent_code runs/neighbours/persistent-* --json docs/results/neighbours-persistent.json
    python experiments/summary.py runs/neighbours docs/results/neighbours-persistent.json

`eval.json` counts the integrated features h, of which every one that was active stays above 0. But h is a function of
the values a before the recurrence, so that a is enough to tell them, and is sparse. RUN@code is the run with `l0` and
bits of a, in place of those of h; the other metrics are the run's. An error e in a_t makes errors (1 - l) l^n e in
what follows, in all e^2 (1 - l) / (1 + l) in square, and a is quantized so that one value's share of the error is
that of any method.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.neighbours import code_bits, to_json
from tsae.evaluation.held_out import evaluation_batches
from tsae.evaluation.subject import open_run
from tsae.rundir import layout
from tsae.synthetic.codes import SparseInput


def measure(run: Path) -> dict[str, Any]:
    """The metrics of a run's `eval.json` with `l0` and bits of a."""
    subject = open_run(run)
    code, lm, cfg = SparseInput(subject.sae), subject.load_lm(), subject.config
    metrics: dict[str, Any] = json.loads((run / layout.EVALUATION).read_text())
    batches = evaluation_batches(cfg, lm, cfg.evaluation.sequences)
    found = code_bits(code.codes, code.norms, metrics["mse"] ** 0.5, batches, cfg, lm)
    return metrics | {"l0": found.pop("l0"), "temporal": metrics["temporal"] | found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, help="write the metrics into this file")
    arguments = parser.parse_args()
    found = {}
    for run in arguments.runs:
        name = f"{run.absolute().name}@code"
        found[name] = measure(run)
        bits = found[name]["temporal"]
        print(f"{name}: L0 {found[name]['l0']:.1f}, support bits {bits['support_bits']:.1f}, ", end="")
        print(f"total bits {bits['total_bits']:.1f}")
    if arguments.json:
        to_json(found, arguments.json, "neighbours-persistent")


if __name__ == "__main__":
    main()
