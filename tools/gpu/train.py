"""A run of `python -m tsae.train` with the options given, in a temporary folder, and its figures as a line of JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsae.train import main as train

KEPT = ("explained_variance", "l0", "frac_alive", "ce_loss_score")


def figures(run: Path) -> dict[str, Any]:
    """Tokens per second, the median of the second half of the log, and some of the evaluation."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in log if "tokens_per_second" in line]
    values: dict[str, Any] = {"part": "train", "tokens_per_second": statistics.median(speeds[len(speeds) // 2 :])}
    if (run / "eval.json").exists():
        evaluation = json.loads((run / "eval.json").read_text())
        values |= {name: evaluation[name] for name in KEPT if name in evaluation}
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.train", description=__doc__)
    parser.add_argument("--lines", type=Path, required=True, help="append the figures to this file")
    chosen, options = parser.parse_known_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        status = train([*options, "--out", str(run)])
        if status:
            return status
        values = figures(run) | {"seconds": time.monotonic() - begin}
    print(values)
    with chosen.lines.open("a") as file:
        file.write(json.dumps(values) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
