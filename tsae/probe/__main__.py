"""`python -m tsae.probe RUN [RUN ...]`: what the features of runs know about the text, beside each other."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tsae.errors import UserError
from tsae.rundir import layout
from tsae.utils.cli import parse, report_errors

if TYPE_CHECKING:
    from tsae.config import TrainConfig
    from tsae.probe.results import Results


@dataclass
class Arguments:
    """Probe features for the document, the section and the class of a token, with 1, 5 and 20 features a label, on
    text that the runs did not train on. Writes probes.json into each run and prints a table of the runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, of one model, layer and text; the first is what the others are compared with."""
    data: str | None = None
    """Text to probe on, as for `python -m tsae.evaluate`. Default: the evaluation part of the runs' own text."""
    tokens: int | None = None
    """Tokens to probe on. Default: as in the first run's configuration."""
    seed: int | None = None
    """Seed of the text order, of the documents that train, and of the bootstrap. Default: the first run's."""
    device: str | None = None
    """Where to compute: `auto`, `cpu`, `cuda`, ... Default: the first run's."""
    column: str | None = None
    """Column of the data set that holds the text. Default: the runs'."""


AGREEING = ("model", "revision", "layer", "lm_dtype", "data", "text")


def probe_runs(arguments: Arguments) -> Results:
    """Probe the runs as `arguments` say and write each one's probes.json, all after everything was measured.

    Raises UserError for a directory that is not a run, runs that differ in model, layer or text, text that poses no
    problem, and a missing scikit-learn.
    """
    # Imported here, so that --help and a misspelt option answer at once.
    import math

    import torch

    from tsae.config import LENGTH
    from tsae.data.sections import sections
    from tsae.evaluation.evaluator import check_width
    from tsae.evaluation.held_out import held_out, read_run, source_of
    from tsae.lm.hooks import activations
    from tsae.lm.loading import load_language_model
    from tsae.probe.probes import check_installed, dense_probes, sparse_probes
    from tsae.probe.problems import counted_tokens, document_of_tokens, pose_problems
    from tsae.probe.results import Results, as_json
    from tsae.probe.token_classes import token_classes
    from tsae.sae.model import SparseAutoencoder
    from tsae.training.assemble import resolve_device
    from tsae.utils.atomic import write_json
    from tsae.utils.progress import bar

    check_installed()
    if arguments.tokens is not None and arguments.tokens < 1:
        raise UserError(f"--tokens is {arguments.tokens}; it must be at least 1.")
    runs = _named(arguments.runs)
    configs = {name: read_run(run) for name, run in runs.items()}
    config = _agreed(configs)
    seed = config.stream_seed if arguments.seed is None else arguments.seed
    source = source_of(config, arguments.data, arguments.column)
    sequences = config.evaluation.sequences
    if arguments.tokens is not None:
        sequences = math.ceil(arguments.tokens / LENGTH)

    device = resolve_device(config.device if arguments.device is None else arguments.device)
    saes = {name: SparseAutoencoder.load(run / layout.AUTOENCODER, device=device) for name, run in runs.items()}
    lm = load_language_model(config.model, device=device, dtype=config.lm_dtype, revision=config.revision)
    for name, sae in saes.items():
        check_width(sae, lm, name)
    batch, documents, named = held_out(config, source, lm, sequences, seed)

    owner = document_of_tokens(batch, documents, lm.tokenizer)
    classes = token_classes(counted_tokens(batch).numpy(), lm.tokenizer)
    problems, left_out = pose_problems(batch, owner, documents, sections(source.data, documents), classes, seed)
    if not problems:
        raise UserError("The text is too short for any probe; give more text, or more of it with --tokens.")
    owner = owner[owner >= 0]  # [n], of the counted tokens

    x = []
    with bar("harvesting", batch.segments.numel()) as advance:
        for tokens in batch.tokens.split(config.buffer.harvest_batch):
            x.append(activations(lm, tokens, config.layer)[:, 1:].to("cpu", torch.float32))
            advance(tokens[:, 1:].numel())
    del lm
    batches = list(zip(x, batch.segments.split(config.buffer.harvest_batch), strict=True))
    with bar("probing", 1 + len(saes), "probes") as advance:
        dense = dense_probes(
            torch.cat([part[segments >= 0] for part, segments in batches]).numpy(), problems, owner, seed
        )
        advance(1)
        sparse = {}
        for name, sae in saes.items():
            sparse[name] = sparse_probes(sae, batches, problems, owner, seed)
            advance(1)

    text = named or {"data": source.data, "column": source.text.column, "part": "the run's own evaluation part"}
    text |= {"tokens": len(owner), "documents": len(set(owner.tolist())), "seed": seed}
    results = Results(text, problems, left_out, dense, sparse)
    for name, run in runs.items():
        write_json(run / layout.PROBES, as_json(results, name))
    return results


def _named(paths: tuple[Path, ...]) -> dict[str, Path]:
    """The runs under short names; what is named twice comes once."""
    if not paths:
        raise UserError("No run is named; name the directories of one or more runs.")
    runs = list({path.resolve(): path for path in paths}.values())
    names = [path.resolve().name for path in runs]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, runs, strict=True)}


def _agreed(configs: dict[str, TrainConfig]) -> TrainConfig:
    """The first configuration. Raises UserError unless the others harvest and hold out the same."""
    (first, config), *others = configs.items()
    for name, other in others:
        for key in AGREEING:
            mine, theirs = getattr(config, key), getattr(other, key)
            if mine != theirs:
                raise UserError(
                    f"The runs {first} and {name} differ in {key} ({mine} and {theirs}); probe them apart, for only "
                    "runs of one model, layer and text can share a harvest."
                )
    return config


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    with report_errors() as status:
        arguments = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.probe")
        results = probe_runs(arguments)
        from tsae.probe.results import print_results
        from tsae.utils.progress import console

        print_results(results)
        for run in arguments.runs:
            console.print(f"Written: {run / layout.PROBES}", soft_wrap=True)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
