"""The training loop: all runs of a job in step on one stream of activations, with checkpoints and interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsae.config import TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.evaluation.evaluator import EvaluationResult
from tsae.parallel.axis import Ranks
from tsae.parallel.buffer import BatchShard
from tsae.parallel.processes import broadcast_from_rank0, check_on_all_ranks, raise_on_all_ranks
from tsae.rundir import layout
from tsae.rundir.directory import check_resumable, is_new, start_runs
from tsae.rundir.metrics_log import MetricsLog, NoLog
from tsae.rundir.trackers import open_trackers
from tsae.sae.normalization import InputNormalizer
from tsae.training import checkpoint
from tsae.training.announce import announce, print_waiting, report_massive
from tsae.training.assemble import Setup, Stream, estimated, open_stream
from tsae.training.init_from import differences, open_checked, warm_start
from tsae.training.job import prefix_errors
from tsae.training.trainer import DivergedError, Trainer
from tsae.utils.atomic import write_json
from tsae.utils.calling import resume_call
from tsae.utils.config_json import to_dict
from tsae.utils.interrupts import AtSafePoint, Interrupted, deferred
from tsae.utils.output import say
from tsae.utils.progress import bar


@dataclass
class Outcome:
    """How the training of one autoencoder ended."""

    steps: int
    """Optimizer steps completed."""
    evaluation: EvaluationResult | None = None
    """None with ``evaluation.final`` off, and if training diverged or the evaluation is not finite."""
    error: UserError | None = None
    """Training diverged, the evaluation is not finite, or it could not be written."""


class ActiveRun:
    """An autoencoder in training and its log."""

    def __init__(self, cfg: TrainConfig, trainer: Trainer, log: MetricsLog) -> None:
        self.cfg, self.trainer, self.log = cfg, trainer, log
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count tokens per second from here."""
        self._since, self._tokens_before = time.perf_counter(), self.trainer.tokens

    def step(self, batch: ActivationBatch | BatchShard, *, saved: bool) -> None:
        """One step, logged every ``log_every`` steps; ``saved``: a checkpoint follows."""
        number = self.trainer.step + 1
        logged = number % self.cfg.log_every == 0 or number in (1, self.cfg.steps)
        values: dict[str, Any] = self.trainer.train_step(batch, log=logged)
        if saved:
            self.trainer.check_finite()
        if logged:
            seconds = max(time.perf_counter() - self._since, 1e-9)
            values["tokens_per_second"] = (self.trainer.tokens - self._tokens_before) / seconds
            self.restart_clock()
            self.log.write(values)


def train(setup: Setup, *, resume: bool) -> tuple[dict[str, Outcome], dict[str, Trainer]]:
    """Train all runs to their last step, from the start or from the newest checkpoint.

    After SIGINT or SIGTERM the step, or the forward pass of the language model, is completed and a checkpoint written.

    out: the outcome of every run so far, and the trainers of those that did not diverge

    Raises:
        Interrupted: after such a signal.
    """
    with deferred() as check, open_stream(setup, check) as stream:
        announce(setup, stream.buffer)
        loop = TrainingLoop(setup, stream, check_on_all_ranks(check, setup.ranks))
        found = find_checkpoint(loop.checkpoints, setup.ranks) if resume else None
        if found is not None:
            loop.restore(found)
        else:
            loop.initialize(resume=resume)
        loop.run()
    outcomes = {name: loop.outcomes.get(name, Outcome(setup.job.shared.steps)) for name in setup.job.runs}
    return outcomes, loop.trainers


