"""`tsae.train`: training from Python."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsae.api.options import aliases, keywords, names, override
from tsae.api.run import Run
from tsae.api.tables import TableOfRuns
from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.presets import at_length
from tsae.reports.table import print_table
from tsae.rundir import layout
from tsae.training.command import Trained
from tsae.training.command import train as start
from tsae.training.dry_run import Estimate, print_estimate
from tsae.training.fill_cache import Filled, print_filled
from tsae.training.own_terms import OwnTerm, joined, named, own_terms
from tsae.training.request import Request, base_of
from tsae.utils.calling import from_python
from tsae.utils.config_json import from_dict, load_json
from tsae.utils.interrupts import Interrupted
from tsae.utils.output import say
from tsae.utils.paths import expanded, with_expanded_paths
from tsae.utils.torchrun import is_rank0


class Sweep(TableOfRuns, dict[str, Run]):
    """The runs of a sweep that were completed, by name; shown side by side."""


def train(
    preset: str | None = None,
    *,
    config: str | Path | Mapping[str, Any] | TrainConfig | None = None,
    temporal: OwnTerm | Mapping[str, OwnTerm] | None = None,
    **options: Any,
) -> Run | Sweep | Estimate | Filled | None:
    """Train a temporal sparse autoencoder, evaluate it, and write its run directory, as `python -m tsae.train` does.

    preset: the configuration to start from, one of `tsae.presets.PRESETS`; default demo
    config: the one to start from instead: a file such as the config.json of a run, its content, or a `TrainConfig`
    temporal: a function of your own as temporal term, or several by name (`tsae.training.own_terms.OwnTerm`): in the
        place of the preset's terms, or beside those of ``objective={"temporal": ...}``
    options: all options of `tsae.train`'s command line, which docs/training.md explains. Nested ones are dictionaries,
        ``sae={"d_sae": 4096}``, or dataclasses, ``sae=SAEConfig(...)``, which set all of their options.
        ``out``: the run directory, by default runs/PRESET/TIMESTAMP. ``overwrite=True`` replaces a run there.
        ``resume``: continues the run or sweep in this directory. ``sweep``: trains the runs of a YAML file.
        ``dry_run=True``: prints an estimate of memory, disk space and time, and stops. ``harvest_only=True``: fills the
        cache, and stops.
    out: the `Run`; of a sweep a dictionary of them; of a dry run the `Estimate`; of a harvest what is `Filled`. With
        several processes None on all but the first.

    Interrupting it, as a cell of a notebook, saves a checkpoint; the message says how to go on.

    Raises:
        UserError: bad options, a model or text that cannot be used, or training diverged.
        Interrupted: a `KeyboardInterrupt`, after SIGINT or SIGTERM.
    """
    with from_python():
        functions = {} if temporal is None else named(temporal)
        cfg, asked, given = _requested(preset, config, options)
        if functions and asked.resume is None and asked.sweep is None:
            asked_for = {aliases(Request).get(name, name) for name in names(options)}
            kept = cfg.objective.temporal if "objective.temporal" in asked_for else None
            cfg = replace(cfg, objective=replace(cfg.objective, temporal=joined(kept, functions)))
        with own_terms(functions) if functions else nullcontext():
            try:
                trained = start(cfg, asked, given)
            except Interrupted as stop:
                advice = stop.advice or "; continue with tsae.train(resume=...) and the run's directory"
                raise Interrupted(stop.number, advice) from None
        return _result(trained) if is_rank0() else None


def _requested(
    preset: str | None, config: str | Path | Mapping[str, Any] | TrainConfig | None, options: dict[str, Any]
) -> tuple[TrainConfig, Request, list[str]]:
    """The configuration of a new run, everything asked for, and the dotted names of the options given."""
    if preset is not None and config is not None:
        raise UserError("Both preset and config are given; name one of them to start from.")
    path = expanded(config) if isinstance(config, (str, os.PathLike)) else None
    given = ["config"] if config is not None else []
    if isinstance(config, Mapping):
        base = from_dict(TrainConfig, dict(config))
        base = replace(base, text=replace(base.text, threshold=None))  # as for a file
        given += names(config)
    elif isinstance(config, TrainConfig):
        base = config
        given += names(vars(config))
    else:
        base = base_of(preset or "", path)
    request = Request.of(base)
    if "length" in options:
        length = override(request, {"length": options["length"]}).length
        request = Request.of(at_length(base, length))
    asked = with_expanded_paths(override(request, options))
    given += [aliases(Request).get(name, name) for name in names(options)]
    return replace(asked.run, preset=base.preset), replace(asked, preset=preset or "", config=path), given


def _result(trained: Trained) -> Run | Sweep | Estimate | Filled:
    """What the caller gets; metrics that could not be written are printed before the error is raised."""
    job = trained.job
    if trained.filled is not None:
        print_filled(trained.filled)
        return trained.filled
    if trained.estimate is not None:
        print_estimate(trained.estimate, job)
        return trained.estimate
    errors = {name: outcome.error for name, outcome in trained.outcomes.items() if outcome.error is not None}
    if not job.is_sweep:
        if errors:
            evaluation = trained.outcomes[""].evaluation
            if evaluation is not None:
                print_table(evaluation.metrics)
            raise errors[""]
        return Run.of_directory(job.directory)
    if len(errors) == len(trained.outcomes):
        raise UserError(f"No run of {job.directory} was completed; {layout.SWEEP} there says why.")
    for name, error in errors.items():
        say(f"Run {name!r}: {error}")
    rows = load_json(job.directory / layout.SWEEP)["runs"]
    runs = Sweep({name: Run.of_directory(job.directory / name) for name in job.runs if name not in errors})
    runs.show_as(rows, title="Sweep", what="run")
    return runs


def _signature() -> inspect.Signature:
    """Every option by name, as help and completion show them."""
    own = list(inspect.signature(train).parameters.values())
    shown = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = keywords(Request, without=("preset", "config"))
    return inspect.Signature([*shown, *rest], return_annotation="Run | Sweep | Estimate | Filled | None")


train.__signature__ = _signature()  # type: ignore[attr-defined]
