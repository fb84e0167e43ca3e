"""The main job: text -> language model -> activations -> temporal SAEs -> evaluation -> report.

Any number of autoencoders train on one stream of activations, each in its own directory; a single run is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tsae import checkpoint
from tsae.config import LENGTH, TrainConfig
from tsae.data.ahead import Ahead
from tsae.data.buffer import ActivationBuffer
from tsae.data.cache import ActivationCache
from tsae.data.cache_request import cache_request, made_with
from tsae.data.feed import Feed, no_bar
from tsae.data.harvest import Harvest, Harvester
from tsae.data.sequences import SequenceStream, TokenBatch
from tsae.data.text import Document, Part, absolute_source, open_text, split_threshold
from tsae.directories import check_writable, link_latest, start_run
from tsae.errors import UserError
from tsae.estimate import BUFFER, memory_parts
from tsae.evaluate import EvaluationResult, evaluate_all, evaluation_progress, write_eval
from tsae.files import write_json
from tsae.interrupts import AtSafePoint, Interrupted, deferred
from tsae.lm.hooks import check_layer
from tsae.lm.loading import LanguageModel, absolute_name, default_dtype, load_language_model
from tsae.metrics_log import MetricsLog
from tsae.progress import bar, console
from tsae.report import write_report
from tsae.sae.normalization import InputNormalizer
from tsae.trackers import check_trackers, open_trackers, track_evaluation
from tsae.trainer import DivergedError, Trainer

__all__ = [
    "Outcome",
    "demand",
    "evaluation_batches",
    "harvest_group",
    "make_buffer",
    "make_feed",
    "open_cache",
    "prepare",
    "run",
    "run_all",
    "storage_dtype",
    "uses_autocast",
]

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
    directory: from `tsae.directories.new_directory`, or an existing run's with ``resume``
    out: the evaluation, or None with ``cfg.evaluation.final`` off
    """
    outcome = run_all({"": cfg}, directory, resume=resume)[""]
    if outcome.error is not None:
        raise outcome.error
    return outcome.evaluation