class TrainingLoop:
    """The state of a job in training. `initialize` or `restore`, then `run`.

    Args:
        setup: the job and its language model.
        stream: its activations.
        check: raises `AtSafePoint` after a signal.
    """

    def __init__(self, setup: Setup, stream: Stream, check: Callable[[], None]) -> None:
        self.setup, self.job, self.ranks = setup, setup.job, setup.ranks
        self.stream, self.check = stream, check
        self.checkpoints = setup.job.directory / layout.CHECKPOINTS
        self.trainers: dict[str, Trainer] = {}
        """The runs that have not diverged."""
        self.active: dict[str, ActiveRun] = {}
        """The runs in training, with their open logs; filled by `run`."""
        self.outcomes: dict[str, Outcome] = {}
        """The runs that have diverged."""
        self.log_bytes: dict[str, int] = dict.fromkeys(setup.job.runs, 0)
        self.step = self.saved_step = 0

    def initialize(self, *, resume: bool) -> None:
        """New trainers, with the input normalization estimated on the first sequences; makes the run directories.

        resume: the directories exist
        """
        directory = self.job.directory
        try:
            first = self.stream.buffer.first(self.job.shared.buffer.estimate_sequences)
        except AtSafePoint as stop:
            empty = is_new(directory)
            if empty and self.ranks.is_rank0:
                start_runs(self.job.runs, directory)  # so that there is something to resume
            raise Interrupted(stop.number, _advice(0, directory if resume or empty else None)) from None
        limit = broadcast_from_rank0(lambda: report_massive(self.job.shared, first))
        if self.job.shared.buffer.max_norm_ratio:
            self.stream.buffer.exclude_above(limit)
            first = self.stream.buffer.first(self.job.shared.buffer.estimate_sequences)
        first_config = next(iter(self.job.runs.values()))
        normalizer = broadcast_from_rank0(lambda: estimated(first_config, first))
        identity = InputNormalizer.identity(self.setup.width)
        for name, cfg in self.job.runs.items():
            self.trainers[name] = self._first_trainer(name, normalizer if cfg.normalize else identity)
        if not resume and self.ranks.is_rank0:
            start_runs(self.job.runs, directory)  # last: an old run is removed only for one that can train

    def restore(self, found: checkpoint.Resumed) -> None:
        """Trainers, buffer and feed as they were when the checkpoint was written."""
        state = found.state
        raise_on_all_ranks(lambda: check_resumable(self.job.runs, state["configs"], self.job.directory))
        for sentence in found.damaged:
            say(sentence)
        self.stream.buffer.load_state_dict(state["buffer"], found.buffer)
        self.stream.feed.load_state_dict(state["feed"])
        for name, values in state["trainers"].items():
            self.trainers[name] = self._new_trainer(name, InputNormalizer(**values["normalizer"]))
            self.trainers[name].load_state_dict(values)
        self.log_bytes = state["metrics_bytes"]
        for name, (steps, message) in state["diverged"].items():
            self.outcomes[name] = Outcome(steps, error=DivergedError(message))
        self.step = self.saved_step = state["step"]
        say(f"Resuming {self.job.directory} after step {self.step}.")

    def _first_trainer(self, name: str, normalizer: InputNormalizer) -> Trainer:
        """A trainer at step 0, with the weights that ``init_from`` names."""
        cfg = self.job.runs[name]
        if cfg.init_from is None:
            return self._new_trainer(name, normalizer)
        with prefix_errors(name):
            source = self.setup.sources.get(name) or raise_on_all_ranks(lambda: open_checked(cfg))
        start = warm_start(cfg, source, normalizer)
        trainer = self._new_trainer(name, start.normalizer)
        trainer.start_from(start)
        changed = "; ".join(differences(cfg, source))
        what = f"so its features at step 0 are others: {changed}" if changed else "with its features at step 0"
        if self.ranks.is_rank0:
            say(f"{f'Run {name!r}: ' if name else ''}Starts from {cfg.init_from}, {what}.")
        return trainer

    def _new_trainer(self, name: str, normalizer: InputNormalizer) -> Trainer:
        cfg, autocast = self.job.runs[name], self.setup.uses_autocast(self.job.runs[name])
        with prefix_errors(name):
            return Trainer(cfg, normalizer, self.setup.device, autocast=autocast, ranks=self.ranks)

    def run(self) -> None:
        """Make the remaining steps."""
        with ExitStack() as logs:
            for name, trainer in self.trainers.items():
                log = logs.enter_context(self._open_log(name, trainer))
                self.active[name] = ActiveRun(self.job.runs[name], trainer, log)
            try:
                if self.active and self.step < self.job.shared.steps:
                    self._make_steps()
            except AtSafePoint as stop:
                self._save_interrupted()
                steps = self.step if self.active else 0
                raise Interrupted(stop.number, _advice(steps, self.job.directory)) from None

    def _open_log(self, name: str, trainer: Trainer) -> MetricsLog:
        if not self.ranks.is_rank0:
            return NoLog()
        directory, cfg = self.job.directory / name, self.job.runs[name]
        (directory / layout.DIVERGED).unlink(missing_ok=True)  # of steps after the checkpoint
        return MetricsLog(directory / layout.METRICS, self.log_bytes[name], open_trackers(directory, cfg, trainer.step))

    def _make_steps(self) -> None:
        shared, buffer = self.job.shared, self.stream.buffer
        buffer.first(1)  # harvest before the bar of the training
        waited_before, start, buffer.waited = buffer.waited, time.perf_counter(), 0.0
        for run in self.active.values():
            run.restart_clock()
        tokens = (shared.steps - self.step) * shared.batch * shared.length * len(self.active)
        with bar("Training", tokens) as advance:
            for number in range(self.step + 1, shared.steps + 1):
                every = shared.checkpoint.every
                saved = number == shared.steps or (every > 0 and number % every == 0)
                batch = buffer.next_batch(shared.batch)
                for name in list(self.active):
                    try:
                        self.active[name].step(batch, saved=saved)
                    except DivergedError as error:
                        self._drop(name, error)
                    else:
                        advance(shared.batch * shared.length)
                if not self.active:
                    break
                self.step = number
                if saved:
                    self._save()
                self.check()
        print_waiting(waited_before, buffer.waited, time.perf_counter() - start)

    def _drop(self, name: str, error: DivergedError) -> None:
        """Take a run that diverged out of the loop; the others continue."""
        good = checkpoint.latest(self.checkpoints)
        where = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
        message = f"Training stopped at {error}; {where}; try a lower optimizer.lr or a higher clipping."
        steps = self.active.pop(name).trainer.step
        del self.trainers[name]
        self.outcomes[name] = Outcome(steps, error=DivergedError(message))
        if self.ranks.is_rank0:
            write_json(self.job.directory / name / layout.DIVERGED, {"steps": steps, "message": message})

    def _save_interrupted(self) -> None:
        """A checkpoint of the steps made, if the last one is older."""
        for name, trainer in list(self.trainers.items()):
            try:
                trainer.check_finite()
            except DivergedError as error:
                self._drop(name, error)
        if self.active and self.step > self.saved_step:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint of the step, in the format `checkpoint.FORMAT`."""
        buffer = self.stream.buffer
        known = self.ranks.world.size > 1 and broadcast_from_rank0(
            lambda: checkpoint.has_buffer(self.checkpoints, buffer.refills)
        )
        contents = None if known else buffer.contents()
        # Other data ranks have the same state; the feature ranks of the first data rank send theirs to rank 0.
        first = self.ranks.data.rank == 0
        trainers = {name: trainer.state_dict() for name, trainer in self.trainers.items() if first}
        self.saved_step = self.step
        if not self.ranks.is_rank0:
            return
        state = {
            "configs": {name: to_dict(cfg) for name, cfg in self.job.runs.items()},
            "trainers": trainers,
            "metrics_bytes": {name: run.log.bytes_written for name, run in self.active.items()},
            "diverged": {name: (outcome.steps, str(outcome.error)) for name, outcome in self.outcomes.items()},
            "buffer": buffer.state_dict(),
            "feed": self.stream.feed.state_dict(),
        }
        keep = self.job.shared.checkpoint.keep
        checkpoint.save(self.checkpoints, self.step, state, contents, buffer.refills, keep)


def find_checkpoint(directory: Path, ranks: Ranks) -> checkpoint.Resumed | None:
    """The newest checkpoint that is intact, as found by rank 0 and read by all ranks; None if there is none."""
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


def _advice(steps: int, directory: Path | None) -> str:
    """What the user is told after an interruption; ``directory`` is None if the run it would replace is still there."""
    when = f" after step {steps}, which is saved" if steps else " before the first step"
    if directory is None:
        return f"{when}; the run in the directory was left as it was, so start again as before"
    return f"{when}; continue with {resume_call(directory)}"
