"""Export to another library's format: `python -m tsae.export RUN --to saelens|dictionary_learning --out DIR`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tsae.errors import UserError
from tsae.evaluation.evaluator import evaluate, evaluation_options, evaluation_progress, write_eval
from tsae.evaluation.held_out import evaluation_batches, training_sample
from tsae.evaluation.subject import open_run
from tsae.formats import dictionary_learning, load
from tsae.formats.forms import common_architecture, without_hysteresis
from tsae.rundir import layout
from tsae.rundir.ownership import check_output_directory, owning_runs
from tsae.sae.model import SparseAutoencoder
from tsae.sae.release import with_release_ratio
from tsae.utils.atomic import atomic_directory
from tsae.utils.cli import parse, report_errors
from tsae.utils.output import say
from tsae.utils.paths import expanded


@dataclass
class Arguments:
    """Write a run's autoencoder in another library's format, with its metrics."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run directory, or an autoencoder in any known format."""
    to: Literal["saelens", "dictionary_learning"]
    """saelens: cfg.json and sae_weights.safetensors; dictionary_learning: trainer_0/ae.pt and config.json."""
    out: Path
    """The directory to write, new or empty."""
    drop_hysteresis: bool = False
    """Replace hysteresis, which no other library computes, with a plain threshold: the one that keeps as many features
    active on a sample of the run's training text. The metrics are measured again on the run's evaluation text and
    written to eval.json beside the autoencoder."""


def export(arguments: Arguments) -> Path:
    """Write ``arguments.out`` and return it. It is complete or absent.

    Raises:
        UserError: the other library has no form for the autoencoder; ``out`` is not empty, is in the place of a run's
            file or cannot be written; another process uses the run; or the source, or what the measurement needs,
            cannot be read.
    """
    out, library = arguments.out, {"saelens": "SAELens"}.get(arguments.to, arguments.to)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty directory; name a new one.")
    check_output_directory(out)
    source = expanded(arguments.source)
    with owning_runs(source):
        return _export(arguments, source, out, library)


def _export(arguments: Arguments, source: Path, out: Path, library: str) -> Path:
    sae = load(arguments.source)
    run = source if (source / layout.CONFIG).is_file() and (source / layout.AUTOENCODER).is_dir() else None
    dropping = arguments.drop_hysteresis and sae.cfg.kind.release
    common_architecture(without_hysteresis(sae) if dropping else sae, library)
    if dropping and run is None:
        raise UserError(f"{source} is not a run directory, which --drop-hysteresis needs to measure the metrics again.")
    extra: dict[str, Any] = {}
    with atomic_directory(out) as directory:
        if dropping and run is not None:
            sae, factor = _measured_without_hysteresis(run, directory)
            extra = {"hysteresis_dropped": {"threshold_factor": factor}}
        elif run is not None:
            _copy_metrics(run, directory)
        if arguments.to == "saelens":
            without_hysteresis(sae).save(directory, **extra)
        else:
            dictionary_learning.write(without_hysteresis(sae), directory, extra)
        sparsity = directory / layout.SPARSITY
        if arguments.to == "saelens" and sparsity.is_file():  # SAELens keeps it beside the weights
            sparsity.rename(directory / sparsity.name)
        shutil.rmtree(directory / layout.AUTOENCODER, ignore_errors=True)
    return out


def _copy_metrics(run: Path, directory: Path) -> None:
    """Copy the run's metrics, which hold for an exported autoencoder that computes the same."""
    for name in (layout.EVALUATION, layout.EVALUATION_SOURCE, layout.SPARSITY):
        if (run / name).is_file():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(run / name, directory / name)


def _measured_without_hysteresis(run: Path, directory: Path) -> tuple[SparseAutoencoder, float]:
    """The run's autoencoder with a plain threshold, and the factor on the old one; its metrics go to ``directory``."""
    subject = open_run(run)
    config, lm = subject.config, subject.load_lm()
    _, factor, l0 = with_release_ratio(subject.sae, 1.0, training_sample(config, lm))
    if l0 == 0:
        raise UserError("No feature is active on the run's training text, so no threshold can be found; check the run.")
    plain = without_hysteresis(subject.sae, factor)
    batches = evaluation_batches(config, lm, config.evaluation.sequences)
    with evaluation_progress() as progress:
        result = evaluate(plain.to(lm.device), lm, batches, **evaluation_options(config), progress=progress)
    write_eval(result, directory)
    return plain.cpu(), factor


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for bad input."""
    with report_errors() as status:
        arguments = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.export")
        say(f"Written: {export(arguments)}")
    return status.code


if __name__ == "__main__":
    sys.exit(main())
