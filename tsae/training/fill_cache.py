"""`--harvest-only`: fill the activation cache of a run or sweep without training."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tsae.data.cache import SHARD_BYTES, ActivationCache, sequence_bytes
from tsae.data.feed import ActivationFeed, ProgressBar, no_progress
from tsae.errors import UserError
from tsae.training.assemble import Setup, make_feed, open_cache, prepare
from tsae.training.job import Job
from tsae.utils.interrupts import AtSafePoint, Interrupted, deferred
from tsae.utils.output import console, say
from tsae.utils.progress import bar
from tsae.utils.torchrun import world_size

_TIMED = 2  # forward passes that are timed for the estimate, after one more to warm up
_SAY_EVERY = 60.0  # seconds between lines of progress without a terminal


@dataclass(frozen=True)
class Filled:
    """A cache that holds what a job reads.

    tokens: that the job reads
    harvested: tokens added now
    """

    directory: Path
    tokens: int
    harvested: int


def print_filled(filled: Filled) -> None:
    """Where the cache is and what it holds."""
    said = f", {filled.harvested:,} of them harvested now" if filled.harvested else ", all of them there before"
    say(f"Written: {filled.directory}, the {filled.tokens:,} tokens of the run{said}.")


def fill_cache(job: Job) -> Filled:
    """Harvest what is missing in the job's cache. What it has is verified, and harvested again where it is damaged.

    Shards that are complete stay valid wherever it is stopped; a later call goes on from there.

    Raises:
        UserError: there is no cache or too little disk space; otherwise as `tsae.training.run.run_job` before training.
        Interrupted: after SIGINT or SIGTERM, with every complete forward pass in the cache.
    """
    if world_size() > 1:
        raise UserError("--harvest-only fills a cache in one process; start it without torchrun.")
    if job.shared.cache is None:
        raise UserError("--harvest-only fills a cache; name its directory with --cache.")
    setup = prepare(job)
    job = setup.job
    with deferred() as check:
        cache = open_cache(setup, write=True)
        assert cache is not None
        with cache:
            missing = max(0, _whole_groups(job) - cache.groups * cache.group)
            if missing:
                _announce(setup, cache, missing)
            try:
                _fill(setup, cache, check)
            except AtSafePoint as stop:
                kept = f" with {cache.groups * cache.group:,} sequences in {cache.directory}"
                raise Interrupted(stop.number, f"{kept}; the same command goes on") from None
    return Filled(cache.directory, job.sequences_harvested * job.shared.length, missing * job.shared.length)


def _whole_groups(job: Job) -> int:
    """Sequences that the job reads, in whole forward passes."""
    return -(-job.sequences_harvested // job.forward_batch) * job.forward_batch


def _announce(setup: Setup, cache: ActivationCache, missing: int) -> None:
    """Say how large the cache becomes and how long that takes, from a few forward passes.

    Raises UserError if the disk has too little room.
    """
    job = setup.job
    feed, group, length = make_feed(setup), job.forward_batch, job.shared.length
    feed.bar = no_progress
    list(feed(group))
    start = time.perf_counter()
    list(feed(_TIMED * group))
    rate = _TIMED * group * length / (time.perf_counter() - start)
    added = missing * sequence_bytes(length, setup.width, setup.storage_dtype)
    free = shutil.disk_usage(cache.directory).free
    if free < added:
        raise UserError(
            f"The cache {cache.directory} would grow by {added / 2**30:.2f} GiB, and its disk has {free / 2**30:.2f} "
            "GiB free; make room, or take fewer --steps."
        )
    have = cache.groups * cache.group * length
    tokens = missing * length
    say(
        f"Harvesting {tokens:,} tokens into {cache.directory}, which has {have:,}: {added / 2**30:.2f} GiB of "
        f"{free / 2**30:.2f} GiB free, about {_duration(tokens / rate)} at {rate:,.0f} tokens/s (measured on "
        f"{_TIMED * group * length:,})."
    )


def _fill(setup: Setup, cache: ActivationCache, check: Callable[[], None]) -> None:
    """Pass over all groups in order: those in the cache are verified, the others harvested, a shard at a time."""
    feed, length, wanted = make_feed(setup, cache), setup.job.shared.length, _whole_groups(setup.job)
    feed.bar = _silent(check)
    per_group = cache.group * length * setup.width * setup.storage_dtype.itemsize
    shard = -(-SHARD_BYTES // per_group) * cache.group  # sequences
    cached = min(cache.groups * cache.group, wanted)
    if cached:
        with bar("Verifying", cached * length) as advance:
            _pass(feed, cached, shard, lambda n: advance(n * length))
    if cached < wanted:
        with _progress((wanted - cached) * length) as advance:
            _pass(feed, wanted - cached, shard, lambda n: advance(n * length))


def _pass(feed: ActivationFeed, sequences: int, at_once: int, advance: Callable[[int], None]) -> None:
    """Take so many sequences from the feed, and drop them."""
    while sequences:
        for part in feed(min(at_once, sequences)):
            advance(len(part.segments))
            sequences -= len(part.segments)


def _silent(check: Callable[[], None]) -> ProgressBar:
    """A progress bar that shows nothing and calls ``check`` when it advances."""
    return lambda description, tokens: nullcontext(lambda done: check())


@contextmanager
def _progress(tokens: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; without a terminal also a line a minute."""
    if console.is_terminal:
        with bar("Harvest", tokens) as advance:
            yield advance
        return
    start = said = time.perf_counter()
    done = 0

    def note(more: int) -> None:
        nonlocal done, said
        done += more
        now = time.perf_counter()
        if now - said >= _SAY_EVERY or done == tokens:
            said, rate = now, done / (now - start)
            say(f"{done:,} of {tokens:,} tokens, {rate:,.0f} tokens/s, {_duration((tokens - done) / rate)} to go")

    yield note


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes // 60}:{minutes % 60:02d} h"
