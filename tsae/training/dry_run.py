"""`--dry-run`: estimates memory, disk space and time of a job from a few steps; writes nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from tsae.config import TrainConfig
from tsae.data.cache import ActivationCache
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.sae.normalization import InputNormalizer
from tsae.training.announce import sequence_counts
from tsae.training.assemble import Setup, estimated, make_buffer, make_feed, open_cache, prepare
from tsae.training.job import Job
from tsae.training.memory import cache_bytes, checkpoint_bytes, memory_parts
from tsae.training.trainer import Trainer
from tsae.utils.output import tables
from tsae.utils.torchrun import world_size

_GROUPS = 2  # forward passes that are timed, after one more to warm up
_STEPS = 3


@dataclass
class Estimate:
    """The resources of a job.

    memory: bytes by part, see `tsae.training.memory.memory_parts`
    disk: bytes by part; free: bytes free on the disk of each part
    seconds: by part, without evaluation and report
    measured: for each part of ``seconds``, the seconds measured and their unit
    """

    memory: dict[str, int]
    disk: dict[str, int]
    free: dict[str, int]
    seconds: dict[str, float]
    measured: dict[str, tuple[float, str]]


def dry_run(job: Job) -> Estimate:
    """Load the model, harvest a few sequences, make a few steps of every autoencoder, and extrapolate.

    Raises:
        UserError: as `tsae.training.run.run_job` before training; or there are several processes.
    """
    if world_size() > 1:
        raise UserError("--dry-run estimates for one process; start it without torchrun.")
    setup = prepare(job)
    job, cfg, width = setup.job, setup.job.shared, setup.width
    cache, feed = open_cache(setup, write=False), make_feed(setup)
    buffer = make_buffer(setup, feed)
    first = list(feed(job.forward_batch))
    timed = _GROUPS * job.forward_batch
    sequence = _seconds(lambda: first.extend(feed(timed))) / timed
    sample = ActivationBatch(torch.cat([part.x for part in first]), torch.cat([part.segments for part in first]))
    step = sum(_step(each, sample, setup) for each in job.runs.values())

    cached = 0 if cache is None else min(cache.groups * job.forward_batch, job.sequences_harvested)
    missing = job.sequences_harvested - cached
    measured = {"harvest": (sequence, "per sequence"), "training": (step, "per step")}
    seconds = {"harvest": missing * sequence, "training": cfg.steps * step}
    disk = {"checkpoints": checkpoint_bytes(job.runs, buffer, width, setup.storage_dtype)}
    free = {"checkpoints": _free(job.directory)}
    if cache is not None:
        added = cache_bytes(cfg, width, setup.storage_dtype) * missing // job.sequences_harvested
        disk["cache, to be added"], free["cache, to be added"] = added, _free(cache.directory)
        if cached:
            reading = _reading(cache)
            measured["reading the cache"] = (reading, "per sequence")
            seconds["reading the cache"] = cached * reading
    options = {"autocast": setup.uses_autocast(cfg)}
    memory = memory_parts(job.runs, setup.lm, buffer, setup.storage_dtype, setup.device, **options)
    return Estimate(memory, disk, free, seconds, measured)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _step(cfg: TrainConfig, sample: ActivationBatch, setup: Setup) -> float:
    """Seconds of a step, the median of a few."""
    device = setup.device
    normalizer = estimated(cfg, sample) if cfg.normalize else InputNormalizer.identity(setup.width)
    trainer = Trainer(cfg, normalizer, device, autocast=setup.uses_autocast(cfg))
    picks = torch.arange(cfg.batch) % len(sample.x)
    batch = ActivationBatch(sample.x[picks], sample.segments[picks])

    def step() -> None:
        trainer.train_step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    return median(_seconds(step) for _ in range(_STEPS))


def _reading(cache: ActivationCache) -> float:
    """Seconds per sequence to check the first shard and to read it."""
    first, last = cache.span(0)

    def read() -> None:
        if cache.is_intact(0):
            for number in range(first, last):
                cache.read(number)

    return _seconds(read) / ((last - first) * cache.group)


def _free(directory: Path) -> int:
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free


def print_estimate(estimate: Estimate, job: Job) -> None:
    """The estimate as a table on the terminal."""
    table = Table(title="Dry run: nothing was written", title_justify="left")
    table.add_column("part")
    table.add_column("estimate", justify="right")
    table.add_column("note")
    for name, size in estimate.memory.items():
        table.add_row(f"memory: {name}", _size(size), "")
    total_memory = _size(sum(estimate.memory.values()))
    table.add_row("memory, in all", total_memory, "without the libraries themselves", style="bold")
    for name, size in estimate.disk.items():
        free = estimate.free[name]
        table.add_row(f"disk: {name}", _size(size), f"{_size(free)} free" + (", too little" if free < size else ""))
    for name, value in estimate.seconds.items():
        measured, unit = estimate.measured[name]
        table.add_row(f"time: {name}", _duration(value), f"{1000 * measured:.1f} ms {unit}, measured")
    tokens = job.sequences_trained * job.shared.length
    total = sum(estimate.seconds.values())
    table.add_row("time, in all", _duration(total), f"{tokens:,} tokens; without evaluation and report", style="bold")
    tables().print(table)
    if job.shared.length != TrainConfig.length:
        tables().print(sequence_counts(job.shared), soft_wrap=True)


def _size(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
