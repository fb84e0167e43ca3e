"""Probe the features of runs: one pass of the language model, one dense probe, and sparse probes for each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsae.data.harvest import content_activations
from tsae.data.labels import labels as labels_of
from tsae.data.sections import sections
from tsae.data.sequences import TokenBatch
from tsae.errors import UserError
from tsae.evaluation.held_out import choose_source, held_out
from tsae.evaluation.subject import Subject, by_name, open_run
from tsae.lm.loading import LanguageModel
from tsae.lm.site import Site
from tsae.presets import at_length
from tsae.probe.probes import check_installed, dense_probes, sparse_probes
from tsae.probe.problems import counted_tokens, document_of_tokens, pose_problems
from tsae.probe.results import Results, as_json, print_results
from tsae.probe.token_classes import token_classes
from tsae.rundir import layout
from tsae.rundir.ownership import owning_runs
from tsae.utils.atomic import write_json
from tsae.utils.cli import check_counts, deliver
from tsae.utils.output import say
from tsae.utils.progress import bar

AGREEING = (
    *("model", "revision", "lm_dtype", "lm_quantization", "layer", "site", "target"),
    *("data", "text", "length"),
)


def probe_and_print(runs: Sequence[Path], **options: Any) -> None:
    """`probe_runs`, then print the table and the files written."""
    probe_runs(runs, show=_print, **options)


def probe_runs(
    runs: Sequence[Path],
    *,
    show: Callable[[Results, Sequence[Path | None]], None] = lambda results, written: None,
    **options: Any,
) -> Results:
    """Probe runs and, once all are measured, write each one's probes.json.

    show: called with the results and the files, None for those that could not be written
    options: those of the command line, as of `measure`

    Raises:
        UserError: as `measure`; another command uses a run; or a file could not be written.
    """
    directories = _directories(runs)
    with owning_runs(*directories.values()):
        results = measure(directories, **options)
        deliver(
            *(partial(_write, run, as_json(results, name)) for name, run in directories.items()),
            show=lambda *written: show(results, written),
        )
    return results


def _write(run: Path, probes: dict[str, Any]) -> Path:
    write_json(run / layout.PROBES, probes)
    return run / layout.PROBES


def _print(results: Results, written: Sequence[Path | None]) -> None:
    print_results(results)
    for path in filter(None, written):
        say(f"Written: {path}")


def measure(
    directories: dict[str, Path],
    *,
    data: str | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    column: str | None = None,
    length: int | None = None,
    labels: Sequence[str] = (),
) -> Results:
    """Probe runs, by name; writes nothing. The options are those of the command line.

    Raises:
        UserError: a directory is not a run's, the runs differ in model, layer, length or text, the text is too short
            for any problem or has no such labels, or scikit-learn is missing.
    """
    check_installed()
    check_counts(tokens=tokens)
    subject = _open(directories, [key for key in AGREEING if key != "length" or length is None])
    if length is not None:
        subject.config = at_length(subject.config, length)
    config = subject.config
    seed = config.stream_seed if seed is None else seed
    source = choose_source([config], data, column)
    sequences = config.evaluation.sequences if tokens is None else math.ceil(tokens / config.length)
    lm = subject.load_lm(device)
    batch, documents, named = held_out(source, lm, config.length, sequences, seed)

    owner = document_of_tokens(batch, documents, lm.tokenizer, prefix=lm.prepend_bos)
    labelled = {each: labels_of(source.data, documents, each, source.text) for each in labels}
    classes = token_classes(counted_tokens(batch).numpy(), lm.tokenizer)
    problems, left_out = pose_problems(
        batch, owner, documents, sections(source.data, documents, source.text), classes, seed, labelled
    )
    if not problems:
        raise UserError("The text is too short for any probe; give more text, or more of it with --tokens.")
    owner = owner[owner >= 0]  # [n], of the counted tokens

    batches = _harvest(lm, batch, config.place, config.buffer.harvest_batch)
    del lm
    with bar("probing", 1 + len(subject.saes), "probes") as advance:
        counted = torch.cat([x[segments >= 0] for x, segments in batches]).numpy()
        dense = dense_probes(counted, problems, owner, seed)
        advance(1)
        sparse = {}
        for name, sae in subject.saes.items():
            sparse[name] = sparse_probes(sae, batches, problems, owner, seed)
            advance(1)

    text = named or {"data": source.data, "column": source.text.column, "part": "the run's own evaluation part"}
    text |= {"length": config.length, "tokens": len(owner), "documents": len(set(owner.tolist())), "seed": seed}
    return Results(text, problems, left_out, dense, sparse)


def _directories(paths: Sequence[Path]) -> dict[str, Path]:
    """Run directories by name; a directory that is named twice is listed once."""
    if not paths:
        raise UserError("No run is named; name the directories of one or more runs.")
    runs = list({path.resolve(): path for path in paths}.values())
    return by_name(runs, [run.resolve().name for run in runs])


def _open(directories: dict[str, Path], agreeing: Sequence[str] = AGREEING) -> Subject:
    """All runs. Raises UserError unless they can share one harvest of the same text: they agree in ``agreeing``."""
    opened = {name: open_run(run) for name, run in directories.items()}
    (first, subject), *others = opened.items()
    for name, other in others:
        for key in agreeing:
            mine, theirs = getattr(subject.config, key), getattr(other.config, key)
            if mine != theirs:
                raise UserError(
                    f"The runs {first} and {name} differ in {key} ({mine} and {theirs}); probe them separately: "
                    "only runs with the same model, layer, length and text can share a harvest."
                )
    runs = {name: run.config for name, run in opened.items()}
    return Subject({name: run.sae for name, run in opened.items()}, subject.config, runs)


def _harvest(lm: LanguageModel, batch: TokenBatch, place: Site, size: int) -> list[tuple[Tensor, Tensor]]:
    """Activations [N, T, d] float32 and segments [N, T] on the CPU, ``size`` sequences each."""
    batches = []
    with bar("harvesting", batch.segments.numel()) as advance:
        for part in batch.split(size):
            batches.append((content_activations(lm, part, place).to("cpu", torch.float32), part.segments))
            advance(part.segments.numel())
    return batches
