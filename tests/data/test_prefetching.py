"""Prefetching gives the feed's sequences, is bounded, and stops when told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import sample_text

from tsae.data.cache import ActivationCache
from tsae.data.documents import Document
from tsae.data.feed import ActivationFeed
from tsae.data.harvest import ActivationBatch, Harvester
from tsae.data.prefetching import PrefetchingFeed
from tsae.data.sequences import SequenceStream
from tsae.lm.loading import LanguageModel, load_language_model
from tsae.utils.interrupts import AtSafePoint

T, GROUP, TOTAL = 24, 4, 40


@pytest.fixture(scope="module")
def lm(tiny_neox: Path) -> LanguageModel:
    return load_language_model(str(tiny_neox), dtype="float32")


def make_feed(lm: LanguageModel, cache: ActivationCache | None = None) -> ActivationFeed:
    stream = SequenceStream(lambda epoch: iter([Document("a", sample_text(3000, seed=epoch))]), lm.tokenizer, T)
    return ActivationFeed(Harvester(lm, 1, stream, batch=GROUP), cache)


def joined(parts: Iterator[ActivationBatch]) -> ActivationBatch:
    return ActivationBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))


def equal(a: ActivationBatch, b: ActivationBatch) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.segments, b.segments)


def test_the_same_sequences_in_the_same_order(lm: LanguageModel) -> None:
    feed = make_feed(lm)
    with PrefetchingFeed(make_feed(lm), 8, TOTAL) as ahead:
        for n in (1, 10, 4, 0, 13, 12):
            if n:
                assert equal(joined(ahead(n)), joined(feed(n)))


def test_prefetched_sequences_are_bounded(lm: LanguageModel) -> None:
    source = make_feed(lm)
    harvested = 0
    batches = source.harvester.batches

    def counted(*arguments: Any) -> Iterator[ActivationBatch]:
        nonlocal harvested
        for part in batches(*arguments):
            harvested += len(part.x)
            yield part

    source.harvester.batches = counted  # type: ignore[method-assign]
    given = 0
    with PrefetchingFeed(source, 8, TOTAL) as ahead:
        for n in (3, 9, 28):
            for part in ahead(n):
                given += len(part.x)
                assert harvested <= given + 8 + GROUP  # one harvested part waits for room
    assert harvested == given == TOTAL


@pytest.mark.parametrize("given", [3, 8, 17, 40])
def test_a_state_resumes_with_or_without_prefetching(lm: LanguageModel, given: int) -> None:
    whole = joined(make_feed(lm)(TOTAL + 5))
    with PrefetchingFeed(make_feed(lm), 12, TOTAL) as ahead:
        assert equal(joined(ahead(given)), ActivationBatch(whole.x[:given], whole.segments[:given]))
        state = ahead.state_dict()
    feed = make_feed(lm)
    feed.load_state_dict(state)
    rest = ActivationBatch(whole.x[given : given + 5], whole.segments[given : given + 5])
    assert equal(joined(feed(5)), rest)
    with PrefetchingFeed(make_feed(lm), 12, TOTAL + 5) as again:
        again.load_state_dict(state)
        assert equal(joined(again(5)), rest)
        assert again.state_dict()["position"] == given + 5


@pytest.mark.parametrize("taken", [0, 3, 7])
def test_an_interrupted_request_does_not_count(lm: LanguageModel, taken: int) -> None:
    """The buffer asks for all of it again, as with an `ActivationFeed`."""
    whole = joined(make_feed(lm)(TOTAL))
    with PrefetchingFeed(make_feed(lm), 8, TOTAL) as ahead:
        list(ahead(6))
        request = ahead(30)
        for _ in range(taken):
            next(request)
        state = ahead.state_dict()
    assert state["position"] == 6
    feed = make_feed(lm)
    feed.load_state_dict(state)
    assert equal(joined(feed(30)), ActivationBatch(whole.x[6:36], whole.segments[6:36]))


def test_an_error_in_the_thread_reaches_the_caller(lm: LanguageModel) -> None:
    feed = make_feed(lm)

    def fail(*_: Any) -> Iterator[ActivationBatch]:
        raise RuntimeError("out of memory")

    feed.harvester.batches = fail  # type: ignore[method-assign]
    with PrefetchingFeed(feed, 8, TOTAL) as ahead, pytest.raises(RuntimeError, match="out of memory"):
        list(ahead(4))


def test_requesting_more_than_the_total_raises_at_once(lm: LanguageModel) -> None:
    with (
        PrefetchingFeed(make_feed(lm), 8, TOTAL) as ahead,
        pytest.raises(ValueError, match="there are 40 sequences, and more were requested"),
    ):
        list(ahead(TOTAL + 1))


def test_leaving_ends_the_thread_and_waiting_checks_for_signals(lm: LanguageModel) -> None:
    @contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        def stop(done: int) -> None:
            raise AtSafePoint(15)

        yield stop

    with PrefetchingFeed(make_feed(lm), 8, TOTAL, bar) as ahead, pytest.raises(AtSafePoint):
        list(ahead(TOTAL))
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
