"""The names of all files in a run directory.

A command that writes into a run takes the name from here, so that `--overwrite` removes the file with the run it
belongs to (tests/rundir/test_layout.py looks for names written elsewhere).
"""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"  # makes a directory a run's
SWEEP = "sweep.json"  # makes a directory a sweep's
LOCK = ".lock"  # held by the process that owns the directory, and removed when that ends; `.lock.*` without flock

CHECKPOINTS = "checkpoint"  # folder
AUTOENCODER = "sae"  # folder, in SAELens's format
SPARSITY = f"{AUTOENCODER}/sparsity.safetensors"
METRICS = "metrics.jsonl"
EVALUATION = "eval.json"
EVALUATION_SOURCE = "eval_source.json"  # the text behind eval.json, if it is not the run's own
REPORT = "report.png"
DIVERGED = "diverged.json"
TENSORBOARD = "tensorboard"  # folder
WANDB = "wandb"  # folder
WANDB_ID = "wandb.json"  # the run's id at Weights & Biases
PAGE = "view.html"
PROBES = "probes.json"
SAEBENCH = "saebench_core.json"
REPRODUCTION = "results.json"  # the next three: beside sweep.json, of tsae.reproduce
REPRODUCTION_TABLE = "results.md"
REPRODUCTION_FIGURE = "figure1.png"

OUTPUTS = (
    *(CHECKPOINTS, AUTOENCODER, METRICS, EVALUATION, EVALUATION_SOURCE),
    *("eval-release-*.json", "eval-hysteresis-*.json", "eval-length-*.json"),
    *(
        REPORT,
        DIVERGED,
        TENSORBOARD,
        WANDB,
        WANDB_ID,
        PAGE,
        PROBES,
        SAEBENCH,
        REPRODUCTION,
        REPRODUCTION_TABLE,
        REPRODUCTION_FIGURE,
    ),
)
"""Glob patterns of everything that commands write into a run or a sweep, but for `CONFIG` and `SWEEP`."""


def other_evaluation(ratio: float | None, length: int | None, hysteresis: str | None = None) -> str:
    """The file of an evaluation with another release ratio, length or hysteresis; None: as trained."""
    release = "" if ratio is None else f"-release-{ratio:g}"
    release += "" if hysteresis is None else f"-hysteresis-{hysteresis}"
    return f"eval{release}{'' if length is None else f'-length-{length}'}.json"


def has_autoencoder(run: Path) -> bool:
    """Whether a trained autoencoder is in the run directory."""
    return (run / AUTOENCODER / "cfg.json").is_file()
