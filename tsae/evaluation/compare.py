"""Autoencoders of any library, one or several side by side: the rest of `python -m tsae.evaluate`.

The language model runs once for all of them. Nothing is written into the autoencoders' own directories.

Which text: `--data`, or that of the runs among them, of which only what no run trained on is used; for others than our
runs, which do not say what they were trained on, the evaluation side of the text's default split.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from tsae.config import LENGTH, TrainConfig
from tsae.data.sequences import SequenceStream, TokenBatch, TooShortError
from tsae.data.text import PYTHON_DOCS, TextConfig, absolute_source, open_text, split_threshold
from tsae.errors import UserError
from tsae.evaluation.evaluator import (
    EvaluationResult,
    check_width,
    evaluate_all,
    evaluation_options,
    evaluation_progress,
)
from tsae.evaluation.held_out import held_out, source_of
from tsae.formats import load
from tsae.lm.hooks import check_layer
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.reports.table import print_comparison, print_table
from tsae.rundir import layout
from tsae.rundir.directory import read_config
from tsae.sae.model import SparseAutoencoder
from tsae.utils.atomic import write_json

if TYPE_CHECKING:
    from tsae.evaluate import Arguments


def is_wanted(arguments: Arguments) -> bool:
    """Whether the command line asks for more than to evaluate one run again.

    Raises:
        UserError: it names no autoencoder.
    """
    if not arguments.saes:
        raise UserError("No autoencoder is named; give a run's directory, or others with --model and --layer.")
    return len(arguments.saes) > 1 or arguments.model is not None or arguments.layer is not None


def compare(arguments: Arguments) -> dict[str, EvaluationResult]:
    """Evaluate the autoencoders that are named, print a table, and write `--out`; results by name.

    Raises:
        UserError: an autoencoder cannot be read, does not fit the language model (before that is run), or does not
            agree with the others; text or a model that cannot be read; a value that makes no sense; or a metric that
            is not finite, if it is the only autoencoder's.
    """
    for name in ("tokens", "ce_sequences"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    names = _names(arguments.saes)
    if arguments.format == "saebench" and len(names) > 1:
        raise UserError("--format saebench describes one autoencoder; name them one by one.")
    saes = {name: load(source) for name, source in names.items()}
    runs = {name: config for name, source in names.items() if (config := _run_config(source)) is not None}
    config = _common(arguments, runs)
    device = config.device if arguments.device is None else arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = load_language_model(config.model, device=device, dtype=config.lm_dtype, revision=config.revision)
    check_layer(lm, config.layer)
    for name, sae in saes.items():
        check_width(sae, lm, name)
        sae.to(lm.device)
    seed = config.stream_seed if arguments.seed is None else arguments.seed
    sequences = config.evaluation.sequences if arguments.tokens is None else math.ceil(arguments.tokens / LENGTH)
    batch, data = _text(arguments, runs, config, lm, sequences, seed)
    options = evaluation_options(config) | {"seed": seed}
    if arguments.ce_sequences is not None:
        options["ce_sequences"] = arguments.ce_sequences
    with evaluation_progress() as progress:
        results = evaluate_all(saes, lm, [batch], **options, progress=progress)
    _print(results, data, lm, config.layer)
    write_results(arguments, results, saes=saes, config=replace(config, data=data))
    return results


def write_results(
    arguments: Arguments,
    results: dict[str, EvaluationResult],
    *,
    saes: dict[str, SparseAutoencoder] | None = None,
    config: TrainConfig | None = None,
) -> None:
    """Write what `--out` and `--format` ask for: one autoencoder's metrics, or several's by name, or SAEBench's file.

    saes, config: what was measured on what; None, the one run that is named
    """
    path = arguments.out
    if arguments.format == "saebench":
        from tsae.integrations.sae_bench_output import core_output

        ((name, result),) = results.items()
        if path is None and config is not None:
            raise UserError("--format saebench needs --out FILE for an autoencoder that is not a run.")
        if config is None:
            config = read_config(arguments.run)
        sae = load(arguments.saes[0]) if saes is None else saes[name]
        write_json(path or arguments.run / layout.SAEBENCH, core_output(name, sae, result, config))
    elif path is not None:
        metrics = {name: result.metrics for name, result in results.items()}
        write_json(path, metrics if len(metrics) > 1 else next(iter(metrics.values())))


def _names(sources: tuple[str, ...]) -> dict[str, str]:
    """The autoencoders by the last part of where they are, or by all of it where two share that."""
    if len(set(sources)) < len(sources):
        raise UserError(f"{next(s for s in sources if sources.count(s) > 1)} is named twice; name each once.")
    short = [Path(source).absolute().name for source in sources]
    return {name if short.count(name) == 1 else source: source for name, source in zip(short, sources, strict=True)}


def _run_config(source: str) -> TrainConfig | None:
    """The configuration of the run that ``source`` is, or whose `sae/` it is; None if it is no run."""
    place = Path(source).expanduser()
    for run in (place, place.parent):
        if (run / layout.CONFIG).is_file() and layout.has_autoencoder(run):
            return read_config(run)
    return None


def _common(arguments: Arguments, runs: dict[str, TrainConfig]) -> TrainConfig:
    """The language model, layer and sizes that all are measured with: what is asked for, else what the runs have."""
    config = next(iter(runs.values()), TrainConfig())
    missing = [name for name in ("model", "layer") if getattr(arguments, name) is None]
    if missing and not runs:
        wanted = " and ".join(f"--{name}" for name in missing)
        raise UserError(f"{arguments.saes[0]} is not a run, so it does not say what it encodes; name it with {wanted}.")
    for field in missing:
        values = {name: getattr(run, field) for name, run in runs.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise UserError(f"The runs differ in their {field} ({said}), so they cannot be compared on one.")
    if arguments.model is not None:
        config = replace(config, model=arguments.model, revision=None)
    if arguments.layer is not None:
        config = replace(config, layer=arguments.layer)
    return config


def _text(
    arguments: Arguments,
    runs: dict[str, TrainConfig],
    config: TrainConfig,
    lm: LanguageModel,
    sequences: int,
    seed: int,
) -> tuple[TokenBatch, str]:
    """The sequences to measure on, and the name of the text that they are of."""
    splits = {(run.data, run.text): run for run in runs.values()}
    if len(splits) == 1:  # as `python -m tsae.evaluate` of one of them
        source = source_of(config, arguments.data, arguments.column)
        return held_out(config, source, lm, sequences, seed).batch, source.data
    if splits and arguments.data is None:
        raise UserError("The runs were trained on different text; name the text to compare them on, with --data.")
    data = absolute_source(arguments.data or PYTHON_DOCS)
    text = TextConfig(column=arguments.column)
    # Below the lowest threshold is the evaluation side of all.
    threshold = min((split_threshold(run.data, run.text) for run in splits.values()), default=text.evaluation_share)

    def batch(threshold: float) -> TokenBatch:
        documents = open_text(data, part="evaluation", seed=seed, config=replace(text, threshold=threshold))
        return SequenceStream(lambda epoch: documents, lm.tokenizer, LENGTH, repeat=False).next_batch(sequences)

    try:
        return batch(threshold), data
    except TooShortError:
        if splits:
            raise
        return batch(1.0), data  # all of it: nothing is known to have been trained on it


def _print(results: dict[str, EvaluationResult], data: str, lm: LanguageModel, layer: int) -> None:
    console = Console()
    if len(results) == 1:
        (result,) = results.values()
        result.check_finite()
        print_table(result.metrics, console, text=data)
    else:
        rows: dict[str, dict[str, Any]] = {}
        for name, result in results.items():
            rows[name] = {"metrics": result.metrics, "error": None}
            try:
                result.check_finite()
            except UserError as error:
                rows[name]["error"] = str(error)
        print_comparison(rows, console, title=f"{lm.name}, layer {layer}", what="autoencoder")
    tokens = next(iter(results.values())).tokens
    console.print(f"{tokens:,} tokens of {data}.", markup=False, highlight=False)
