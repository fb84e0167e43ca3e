"""The main job: train, evaluate, report. Any number of autoencoders on one stream of activations; a run is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsae.config import TrainConfig
from tsae.errors import UserError, WriteError
from tsae.evaluation.evaluator import (
    EvaluationResult,
    evaluate_all,
    evaluation_options,
    evaluation_progress,
    write_eval,
)
from tsae.evaluation.held_out import evaluation_batches
from tsae.lm.hook_points import find
from tsae.parallel.processes import broadcast_from_rank0, raise_on_all_ranks, ranks_for
from tsae.reports.figure import write_report
from tsae.rundir import layout
from tsae.rundir.directory import check_writable
from tsae.rundir.fingerprint import fingerprint
from tsae.rundir.ownership import owning
from tsae.rundir.trackers import check_trackers, track_evaluation
from tsae.sae.model import SparseAutoencoder
from tsae.training.assemble import Setup, prepare
from tsae.training.job import Job
from tsae.training.loop import Outcome, train
from tsae.training.trainer import Trainer
from tsae.utils.calling import resume_call
from tsae.utils.interrupts import Interrupted
from tsae.utils.paths import expanded
from tsae.utils.torchrun import is_rank0


def run(cfg: TrainConfig, directory: Path, *, resume: bool = False) -> EvaluationResult | None:
    """Train, evaluate and report one autoencoder.

    cfg: checked here
    directory: from `tsae.rundir.directory.new_directory`, or with ``resume`` that of an existing run
    out: the evaluation, or None with ``cfg.evaluation.final`` off

    Within `tsae.parallel.processes.processes` all processes train; rank 0 writes, evaluates and raises.

    Raises:
        UserError: bad values, or a model or a text that cannot be used, before anything is written.
    """
    outcome = run_job(Job({"": cfg}, expanded(directory)), resume=resume)[""]
    if outcome.error is not None and is_rank0():
        raise outcome.error
    return outcome.evaluation


def run_job(job: Job, *, resume: bool = False) -> dict[str, Outcome]:
    """Train, evaluate and report the autoencoders of a job; the outcomes by name. Otherwise as `run`.

    What has been measured but cannot be written is in the outcome, with the error.
    """
    with owning_on_rank0(job.directory):
        return _run_job(job, resume=resume)


@contextmanager
def owning_on_rank0(directory: Path) -> Iterator[None]:
    """`tsae.rundir.ownership.owning` by rank 0 for all processes; all raise its error."""
    with ExitStack() as stack:
        broadcast_from_rank0(lambda: stack.enter_context(owning(directory)))
        yield


def _run_job(job: Job, *, resume: bool) -> dict[str, Outcome]:
    check_trackers(name for cfg in job.runs.values() for name in cfg.log)
    broadcast_from_rank0(lambda: check_writable(job.directory))
    try:
        setup = raise_on_all_ranks(lambda: prepare(job, resume=resume))
    except Interrupted as stop:  # a new run has no directory yet that could be resumed
        raise Interrupted(stop.number, stop.advice if resume else " before anything began; start again") from None
    setup = replace(setup, ranks=ranks_for(job.shared))
    outcomes, trainers = train(setup, resume=resume)
    try:
        _finish(job, setup, outcomes, trainers)
    except Interrupted as stop:
        advice = f" after the last step, which is saved; continue with {resume_call(job.directory)}"
        raise Interrupted(stop.number, advice) from None
    return outcomes


def _finish(job: Job, setup: Setup, outcomes: dict[str, Outcome], trainers: dict[str, Trainer]) -> None:
    """Write the autoencoders, their metrics and reports."""
    saes = {name: trainer.finished() for name, trainer in trainers.items()}
    if setup.ranks.is_rank0:
        for name, sae in saes.items():
            _save(sae, setup, name)
        if job.shared.evaluation.final and saes:
            _evaluate(saes, setup, outcomes)
        for name in job.runs:
            with _noting_errors(outcomes[name]):
                write_report(job.directory / name)


@contextmanager
def _noting_errors(outcome: Outcome) -> Iterator[None]:
    """A failed write within the block becomes the outcome's error, if it has none: what was measured is not lost."""
    try:
        yield
    except WriteError as error:
        outcome.error = outcome.error or error


def _save(sae: SparseAutoencoder, setup: Setup, name: str) -> None:
    cfg = setup.job.runs[name]
    site = cfg.place
    # The module too, unless the name says it all.
    module: dict[str, Any] = {} if site.kind == "resid_post" else {"hf_hook_name": find(setup.lm, site).hf_name}
    if (target := cfg.target_place) is not None:
        module |= {
            "hook_name_out": target.written,
            "hook_layer_out": target.layer,
            "hf_hook_name_out": find(setup.lm, target).hf_name,
        }
    sae.save(
        setup.job.directory / name / layout.AUTOENCODER,
        model_name=cfg.model,
        hook_name=site.written,
        **module,
        hook_layer=cfg.layer,
        context_size=cfg.length + 1,
        prepend_bos=setup.lm.prefix_id is not None,
        dataset_path=cfg.data,
        trained_with=fingerprint(cfg),
        **({} if cfg.init_from is None else {"init_from": cfg.init_from}),
    )


def _evaluate(saes: dict[str, SparseAutoencoder], setup: Setup, outcomes: dict[str, Outcome]) -> None:
    """Measure the autoencoders together; each writes its metrics, or its outcome gets the error."""
    job, shared = setup.job, setup.job.shared
    saes = {name: sae.to(setup.lm.device) for name, sae in saes.items()}
    batches = evaluation_batches(shared, setup.lm, shared.evaluation.sequences)
    with evaluation_progress() as progress:
        results = evaluate_all(saes, setup.lm, batches, **evaluation_options(shared), progress=progress)
    for name, result in results.items():
        try:
            result.check_finite()
        except UserError as error:
            outcomes[name].error = error
        else:
            outcomes[name].evaluation = result
            with _noting_errors(outcomes[name]):
                write_eval(result, job.directory / name)
    for name in saes:
        if outcomes[name].evaluation is not None:
            track_evaluation(job.directory / name, job.runs[name], outcomes[name].steps, results[name].metrics)
