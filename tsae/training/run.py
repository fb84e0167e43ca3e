"""The main job: text -> language model -> activations -> temporal SAEs -> evaluation -> report.

Any number of autoencoders train on one stream of activations, each in its own directory; a single run is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tsae.config import LENGTH, TrainConfig
from tsae.data.buffer import ActivationBuffer
from tsae.data.feed import ActivationFeed, no_progress
from tsae.data.harvest import ActivationBatch
from tsae.data.prefetching import PrefetchingFeed
from tsae.errors import UserError
from tsae.evaluation.evaluator import (
    EvaluationResult,
    evaluate_all,
    evaluation_options,
    evaluation_progress,
    write_eval,
)
from tsae.lm.loading import LanguageModel
from tsae.parallel.axis import Ranks
from tsae.parallel.environment import is_rank0
from tsae.parallel.processes import broadcast_from_rank0, check_on_all_ranks, raise_on_all_ranks, ranks_for
from tsae.reports.figure import write_report
from tsae.rundir import layout
from tsae.rundir.directory import check_resumable, check_writable, link_latest, start_run
from tsae.rundir.fingerprint import fingerprint
from tsae.rundir.metrics_log import MetricsLog, NoLog
from tsae.rundir.trackers import check_trackers, open_trackers, track_evaluation
from tsae.sae.normalization import InputNormalizer
from tsae.training import checkpoint
from tsae.training.assemble import (
    demand,
    evaluation_batches,
    make_buffer,
    make_feed,
    open_cache,
    prefix_errors,
    prepare,
    storage_dtype,
    uses_autocast,
)
from tsae.training.memory import BUFFER, check_memory, memory_parts
from tsae.training.trainer import DivergedError, Trainer
from tsae.utils.atomic import write_json
from tsae.utils.config_json import to_dict
from tsae.utils.interrupts import AtSafePoint, Interrupted, deferred
from tsae.utils.progress import bar, console

Start = Callable[[dict[str, TrainConfig], Path], None]


@dataclass
class Outcome:
    """How one autoencoder ended."""

    steps: int
    """Optimizer steps completed."""
    evaluation: EvaluationResult | None = None
    """None where ``evaluation.final`` is off, and beside an error."""
    error: UserError | None = None
    """Why it stopped alone: training diverged, or the evaluation is not finite."""


def run(cfg: TrainConfig, directory: Path, *, resume: bool = False) -> EvaluationResult | None:
    """Train, evaluate and report one autoencoder; everything lands in ``directory``.

    cfg: checked here; bad values and unusable models or texts raise `UserError` before anything is written
    Within `tsae.parallel.processes.processes` all processes train, and the first writes, evaluates and raises.
    directory: from `tsae.rundir.directory.new_directory`, or an existing run's with ``resume``
    out: the evaluation, or None with ``cfg.evaluation.final`` off
    """
    outcome = run_all({"": cfg}, directory, resume=resume)[""]
    if outcome.error is not None and is_rank0():
        raise outcome.error
    return outcome.evaluation


def run_all(
    cfgs: dict[str, TrainConfig], directory: Path, *, resume: bool = False, start: Start | None = None
) -> dict[str, Outcome]:
    """Train, evaluate and report autoencoders on one stream of activations, run NAME in ``directory / NAME``.

    cfgs: by name, agreeing on all that `tsae.training.sweep.check_agreement` looks at; checked as in `run`
    directory: holds `checkpoint/`, which is common to all
    start: makes the directories once training is about to begin, from the completed ``cfgs`` and ``directory``
    """
    check_trackers(name for cfg in cfgs.values() for name in cfg.log)
    broadcast_from_rank0(lambda: check_writable(directory))
    try:
        cfgs, lm, device = raise_on_all_ranks(lambda: prepare(cfgs))
    except Interrupted as stop:  # a new run has no directory yet that --resume could be given
        raise Interrupted(stop.number, stop.advice if resume else " before anything began; start again") from None
    common = next(iter(cfgs.values()))
    ranks = ranks_for(common)
    outcomes, trainers = _trained(cfgs, lm, device, directory, ranks, resume=resume, start=start or _start_all)
    saes = {name: trainer.finished() for name, trainer in trainers.items()}
    if not ranks.first:
        return outcomes
    for name, sae in saes.items():
        sae.save(
            directory / name / layout.AUTOENCODER,
            model_name=common.model,
            hook_name=f"blocks.{common.layer}.hook_resid_post",
            hook_layer=common.layer,
            context_size=LENGTH + 1,
            prepend_bos=True,
            dataset_path=common.data,
            trained_with=fingerprint(cfgs[name]),
        )
    if common.evaluation.final and saes:
        saes = {name: sae.to(device) for name, sae in saes.items()}
        with evaluation_progress() as progress:
            results = evaluate_all(
                saes,
                lm,
                evaluation_batches(common, lm, common.evaluation.sequences),
                **evaluation_options(common),
                progress=progress,
            )
        for name, result in results.items():
            try:
                result.check_finite()
            except UserError as error:
                outcomes[name].error = error
            else:
                outcomes[name].evaluation = result
                write_eval(result, directory / name)
                track_evaluation(directory / name, cfgs[name], outcomes[name].steps, result.metrics)
    for name in cfgs:
        write_report(directory / name)
    return outcomes


def _start_all(cfgs: dict[str, TrainConfig], directory: Path) -> None:
    for name, cfg in cfgs.items():
        start_run(directory / name, cfg)
    link_latest(directory)


def _trained(
    cfgs: dict[str, TrainConfig],
    lm: LanguageModel,
    device: torch.device,
    directory: Path,
    ranks: Ranks,
    *,
    resume: bool,
    start: Start,
) -> tuple[dict[str, Outcome], dict[str, Trainer]]:
    """Train to the last step, from the start or from the newest checkpoint.

    SIGINT and SIGTERM stop it after the step, or the forward pass of the language model, in hand.

    out: every run's outcome so far, and the trainers of those that did not diverge

    Raises:
        Interrupted: on such a signal; the steps made are in a checkpoint.
    """
    with ExitStack() as stack:
        check = stack.enter_context(deferred())
        cfg = next(iter(cfgs.values()))  # of what they have in common
        cache = raise_on_all_ranks(lambda: open_cache(cfg, lm, write=True, ranks=ranks))
        if cache is not None:
            stack.enter_context(cache)
        feed: ActivationFeed | PrefetchingFeed = raise_on_all_ranks(lambda: make_feed(cfg, lm, cache, check, ranks))
        wanted = -(-demand(cfg) // cfg.buffer.reuse)
        sequences = cfg.buffer.prefetched(wanted, gpu=lm.device.type == "cuda")
        if sequences and ranks.world.size == 1:
            bar, feed.bar = feed.bar, no_progress  # one bar at a time, in this thread
            feed = stack.enter_context(PrefetchingFeed(feed, sequences, wanted, bar, lm.device))
        return _fed(cfgs, lm, device, directory, feed, ranks, resume=resume, start=start, check=check)


def _fed(
    cfgs: dict[str, TrainConfig],
    lm: LanguageModel,
    device: torch.device,
    directory: Path,
    feed: ActivationFeed | PrefetchingFeed,
    ranks: Ranks,
    *,
    resume: bool,
    start: Start,
    check: Callable[[], None],
) -> tuple[dict[str, Outcome], dict[str, Trainer]]:
    """`_trained`, with the activations at their beginning, and ``check``, which raises `AtSafePoint` after a signal."""
    cfg = next(iter(cfgs.values()))
    buffer = make_buffer(cfg, feed, ranks)
    check = check_on_all_ranks(check, ranks)
    _announce(cfgs, lm, buffer, device, ranks)

    def trainer(name: str, normalizer: InputNormalizer) -> Trainer:
        with prefix_errors(name):
            return Trainer(cfgs[name], normalizer, device, autocast=uses_autocast(cfgs[name], device), ranks=ranks)

    outcomes: dict[str, Outcome] = {}
    saved = _saved(directory / layout.CHECKPOINTS, ranks) if resume else None
    if saved is not None:
        state = saved.state
        raise_on_all_ranks(lambda: check_resumable(cfgs, state["configs"], directory))
        for sentence in saved.damaged:
            console.print(sentence, soft_wrap=True)
        buffer.load_state_dict(state["buffer"], saved.buffer)
        feed.load_state_dict(state["feed"])
        trainers = {}
        for name, values in state["trainers"].items():
            trainers[name] = trainer(name, InputNormalizer(**values["normalizer"]))
            trainers[name].load_state_dict(values)
        keep_bytes = state["metrics_bytes"]
        for name, (steps, message) in state["diverged"].items():
            outcomes[name] = Outcome(steps, error=DivergedError(message))
        console.print(f"Resuming {directory} after step {state['step']}.", soft_wrap=True)
    else:
        try:
            first = buffer.first(cfg.buffer.estimate_sequences)
        except AtSafePoint as stop:
            empty = not directory.exists() or not any(directory.iterdir())
            if empty and ranks.first:
                start(cfgs, directory)  # so that there is something to resume
            raise Interrupted(stop.number, _advice(0, directory if resume or empty else None)) from None
        estimated, raw = (
            broadcast_from_rank0(lambda: InputNormalizer.estimate(*first)),
            InputNormalizer.identity(lm.d_model),
        )
        trainers = {name: trainer(name, estimated if cfgs[name].normalize else raw) for name in cfgs}
        keep_bytes = dict.fromkeys(cfgs, 0)
    if not resume and ranks.first:
        start(cfgs, directory)  # what can fail has been done: an old run goes only for one that trains

    with ExitStack() as files:
        lanes = {}
        for name, each in trainers.items():
            log = files.enter_context(_open_log(cfgs[name], directory / name, each, keep_bytes[name], ranks))
            lanes[name] = _Lane(cfgs[name], directory / name, each, log)

        def save_checkpoint(step: int) -> None:
            there = ranks.world.size > 1 and broadcast_from_rank0(
                lambda: checkpoint.has_buffer(directory / layout.CHECKPOINTS, buffer.refills)
            )
            contents = None if there else buffer.contents()
            # The others have the same, or a part that goes to the first.
            trained = {name: lane.trainer.state_dict() for name, lane in lanes.items() if ranks.data.rank == 0}
            if not ranks.first:
                return
            state = {
                "configs": {name: to_dict(cfg) for name, cfg in cfgs.items()},
                "trainers": trained,
                "metrics_bytes": {name: lane.metrics.bytes_written for name, lane in lanes.items()},
                "diverged": {name: (outcome.steps, str(outcome.error)) for name, outcome in outcomes.items()},
                "buffer": buffer.state_dict(),
                "feed": feed.state_dict(),
            }
            checkpoint.save(directory / layout.CHECKPOINTS, step, state, contents, buffer.refills, cfg.checkpoint.keep)

        def stopped(name: str, error: DivergedError) -> None:
            error = _with_checkpoint(error, directory)
            outcomes[name] = Outcome(lanes.pop(name).trainer.step, error=error)
            if ranks.first:
                write_json(directory / name / layout.DIVERGED, {"steps": outcomes[name].steps, "message": str(error)})

        try:
            _train(cfg, lanes, buffer, save_checkpoint, stopped, check)
        except AtSafePoint as stop:
            steps = max((lane.trainer.step for lane in lanes.values()), default=0)
            raise Interrupted(stop.number, _advice(steps, directory)) from None
    for name in lanes:
        outcomes[name] = Outcome(cfg.steps)
    return {name: outcomes[name] for name in cfgs}, {name: lane.trainer for name, lane in lanes.items()}


def _saved(directory: Path, ranks: Ranks) -> checkpoint.Resumed | None:
    """What to go on from; the first process finds it, and all read it."""
    if ranks.world.size == 1:
        return checkpoint.load_latest(directory)
    here: list[checkpoint.Resumed | None] = []

    def find() -> tuple[Path, list[str]] | None:
        here.append(checkpoint.load_latest(directory))
        return None if here[0] is None else (here[0].path, here[0].damaged)

    found = broadcast_from_rank0(find)
    if found is None:
        return None
    path, damaged = found
    return raise_on_all_ranks(lambda: here[0] if here else checkpoint.Resumed(path, *checkpoint.load(path), damaged))


def _open_log(cfg: TrainConfig, directory: Path, trainer: Trainer, keep_bytes: int, ranks: Ranks) -> MetricsLog:
    if not ranks.first:
        return NoLog()
    (directory / layout.DIVERGED).unlink(missing_ok=True)  # of later steps than the checkpoint's
    return MetricsLog(directory / layout.METRICS, keep_bytes, open_trackers(directory, cfg, trainer.step))


def _announce(
    cfgs: dict[str, TrainConfig], lm: LanguageModel, buffer: ActivationBuffer, device: torch.device, ranks: Ranks
) -> None:
    cfg = next(iter(cfgs.values()))
    storage = storage_dtype(cfg, lm)
    parts = memory_parts(cfgs, lm, buffer, storage, autocast=uses_autocast(cfg, device))
    if len(cfgs) == 1:
        what = f"{cfg.sae.d_sae} {cfg.sae.activation} features"
        what += " (bfloat16 autocast)" if uses_autocast(cfg, device) else ""
    else:
        what = f"{len(cfgs)} autoencoders"
    console.print(
        f"{cfg.preset}: {lm.name} layer {cfg.layer} ({str(lm.dtype).removeprefix('torch.')}) on {device}, "
        f"{what}, {cfg.steps} steps of {cfg.batch} x {LENGTH} tokens."
    )
    console.print(
        f"Activation buffer: at most {buffer.capacity} sequences, {parts[BUFFER] / 2**20:,.0f} MiB "
        f"({str(storage).removeprefix('torch.')}); each is trained on {cfg.buffer.reuse} times."
    )
    sizes = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    where = "" if ranks.world.size == 1 else ", were it one process"
    console.print(f"Memory, estimated{where}, in MiB: {sizes}; in all {sum(parts.values()) / 2**20:,.0f}.")
    if ranks.world.size > 1:
        console.print(
            f"{ranks.world.size} processes: {ranks.data.size} shares of the batch, the dictionary in "
            f"{ranks.features.size}."
        )
    else:
        check_memory(parts, device)


def _advice(steps: int, directory: Path | None) -> str:
    """What a user is told after an interruption; no directory: a run that was to replace another has none yet."""
    when = f" after step {steps}, which is saved" if steps else " before the first step"
    if directory is None:
        return f"{when}; the run that is there was left as it was, so start again as before"
    return f"{when}; continue with python -m tsae.train --resume {directory}"


class _Lane:
    """One autoencoder on its way through the common stream."""

    def __init__(self, cfg: TrainConfig, directory: Path, trainer: Trainer, metrics: MetricsLog) -> None:
        self.cfg, self.directory, self.trainer, self.metrics = cfg, directory, trainer, metrics
        self.since, self.tokens_before = time.perf_counter(), trainer.tokens

    def step(self, batch: ActivationBatch, *, saved: bool) -> None:
        """One step, logged where it is due; ``saved``: a checkpoint follows."""
        number = self.trainer.step + 1
        logged = number % self.cfg.log_every == 0 or number in (1, self.cfg.steps)
        values: dict[str, Any] = self.trainer.train_step(batch, log=logged)
        if saved:
            self.trainer.check_finite()
        if logged:
            now = time.perf_counter()
            values["tokens_per_second"] = (self.trainer.tokens - self.tokens_before) / max(now - self.since, 1e-9)
            self.since, self.tokens_before = now, self.trainer.tokens
            self.metrics.write(values)


def _train(
    cfg: TrainConfig,
    lanes: dict[str, _Lane],
    buffer: ActivationBuffer,
    save_checkpoint: Callable[[int], None],
    stopped: Callable[[str, DivergedError], None],
    check: Callable[[], None],
) -> None:
    """Take all lanes to the last step; ``stopped`` takes out one that diverged.

    Where ``check`` raises `AtSafePoint`, in a refill of the buffer or between two steps, the steps made are saved.
    """
    done = next((lane.trainer.step for lane in lanes.values()), cfg.steps)
    if done >= cfg.steps:
        return
    saved_at = done
    try:
        buffer.first(1)  # the harvest's bar before the training's
        before, start, buffer.waited = buffer.waited, time.perf_counter(), 0.0
        for lane in lanes.values():
            lane.since = time.perf_counter()
        with bar("Training", (cfg.steps - done) * cfg.batch * LENGTH * len(lanes)) as advance:
            for number in range(done + 1, cfg.steps + 1):
                saved = number == cfg.steps or (cfg.checkpoint.every > 0 and number % cfg.checkpoint.every == 0)
                batch = buffer.next_batch(cfg.batch)
                for name, lane in list(lanes.items()):
                    try:
                        lane.step(batch, saved=saved)
                    except DivergedError as error:
                        stopped(name, error)
                    else:
                        advance(cfg.batch * LENGTH)
                if not lanes:
                    break
                done = number
                if saved:
                    save_checkpoint(number)
                    saved_at = number
                check()
        _print_waiting(before, buffer.waited, time.perf_counter() - start)
    except AtSafePoint:
        for name, lane in list(lanes.items()):
            try:
                lane.trainer.check_finite()
            except DivergedError as error:
                stopped(name, error)
        if lanes and done > saved_at:
            save_checkpoint(done)
        raise


def _print_waiting(before: float, waited: float, seconds: float) -> None:
    console.print(
        f"Waited for activations: {before:.1f} s before the first step, {waited:.1f} s of the training's "
        f"{seconds:.1f} s ({waited / max(seconds, 1e-9):.0%})."
    )


def _with_checkpoint(error: DivergedError, directory: Path) -> DivergedError:
    good = checkpoint.latest(directory / layout.CHECKPOINTS)
    where = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
    return DivergedError(f"Training stopped at {error}; {where}; try a lower optimizer.lr or a higher clipping.")
