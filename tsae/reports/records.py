"""What a run directory records: the training log, the evaluation, the configuration and the feature densities."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tsae.errors import UserError
from tsae.rundir import layout
from tsae.utils.paths import expanded

History = dict[str, tuple[np.ndarray, np.ndarray]]
"""Steps and values of each numeric key of a metrics.jsonl."""


@dataclass
class Records:
    """The records of one run; each is empty if its file does not exist."""

    name: str
    history: History = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The content of eval.json."""
    text: str | None = None
    """The text that was evaluated on; None for the evaluation part of the run's own."""
    config: dict[str, Any] = field(default_factory=dict)
    density: np.ndarray | None = None
    """[d_sae] fraction of tokens at which each feature is active."""


def read_records(run_dir: str | Path) -> Records:
    """Everything a run directory records. Raises UserError for a directory or a file that cannot be read."""
    run_dir = expanded(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"There is no run directory {run_dir}; name the directory that training wrote.")
    sparsity = run_dir / layout.SPARSITY
    return Records(
        name=run_dir.resolve().name,
        history=read_history(run_dir / layout.METRICS),
        evaluation=_read_object(run_dir / layout.EVALUATION),
        text=read_source(run_dir).get("data"),
        config=_read_object(run_dir / layout.CONFIG),
        density=10.0 ** load_file(sparsity)["sparsity"].astype(np.float64) if sparsity.exists() else None,
    )


def read_source(run_dir: str | Path) -> dict[str, Any]:
    """The text that eval.json was measured on; empty for the evaluation part of the run's own."""
    return _read_object(Path(run_dir) / layout.EVALUATION_SOURCE)


def read_history(path: Path) -> History:
    """Every numeric key of a metrics.jsonl as (steps, values), in ascending order of steps.

    If a step was logged twice, as after a resumed run, its last line counts. An incomplete last line is left out.
    Raises UserError for any other line that is not a JSON object with a `step`.
    """
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            by_step[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                f"Line {number} of {path} is not a JSON object with a step; correct or delete the line."
            ) from None
    series: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(by_step):
        for key, value in by_step[step].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                series.setdefault(key, []).append((step, float(value)))
    return {key: (np.array([s for s, _ in v]), np.array([x for _, x in v])) for key, v in series.items()}


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); evaluate the run again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; evaluate the run again.")
    return value
