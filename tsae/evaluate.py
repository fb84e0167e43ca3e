"""Evaluate a sparse autoencoder: `python -m tsae.evaluate RUN`. The measuring itself: `tsae.evaluation.evaluator`.

Autoencoders of other libraries, and several side by side: `tsae.evaluation.compare`. Which text it is measured on:
`tsae.evaluation.held_out`.

With `--release-ratio` the autoencoder is measured as one of another release ratio, at the L0 it had: its thresholds are
multiplied by one factor, found on the run's own training text, as training found them (`tsae.sae.release`). What is
measured stays text that was not trained on, and its L0 is what comes of that, as with any other autoencoder. The run's
own eval.json and report.png are not touched.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from tsae.config import LENGTH, TrainConfig
from tsae.data.documents import Document
from tsae.data.harvest import Harvester
from tsae.data.sequences import SequenceStream
from tsae.data.text import open_text
from tsae.errors import UserError
from tsae.evaluation import compare
from tsae.evaluation.evaluator import (
    EvaluationResult,
    check_width,
    evaluate,
    evaluation_options,
    evaluation_progress,
    write_eval,
)
from tsae.evaluation.held_out import held_out, read_run, source_of
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.reports.figure import read_source, write_report
from tsae.reports.table import print_table
from tsae.rundir import layout
from tsae.sae.model import SparseAutoencoder
from tsae.sae.release import check_has_thresholds, with_release_ratio
from tsae.utils.atomic import write_json
from tsae.utils.cli import parse, report_errors
from tsae.utils.config_json import load_json


@dataclass
class Arguments:
    """Evaluate a trained run again: rewrites its eval.json and report.png and prints the metrics.

    With --release-ratio R it writes eval-release-R.json instead.

    With --model and --layer, autoencoders of other libraries; of several, a table side by side. Nothing is rewritten.
    """

    saes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|SAE ...")]
    """A run directory; or autoencoders in any known format, as directories or as OWNER/NAME/FOLDER on the hub."""
    model: str | None = None
    """Language model that the autoencoders are of, as for training. Default: that of the runs among them."""
    layer: int | None = None
    """Block whose output they encode, counted from 0. Default: that of the runs among them."""
    format: Literal["tsae", "saebench"] = "tsae"
    """`saebench` writes SAEBench's core output too: saebench_core.json in the run, or --out."""
    out: Path | None = None
    """Write the metrics to this JSON file; of several autoencoders, by name."""
    data: str | None = None
    """Text to evaluate on, of which no document that the run trained on is used: what lies on the evaluation
    side of the run's split, or if that is too little, all that is not in its training text. Default: the
    evaluation part of the run's own text."""
    tokens: int | None = None
    """Tokens for reconstruction, sparsity and temporal metrics. Default: as in the run's configuration."""
    ce_sequences: int | None = None
    """Sequences for the cross-entropy and KL metrics. Default: as in the run's configuration."""
    seed: int | None = None
    """Seed of the text order and of the shuffled control. Default: the run's."""
    device: str | None = None
    """Where to compute: `auto`, `cpu`, `cuda`, ... Default: the run's."""
    column: str | None = None
    """Column of the data set that holds the text. Default: the run's."""
    release_ratio: float | None = None
    """Measure the autoencoder with this release ratio, 0 to 1 (1: no hysteresis), at the same L0: all its thresholds
    are multiplied by one factor, found on as many sequences of the run's training text as its evaluation takes. Goes
    into eval-release-R.json. Default: as trained."""

    @property
    def run(self) -> Path:
        """The one run."""
        return Path(self.saes[0])


def evaluate_run(arguments: Arguments) -> EvaluationResult:
    """Evaluate RUN/sae as `arguments` say and rewrite RUN/eval.json and RUN/report.png, or write `release_file`.

    Nothing is written unless everything was measured. Raises UserError for a directory that is not a run,
    a value that makes no sense, or text or a model that cannot be read.
    """
    run = arguments.run
    config = read_run(run)
    for name in ("tokens", "ce_sequences"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    ratio = arguments.release_ratio
    if ratio is not None and not 0.0 <= ratio <= 1.0:
        raise UserError(f"--release-ratio is {ratio}; it must be from 0 to 1.")
    seed = config.stream_seed if arguments.seed is None else arguments.seed
    source = source_of(config, arguments.data, arguments.column)
    device = config.device if arguments.device is None else arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    sae = SparseAutoencoder.load(run / layout.AUTOENCODER)
    if ratio is not None:
        check_has_thresholds(sae.cfg)
    lm = load_language_model(config.model, device=device, dtype=config.lm_dtype, revision=config.revision)
    check_width(sae, lm, str(run))
    sae.to(lm.device)

    sequences = config.evaluation.sequences
    if arguments.tokens is not None:
        sequences = math.ceil(arguments.tokens / LENGTH)
    batch, _, named = held_out(config, source, lm, sequences, seed)
    released = None if ratio is None else with_release_ratio(sae, ratio, training_sample(config, lm))
    options = evaluation_options(config) | {"seed": seed}
    if arguments.ce_sequences is not None:
        options["ce_sequences"] = arguments.ce_sequences
    with evaluation_progress() as progress:
        result = evaluate(sae if released is None else released.sae, lm, [batch], **options, progress=progress)
    if ratio is None or released is None:
        write_eval(result, run, named)
        write_report(run)
    else:
        release = {"ratio": ratio, "threshold_factor": released.factor, "training_l0": released.l0}
        write_json(release_file(run, ratio), result.metrics | {"release": release, "source": named or {}})
    return result


def release_file(run: Path, ratio: float) -> Path:
    """Where the metrics at another release ratio go: those of eval.json, `release`, and `source` if of other text."""
    return run / layout.release_evaluation(ratio)


def training_sample(config: TrainConfig, lm: LanguageModel) -> list[tuple[Tensor, Tensor]]:
    """Activations [N, T, d] float32 and segments [N, T] of as many sequences of a run's training text as its evaluation
    takes: what a threshold that is found after training is found on."""

    def training(epoch: int) -> Iterator[Document]:
        return open_text(config.data, part="train", seed=config.stream_seed, config=config.text, epoch=epoch)

    stream = SequenceStream(training, lm.tokenizer, LENGTH)
    harvester = Harvester(lm, config.layer, stream, batch=config.buffer.harvest_batch, dtype=torch.float32)
    return [tuple(part) for part in harvester.batches(harvester.tokenize(config.evaluation.sequences))]


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    argv: its arguments; None takes those of the process
    out: exit status, 2 for bad input, whose sentence is then on stderr
    """
    with report_errors() as status:
        arguments = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.evaluate")
        if compare.is_wanted(arguments):
            compare.compare(arguments)
            return status.code
        result = evaluate_run(arguments)
        compare.write_results(arguments, {arguments.run.name: result})
        console = Console()
        if arguments.release_ratio is None:
            source = read_source(arguments.run)
            written = f"{arguments.run / layout.EVALUATION} and {arguments.run / layout.REPORT}"
        else:
            path = release_file(arguments.run, arguments.release_ratio)
            source = load_json(path)["source"]
            written = f"{path}; the run's own eval.json and report.png are as they were"
        print_table(result.metrics, console, text=source.get("data"))
        of = f" of {source['data']} ({source['part']})" if source else ""
        console.print(f"{result.tokens:,} tokens{of}. Wrote {written}.", markup=False, highlight=False, soft_wrap=True)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
