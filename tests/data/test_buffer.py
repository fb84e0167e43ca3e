"""The activation buffer: memory bounds, shuffling of complete sequences, reuse, resuming."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import sample_text

from tsae.data.buffer import ActivationBuffer
from tsae.data.documents import Document
from tsae.data.feed import ActivationFeed
from tsae.data.harvest import ActivationBatch, Harvester
from tsae.data.prefetching import PrefetchingFeed
from tsae.data.sequences import SequenceStream, TokenBatch
from tsae.lm.loading import load_language_model

T, D = 5, 3


class Source:
    """Sequence i holds i * 1000 + position, so that every token is known."""

    def __init__(self, start: int = 0) -> None:
        self.next, self.sizes = start, []

    def __call__(self, n: int) -> Iterator[ActivationBatch]:
        ids = torch.arange(self.next, self.next + n)
        self.next += n
        self.sizes.append(n)
        x = (ids[:, None, None] * 1000 + torch.arange(T)[None, :, None]).expand(n, T, D).float().contiguous()
        for part in x.split(5):
            yield ActivationBatch(part, torch.zeros(len(part), T, dtype=torch.int32))


def make(source: Source, capacity: int, reuse: int, demand: int) -> ActivationBuffer:
    return ActivationBuffer(source, capacity, reuse, demand, torch.Generator().manual_seed(0))


def served(batch: ActivationBatch) -> list[int]:
    """Sequence numbers, after checking that tokens are in order."""
    for row in batch.x:
        torch.testing.assert_close(row[:, 0] % 1000, torch.arange(T).float())
    return (batch.x[:, 0, 0] / 1000).long().tolist()


@pytest.mark.parametrize(
    ("capacity", "reuse", "steps"), [(16, 1, 40), (16, 3, 40), (1000, 1, 10), (40, 8, 40), (7, 2, 9)]
)
def test_every_sequence_is_drawn_reuse_times_and_none_is_wasted(capacity: int, reuse: int, steps: int) -> None:
    source = Source()
    buffer = make(source, capacity, reuse, demand=steps * 4)
    counts: Counter[int] = Counter()
    for _ in range(steps):
        batch = served(buffer.next_batch(4))
        assert len(set(batch)) == 4
        counts.update(batch)
    assert source.next == -(-steps * 4 // reuse)  # no more is harvested than is needed
    assert max(source.sizes) <= capacity
    # The very last batches may find fewer than 4 distinct sequences with uses left; one batch at most is repeated.
    assert sum(max(0, count - reuse) for count in counts.values()) <= 4
    assert sum(counts.values()) == steps * 4
    assert len(counts) == source.next
    assert buffer.x is not None
    assert buffer.x.shape[0] <= capacity


def test_order_is_shuffled_and_fixed_by_the_seed() -> None:
    first, second = (make(Source(), 64, 1, 64) for _ in range(2))
    a = [served(first.next_batch(8)) for _ in range(8)]
    assert a == [served(second.next_batch(8)) for _ in range(8)]
    assert sorted(sum(a, [])) == list(range(64))
    assert max(a[0]) - min(a[0]) > 20


def test_new_sequences_are_mixed_with_old_ones() -> None:
    buffer = make(Source(), 32, 1, 320)
    batches = [served(buffer.next_batch(4)) for _ in range(80)]
    both = [b for b in batches if min(b) < 32 <= max(b)]
    assert both


def test_first_does_not_count_as_a_use() -> None:
    source = Source()
    buffer = make(source, 8, 1, 8)
    assert served(buffer.first(3)) == [0, 1, 2]
    assert sorted(served(buffer.next_batch(8))) == list(range(8))
    assert source.sizes == [8]


@pytest.mark.parametrize("when", [0, 1, 7, 20])
def test_resumes_bit_for_bit(when: int) -> None:
    whole_source = Source()
    whole = make(whole_source, 12, 2, 120)
    for _ in range(when):
        whole.next_batch(4)
    state, contents = whole.state_dict(), {k: v.clone() for k, v in whole.contents().items()}
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    resumed = make(Source(whole_source.next), 12, 2, 120)
    resumed.load_state_dict(state, contents)
    for _ in range(30 - when):
        a, b = whole.next_batch(4), resumed.next_batch(4)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.segments, b.segments)


def allocated(work: Callable[[], object]) -> int:
    """Peak bytes of tensors allocated in ``work``, according to torch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_memory_is_as_stated_plus_one_harvest_batch(tiny_neox: Path) -> None:
    lm = load_language_model(str(tiny_neox), dtype="float32")
    stream = SequenceStream(lambda epoch: iter([Document("a", sample_text(30_000))]), lm.tokenizer, 128)
    harvester = Harvester(lm, 1, stream, batch=2)
    one_batch = allocated(partial(harvester.take, 2))
    tokens = harvester.tokenize(256)

    def harvest(n: int) -> Iterator[ActivationBatch]:
        return harvester.batches(TokenBatch(tokens.tokens[:n], tokens.segments[:n]))

    buffer = ActivationBuffer(harvest, 256, 1, 2048, torch.Generator().manual_seed(0))
    stated = buffer.memory(128, 32, torch.float32)
    assert stated >= 256 * 128 * 32 * 4

    def draw() -> object:
        while buffer.refills < 4:
            buffer.next_batch(8)
        return buffer.contents()

    peak = allocated(draw)
    assert stated <= peak <= stated + 1.1 * one_batch + 8 * 128 * 32 * 4
    assert one_batch < stated / 3  # otherwise the bound would be loose


class NoModel(Harvester):
    """A harvester whose activations are zeros."""

    def __init__(self, stream: SequenceStream) -> None:
        self.stream, self.batch = stream, 4

    def batches(self, tokens: TokenBatch) -> Iterator[ActivationBatch]:
        yield ActivationBatch(torch.zeros(*tokens.segments.shape, D), tokens.segments)


@pytest.mark.parametrize("prefetch", [False, True])
def test_memory_does_not_grow_over_10_000_steps(tokenizer: Any, prefetch: bool) -> None:
    """Tokenizing, feed, prefetching and buffer; documents of many lengths, over several epochs."""

    def documents(epoch: int) -> Iterator[Document]:
        return (Document(f"{epoch}.{i}", sample_text(1 + 37 * i % 60, seed=i)) for i in range(2000))

    steps, batch, reuse = 10_000, 8, 4
    stream = SequenceStream(documents, tokenizer, 16)
    feed: Any = ActivationFeed(NoModel(stream))
    in_use = []
    with ExitStack() as stack:
        if prefetch:
            feed = stack.enter_context(PrefetchingFeed(feed, 32, steps * batch // reuse))
        buffer = ActivationBuffer(feed, 64, reuse, steps * batch, torch.Generator().manual_seed(0))
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for step in range(steps):
            buffer.next_batch(batch)
            if step % 1000 == 999:
                gc.collect()
                in_use.append(tracemalloc.get_traced_memory()[0])
    assert buffer.refills > 400
    assert stream.epoch >= 2
    # The documents of the tokenizer's present call, of at most 64 x 60 words, come and go.
    assert min(in_use[5:]) < min(in_use[:5]) + 50_000
    assert max(in_use) < 1_500_000