def run_all(
    cfgs: dict[str, TrainConfig], directory: Path, *, resume: bool = False, start: Start | None = None
) -> dict[str, Outcome]:
    """Train, evaluate and report autoencoders on one stream of activations, run NAME in ``directory / NAME``.

    cfgs: by name, agreeing on all that `tsae.sweep.check_agreement` looks at; checked as in `run`
    directory: holds `checkpoint/`, which is common to all
    start: makes the directories once training is about to begin, from the completed ``cfgs`` and ``directory``
    """
    check_trackers(name for cfg in cfgs.values() for name in cfg.log)
    check_writable(directory)
    cfgs, lm, device = prepare(cfgs)
    common = next(iter(cfgs.values()))
    outcomes, trainers = _trained(cfgs, lm, device, directory, resume=resume, start=start or _start_all)
    saes = {name: trainer.finished() for name, trainer in trainers.items()}
    for name, sae in saes.items():
        sae.save(
            directory / name / "sae",
            model_name=common.model,
            hook_name=f"blocks.{common.layer}.hook_resid_post",
            hook_layer=common.layer,
            context_size=LENGTH + 1,
            prepend_bos=True,
            dataset_path=common.data,
        )
    if common.evaluation.final and saes:
        with evaluation_progress() as progress:
            results = evaluate_all(
                saes,
                lm,
                evaluation_batches(common, lm, common.evaluation.sequences),
                layer=common.layer,
                ce_sequences=common.evaluation.ce_sequences,
                lm_batch=common.evaluation.lm_batch,
                harvest_batch=common.buffer.harvest_batch,
                seed=common.stream_seed,
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


def prepare(cfgs: dict[str, TrainConfig]) -> tuple[dict[str, TrainConfig], LanguageModel, torch.device]:
    """What `run_all` begins with: ``cfgs`` checked and completed, the language model, and the device. Writes nothing.

    Raises:
        UserError: a value makes no sense, or the model or the text cannot be used.
    """
    for name, cfg in cfgs.items():
        with _naming(name):
            cfg.check()
    common = next(iter(cfgs.values()))
    device = resolve_device(common.device)
    # Absolute, so that the run can be gone on with and evaluated from anywhere.
    common = replace(
        common,
        data=absolute_source(common.data),
        model=absolute_name(common.model),
        cache=None if common.cache is None else str(Path(common.cache).expanduser().absolute()),
    )
    lm, common = _open(common, device)
    for name, cfg in cfgs.items():
        with _naming(name):
            sae = replace(cfg.sae, d_in=matching_width(cfg, lm))
            cfg = replace(cfg, data=common.data, model=common.model, text=common.text, cache=common.cache, sae=sae)
            cfgs = cfgs | {name: cfg}
    return cfgs, lm, device


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the run's name before the sentence of a `UserError`."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise type(error)(f"Run {name!r}: {error}") from None


def _open(cfg: TrainConfig, device: torch.device) -> tuple[LanguageModel, TrainConfig]:
    """The language model, and ``cfg`` with the text's split; whatever of the model, of the layer and of the text is
    unusable is found here."""
    next(iter(_text(cfg, "train")(0)))  # unusable text is reported before the model is loaded
    cfg = replace(cfg, text=replace(cfg.text, threshold=split_threshold(cfg.data, cfg.text)))
    lm = load_language_model(cfg.model, device=device, dtype=cfg.lm_dtype, revision=cfg.revision)
    check_layer(lm, cfg.layer)
    # Likewise text that is too short for a forward pass of the harvest.
    SequenceStream(_text(cfg, "train"), lm.tokenizer, LENGTH).next_batch(harvest_group(cfg))
    if cfg.evaluation.final:
        evaluation_batches(cfg, lm, 1)
    return lm, cfg


def _text(cfg: TrainConfig, part: Part) -> Callable[[int], Iterator[Document]]:
    """The run's text, one part of it, by epoch."""
    return lambda epoch: open_text(cfg.data, part=part, seed=cfg.stream_seed, config=cfg.text, epoch=epoch)


def demand(cfg: TrainConfig) -> int:
    """Sequences that are drawn in all."""
    return cfg.steps * cfg.batch


def harvest_group(cfg: TrainConfig) -> int:
    """Sequences per forward pass of the harvest."""
    return min(cfg.buffer.harvest_batch, -(-demand(cfg) // cfg.buffer.reuse))


def storage_dtype(cfg: TrainConfig, lm: LanguageModel) -> torch.dtype:
    """Type that activations are kept in."""
    return lm.dtype if cfg.buffer.dtype == "auto" else getattr(torch, cfg.buffer.dtype)


def open_cache(cfg: TrainConfig, lm: LanguageModel, *, write: bool) -> ActivationCache | None:
    """The run's cache, if it has one; with ``write``, locked if it has less than the run will ask for.

    Raises:
        UserError: it does not match the run, or another process writes to it.
    """
    if cfg.cache is None:
        return None
    group = harvest_group(cfg)
    request = cache_request(cfg, lm, storage_dtype(cfg, lm), group)
    cache = ActivationCache(Path(cfg.cache), request, made_with(lm), group=group)
    if write and cache.groups * group * cfg.buffer.reuse < demand(cfg):
        cache.lock()
    return cache


def _start_all(cfgs: dict[str, TrainConfig], directory: Path) -> None:
    for name, cfg in cfgs.items():
        start_run(directory / name, cfg)
    link_latest(directory)


def _trained(
    cfgs: dict[str, TrainConfig],
    lm: LanguageModel,
    device: torch.device,
    directory: Path,
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
        cache = open_cache(cfg, lm, write=True)
        if cache is not None:
            stack.enter_context(cache)
        feed: Feed | Ahead = make_feed(cfg, lm, cache, check)
        wanted = -(-demand(cfg) // cfg.buffer.reuse)
        if sequences := cfg.buffer.looked_ahead(wanted, gpu=lm.device.type == "cuda"):
            bar, feed.bar = feed.bar, no_bar  # one bar at a time, in this thread
            feed = stack.enter_context(Ahead(feed, sequences, wanted, bar, lm.device))
        return _fed(cfgs, lm, device, directory, feed, resume=resume, start=start, check=check)


def make_feed(
    cfg: TrainConfig, lm: LanguageModel, cache: ActivationCache | None = None, check: Callable[[], None] = lambda: None
) -> Feed:
    """The run's activations from their beginning; ``check`` is called between forward passes."""
    stream = SequenceStream(_text(cfg, "train"), lm.tokenizer, LENGTH)
    harvester = Harvester(lm, cfg.layer, stream, batch=harvest_group(cfg), dtype=storage_dtype(cfg, lm))
    return Feed(harvester, cache, partial(_checking_bar, check))


def make_buffer(cfg: TrainConfig, feed: Callable[[int], Iterator[Harvest]]) -> ActivationBuffer:
    """The run's buffer, empty, in front of ``feed``."""
    return ActivationBuffer(
        feed,
        cfg.buffer.sequences,
        cfg.buffer.reuse,
        demand(cfg),
        torch.Generator().manual_seed(cfg.stream_seed + 2),
    )


def _fed(
    cfgs: dict[str, TrainConfig],
    lm: LanguageModel,
    device: torch.device,
    directory: Path,
    feed: Feed | Ahead,
    *,
    resume: bool,
    start: Start,
    check: Callable[[], None],
) -> tuple[dict[str, Outcome], dict[str, Trainer]]:
    """`_trained`, with the activations at their beginning, and ``check``, which raises `AtSafePoint` after a signal."""
    cfg = next(iter(cfgs.values()))
    buffer = make_buffer(cfg, feed)
    _announce(cfgs, lm, buffer, device)

    def trainer(name: str, normalizer: InputNormalizer) -> Trainer:
        with _naming(name):
            return Trainer(cfgs[name], normalizer, device, autocast=uses_autocast(cfgs[name], device))

    outcomes: dict[str, Outcome] = {}
    saved = checkpoint.latest(directory / "checkpoint") if resume else None
    if saved is not None:
        state, contents = checkpoint.load(saved)
        buffer.load_state_dict(state["buffer"], contents)
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
            if empty:
                start(cfgs, directory)  # so that there is something to resume
            raise Interrupted(stop.number, _advice(0, directory if resume or empty else None)) from None
        estimated, raw = InputNormalizer.estimate(*first), InputNormalizer.identity(lm.d_model)
        trainers = {name: trainer(name, estimated if cfgs[name].normalize else raw) for name in cfgs}
        keep_bytes = dict.fromkeys(cfgs, 0)
    if not resume:
        start(cfgs, directory)  # what can fail has been done: an old run goes only for one that trains

    with ExitStack() as files:
        lanes = {}
        for name, each in trainers.items():
            (directory / name / "diverged.json").unlink(missing_ok=True)  # of later steps than the checkpoint's
            trackers = open_trackers(directory / name, cfgs[name], each.step)
            log = files.enter_context(MetricsLog(directory / name / "metrics.jsonl", keep_bytes[name], trackers))
            lanes[name] = _Lane(cfgs[name], directory / name, each, log)

        def save_checkpoint(step: int) -> None:
            state = {
                "trainers": {name: lane.trainer.state_dict() for name, lane in lanes.items()},
                "metrics_bytes": {name: lane.metrics.bytes_written for name, lane in lanes.items()},
                "diverged": {name: (outcome.steps, str(outcome.error)) for name, outcome in outcomes.items()},
                "buffer": buffer.state_dict(),
                "feed": feed.state_dict(),
            }
            checkpoint.save(
                directory / "checkpoint", step, state, buffer.contents(), buffer.refills, cfg.checkpoint.keep
            )

        def stopped(name: str, error: DivergedError) -> None:
            error = _with_checkpoint(error, directory)
            outcomes[name] = Outcome(lanes.pop(name).trainer.step, error=error)
            write_json(directory / name / "diverged.json", {"steps": outcomes[name].steps, "message": str(error)})

        try:
            _train(cfg, lanes, buffer, save_checkpoint, stopped, check)
        except AtSafePoint as stop:
            steps = max((lane.trainer.step for lane in lanes.values()), default=0)
            raise Interrupted(stop.number, _advice(steps, directory)) from None
    for name in lanes:
        outcomes[name] = Outcome(cfg.steps)
    return {name: outcomes[name] for name in cfgs}, {name: lane.trainer for name, lane in lanes.items()}


def uses_autocast(cfg: TrainConfig, device: torch.device) -> bool:
    return default_dtype(device) == torch.bfloat16 if cfg.autocast == "auto" else cfg.autocast == "bfloat16"


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; an unknown or absent device raises `UserError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"There is no device {name!r}; use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"Device {name!r} was asked for, but PyTorch sees no GPU here; use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"Device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs.")
    return device


def matching_width(cfg: TrainConfig, lm: LanguageModel) -> int:
    """The model's width, which a configured ``sae.d_in`` must equal."""
    if cfg.sae.d_in not in (0, lm.d_model):
        raise UserError(f"sae.d_in is {cfg.sae.d_in}, but {lm.name} has width {lm.d_model}; leave sae.d_in out.")
    return lm.d_model


def evaluation_batches(cfg: TrainConfig, lm: LanguageModel, sequences: int) -> list[TokenBatch]:
    """Token batches of at most ``sequences`` sequences of the evaluation part of the run's text.

    Raises:
        UserError: the evaluation text is too short for one sequence.
    """
    stream = SequenceStream(_text(cfg, "evaluation"), lm.tokenizer, LENGTH, repeat=False)
    batches, left = [], sequences
    while left > 0:
        batch = stream.next_batch(min(left, cfg.buffer.harvest_batch))
        if batch.tokens.shape[0] == 0:
            break
        batches.append(batch)
        left -= batch.tokens.shape[0]
    if not batches:
        raise UserError(f"The evaluation part of {cfg.data} is too short for one sequence of {LENGTH} tokens.")
    return batches


def _announce(cfgs: dict[str, TrainConfig], lm: LanguageModel, buffer: ActivationBuffer, device: torch.device) -> None:
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
    console.print(f"Memory, estimated, in MiB: {sizes}; in all {sum(parts.values()) / 2**20:,.0f}.")


@contextmanager
def _checking_bar(check: Callable[[], None], what: str, tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar whose progress calls ``check``."""
    with bar(what, tokens) as advance:

        def advance_and_check(done: int) -> None:
            advance(done)
            check()

        yield advance_and_check


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

    def step(self, batch: Harvest, *, saved: bool) -> None:
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
    good = checkpoint.latest(directory / "checkpoint")
    where = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
    return DivergedError(f"Training stopped at {error}; {where}; try a lower optimizer.lr or a higher clipping.")
