"""The main job: text -> language model -> activations -> temporal SAE -> evaluation -> report, in one directory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import torch

from tsae import checkpoint
from tsae.config import LENGTH, TrainConfig, to_dict
from tsae.data.buffer import ActivationBuffer
from tsae.data.harvest import Harvest, Harvester
from tsae.data.sequences import SequenceStream, TokenBatch
from tsae.data.text import Document, Part, absolute_source, open_text, split_threshold
from tsae.errors import UserError
from tsae.evaluate import EvaluationResult, evaluate, evaluation_progress, write_eval
from tsae.files import write_json
from tsae.lm.hooks import check_layer
from tsae.lm.loading import LanguageModel, absolute_name, default_dtype, load_language_model
from tsae.metrics_log import MetricsLog
from tsae.progress import bar, console
from tsae.report import write_report
from tsae.sae.normalization import InputNormalizer
from tsae.trainer import DivergedError, Trainer

__all__ = ["evaluation_batches", "run", "run_directory"]


def run_directory(cfg: TrainConfig, out: Path | None, *, overwrite: bool) -> Path:
    """Where a new run goes: ``out``, or `runs/<preset>/<timestamp>`. Nothing is created here.

    Raises:
        UserError: the directory already has a run and ``overwrite`` is off, or holds something else, or cannot be
            written.
    """
    if out is None:
        # To the microsecond, as two may start in the same second.
        return Path("runs") / cfg.preset / datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")
    _check_writable(out)
    if (out / "config.json").exists() and not overwrite:
        raise UserError(f"{out} already has a run; continue it with --resume {out}, or replace it with --overwrite.")
    foreign = [path for path in out.glob("*") if path.name != ".config.json.tmp"]  # which a killed start leaves
    if foreign and not (out / "config.json").exists():
        raise UserError(f"{out} is not empty and holds no run; name a new directory.")
    return out


def _check_writable(directory: Path) -> None:
    """Raise `UserError` unless files can be made in ``directory``, or where it would be made."""
    try:
        place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"A run cannot be written to {directory} ({error.strerror}); name another directory.") from None


def run(cfg: TrainConfig, directory: Path, *, resume: bool = False) -> EvaluationResult | None:
    """Train, evaluate and report; everything lands in ``directory``.

    cfg: checked here; bad values and unusable models or texts raise `UserError` before anything is written
    directory: from `run_directory`, or an existing run's with ``resume``
    out: the evaluation, or None with ``cfg.evaluation.final`` off
    """
    cfg.check()
    _check_writable(directory)
    device = resolve_device(cfg.device)
    # Absolute, so that the run can be gone on with and evaluated from anywhere.
    cfg = replace(cfg, data=absolute_source(cfg.data), model=absolute_name(cfg.model))
    lm, cfg = _open(cfg, device)
    sae = _trained(cfg, lm, device, directory, resume=resume).finished()
    sae.save(
        directory / "sae",
        model_name=cfg.model,
        hook_name=f"blocks.{cfg.layer}.hook_resid_post",
        hook_layer=cfg.layer,
        context_size=LENGTH + 1,
        prepend_bos=True,
        dataset_path=cfg.data,
    )
    if not cfg.evaluation.final:
        write_report(directory)
        return None
    with evaluation_progress() as progress:
        result = evaluate(
            sae,
            lm,
            evaluation_batches(cfg, lm, cfg.evaluation.sequences),
            layer=cfg.layer,
            ce_sequences=cfg.evaluation.ce_sequences,
            lm_batch=cfg.evaluation.lm_batch,
            harvest_batch=cfg.buffer.harvest_batch,
            seed=cfg.seed,
            progress=progress,
        )
    write_eval(result, directory)
    write_report(directory)
    return result


def _open(cfg: TrainConfig, device: torch.device) -> tuple[LanguageModel, TrainConfig]:
    """The language model, and the configuration with its width and the text's split; what is unusable is found here."""
    next(iter(_text(cfg, "train")(0)))  # unusable text is reported before the model is loaded
    cfg = replace(cfg, text=replace(cfg.text, threshold=split_threshold(cfg.data, cfg.text)))
    lm = load_language_model(cfg.model, device=device, dtype=cfg.lm_dtype, revision=cfg.revision)
    check_layer(lm, cfg.layer)
    cfg = replace(cfg, sae=replace(cfg.sae, d_in=matching_width(cfg, lm)))
    # Likewise text that is too short for the first forward pass of the harvest.
    first = min(cfg.buffer.harvest_batch, cfg.buffer.sequences, -(-cfg.steps * cfg.batch // cfg.buffer.reuse))
    SequenceStream(_text(cfg, "train"), lm.tokenizer, LENGTH).next_batch(first)
    if cfg.evaluation.final:
        evaluation_batches(cfg, lm, 1)
    return lm, cfg


def _text(cfg: TrainConfig, part: Part) -> Callable[[int], Iterator[Document]]:
    """The run's text, one part of it, by epoch."""
    return lambda epoch: open_text(cfg.data, part=part, seed=cfg.seed, config=cfg.text, epoch=epoch)


def _trained(cfg: TrainConfig, lm: LanguageModel, device: torch.device, directory: Path, *, resume: bool) -> Trainer:
    """Train to the last step, from the start or from the newest checkpoint."""
    stream = SequenceStream(_text(cfg, "train"), lm.tokenizer, LENGTH)
    storage = lm.dtype if cfg.buffer.dtype == "auto" else getattr(torch, cfg.buffer.dtype)
    harvester = Harvester(lm, cfg.layer, stream, batch=cfg.buffer.harvest_batch, dtype=storage)
    buffer = ActivationBuffer(
        partial(_harvest_with_bar, harvester),
        cfg.buffer.sequences,
        cfg.buffer.reuse,
        cfg.steps * cfg.batch,
        torch.Generator().manual_seed(cfg.seed + 2),
    )
    autocast = default_dtype(device) == torch.bfloat16 if cfg.autocast == "auto" else cfg.autocast == "bfloat16"
    _announce(cfg, lm, buffer, storage, device, autocast)

    saved = checkpoint.latest(directory / "checkpoint") if resume else None
    if saved is not None:
        state, contents = checkpoint.load(saved)
        buffer.load_state_dict(state["buffer"], contents)
        stream.load_state_dict(state["stream"])
        trainer = Trainer(cfg, InputNormalizer(**state["trainer"]["normalizer"]), device, autocast=autocast)
        trainer.load_state_dict(state["trainer"])
        keep_bytes = state["metrics_bytes"]
        console.print(f"Resuming {directory} after step {trainer.step}.", soft_wrap=True)
    else:
        first = buffer.first(cfg.buffer.estimate_sequences)
        trainer = Trainer(cfg, InputNormalizer.estimate(*first), device, autocast=autocast)
        keep_bytes = 0
    if not resume:
        _start_directory(directory, cfg)  # what can fail has been done: an old run goes only for one that trains

    with MetricsLog(directory / "metrics.jsonl", keep_bytes) as metrics:

        def save_checkpoint() -> None:
            state = {
                "trainer": trainer.state_dict(),
                "buffer": buffer.state_dict(),
                "stream": stream.state_dict(),
                "metrics_bytes": metrics.bytes_written,
            }
            checkpoint.save(
                directory / "checkpoint", trainer.step, state, buffer.contents(), buffer.refills, cfg.checkpoint.keep
            )

        _train(cfg, trainer, buffer, metrics, save_checkpoint, directory)
    return trainer


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


def _announce(
    cfg: TrainConfig,
    lm: LanguageModel,
    buffer: ActivationBuffer,
    storage: torch.dtype,
    device: torch.device,
    autocast: bool,
) -> None:
    size = buffer.memory(LENGTH, lm.d_model, storage) / 2**20
    console.print(
        f"{cfg.preset}: {lm.name} layer {cfg.layer} ({str(lm.dtype).removeprefix('torch.')}) on {device}, "
        f"{cfg.sae.d_sae} {cfg.sae.activation} features{' (bfloat16 autocast)' if autocast else ''}, "
        f"{cfg.steps} steps of {cfg.batch} x {LENGTH} tokens."
    )
    console.print(
        f"Activation buffer: at most {buffer.capacity} sequences, {size:,.0f} MiB "
        f"({str(storage).removeprefix('torch.')}); each is trained on {cfg.buffer.reuse} times."
    )


def _harvest_with_bar(harvester: Harvester, n: int) -> Iterator[Harvest]:
    with bar("Tokenizing", n * LENGTH) as advance:
        tokens = harvester.tokenize(n, advance)
    with bar("Harvest", n * LENGTH) as advance:
        yield from harvester.batches(tokens, advance)


def _start_directory(directory: Path, cfg: TrainConfig) -> None:
    """Make the run directory, empty but for `config.json`.

    An old run keeps its `config.json` until all else of it is gone, so that a directory where this was killed
    still counts as a run's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint", "sae"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("metrics.jsonl", "eval.json", "eval_source.json", "report.png"):
        (directory / name).unlink(missing_ok=True)
    write_json(directory / "config.json", to_dict(cfg))
    if directory.parent == Path("runs") / cfg.preset:
        link = Path("runs") / "latest"
        temporary = link.with_name("latest.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path(cfg.preset) / directory.name)
        os.replace(temporary, link)


def _train(
    cfg: TrainConfig,
    trainer: Trainer,
    buffer: ActivationBuffer,
    metrics: MetricsLog,
    save_checkpoint: Callable[[], None],
    directory: Path,
) -> None:
    if trainer.step >= cfg.steps:
        return
    buffer.first(1)  # the harvest's bar before the training's
    since, tokens_before = time.perf_counter(), trainer.tokens
    with bar("Training", (cfg.steps - trainer.step) * cfg.batch * LENGTH) as advance:
        while trainer.step < cfg.steps:
            number = trainer.step + 1
            logged = number % cfg.log_every == 0 or number in (1, cfg.steps)
            saved = number == cfg.steps or (cfg.checkpoint.every > 0 and number % cfg.checkpoint.every == 0)
            try:
                values = trainer.train_step(buffer.next_batch(cfg.batch), log=logged)
                if saved:
                    trainer.check_finite()
            except DivergedError as error:
                raise _with_checkpoint(error, directory) from None
            advance(cfg.batch * LENGTH)
            if logged:
                now = time.perf_counter()
                values["tokens_per_second"] = (trainer.tokens - tokens_before) / max(now - since, 1e-9)
                since, tokens_before = now, trainer.tokens
                metrics.write(values)
            if saved:
                save_checkpoint()


def _with_checkpoint(error: DivergedError, directory: Path) -> DivergedError:
    good = checkpoint.latest(directory / "checkpoint")
    where = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
    return DivergedError(f"Training stopped at {error}; {where}; try a lower optimizer.lr or a higher clipping.")
