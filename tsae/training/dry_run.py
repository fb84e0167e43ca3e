"""`--dry-run`: what a run would take in memory, on disk and in time; measured on a few steps, and nothing written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from tsae.config import LENGTH, TrainConfig
from tsae.data.cache import ActivationCache
from tsae.data.harvest import ActivationBatch
from tsae.lm.loading import LanguageModel
from tsae.sae.normalization import InputNormalizer
from tsae.training.assemble import (
    demand,
    harvest_group,
    make_buffer,
    make_feed,
    open_cache,
    prepare,
    storage_dtype,
    uses_autocast,
)
from tsae.training.memory import cache_bytes, checkpoint_bytes, memory_parts
from tsae.training.trainer import Trainer

_GROUPS = 2  # forward passes that are timed, after one more to warm up
_STEPS = 3


@dataclass
class Estimate:
    """What a run would take.

    memory: bytes by part, see `tsae.training.memory.memory_parts`
    disk: bytes by part; free: bytes that the disk of each part has left
    seconds: by part, without evaluation and report
    measured: for each of ``seconds``, the seconds that were measured and of what
    """

    memory: dict[str, int]
    disk: dict[str, int]
    free: dict[str, int]
    seconds: dict[str, float]
    measured: dict[str, tuple[float, str]]


def dry_run(cfgs: dict[str, TrainConfig], directory: Path) -> Estimate:
    """Load the model, harvest a few sequences, make a few steps of every autoencoder, and reckon.

    cfgs, directory: as for `tsae.training.run.run_all`

    Raises:
        UserError: what `tsae.training.run.run_all` would stop at before training.
    """
    cfgs, lm, device = prepare(cfgs)
    cfg = next(iter(cfgs.values()))
    group, storage = harvest_group(cfg), storage_dtype(cfg, lm)
    cache = open_cache(cfg, lm, write=False)
    feed = make_feed(cfg, lm)
    buffer = make_buffer(cfg, feed)
    first = list(feed(group))
    sequence = _seconds(lambda: first.extend(feed(_GROUPS * group))) / (_GROUPS * group)
    sample = ActivationBatch(torch.cat([part.x for part in first]), torch.cat([part.segments for part in first]))
    estimated = InputNormalizer.estimate(*sample)
    picks = torch.arange(cfg.batch) % len(sample.x)
    batch = ActivationBatch(sample.x[picks], sample.segments[picks])
    steps = [_step(each, estimated, lm, device, batch) for each in cfgs.values()]

    wanted = -(-demand(cfg) // cfg.buffer.reuse)
    cached = 0 if cache is None else min(cache.groups * group, wanted)
    measured = {"harvest": (sequence, "per sequence"), "training": (sum(steps), "per step")}
    seconds = {"harvest": (wanted - cached) * sequence, "training": cfg.steps * sum(steps)}
    if cache is not None and cached:
        measured["reading the cache"] = (_reading(cache), "per sequence")
        seconds["reading the cache"] = cached * measured["reading the cache"][0]
    disk = {"checkpoints": checkpoint_bytes(cfgs, buffer, lm.d_model, storage)}
    free = {"checkpoints": _free(directory)}
    if cache is not None:
        missing = cache_bytes(cfg, lm.d_model, storage) * (wanted - cached) // wanted
        disk["cache, to be added"], free["cache, to be added"] = missing, _free(cache.directory)
    memory = memory_parts(cfgs, lm, buffer, storage, autocast=uses_autocast(cfg, device))
    return Estimate(memory, disk, free, seconds, measured)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _step(
    cfg: TrainConfig, estimated: InputNormalizer, lm: LanguageModel, device: torch.device, batch: ActivationBatch
) -> float:
    """Seconds of a step, the median of a few."""
    normalizer = estimated if cfg.normalize else InputNormalizer.identity(lm.d_model)
    trainer = Trainer(cfg, normalizer, device, autocast=uses_autocast(cfg, device))

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


def print_estimate(estimate: Estimate, cfg: TrainConfig) -> None:
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
    tokens = cfg.steps * cfg.batch * LENGTH
    total = sum(estimate.seconds.values())
    table.add_row("time, in all", _duration(total), f"{tokens:,} tokens; without evaluation and report", style="bold")
    Console().print(table)


def _size(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
