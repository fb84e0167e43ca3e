"""Sequences of activations on demand, from the language model or from a cache of what it gave before.

The language model always sees the stream in the same groups of sequences, whatever number is asked for at once: a
sequence's activations are then the same bits in every run, as the last bits depend on what shares a forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tsae.data.cache import ActivationCache
from tsae.data.harvest import ActivationBatch, Harvester
from tsae.data.sequences import TokenBatch
from tsae.errors import UserError
from tsae.utils.interrupts import AtSafePoint

log = logging.getLogger(__name__)

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def no_bar(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Shows nothing."""
    return nullcontext(lambda done: None)


class Feed:
    """Gives the sequences of a harvester's stream in order, any number at a time.

    Args:
        harvester: runs the language model on groups of ``harvester.batch`` sequences.
        cache: where groups are looked up first, and written to. Its group size is the harvester's.
        bar: ``bar(what, tokens)`` shows the progress of a part; the function it yields takes the tokens done, and
            may raise `AtSafePoint`.
        has: of several processes with the same stream, whether this one gives the activations of a group, by its
            number; those of other groups are on the meta device, without values. The cache is then only read. None: all
            of them.
    """

    def __init__(
        self,
        harvester: Harvester,
        cache: ActivationCache | None = None,
        bar: Bar = no_bar,
        has: Callable[[int], bool] | None = None,
    ) -> None:
        self.harvester, self.cache, self.bar = harvester, cache, bar
        self.shared, self.has = has is not None, has or (lambda number: True)
        self.size = harvester.batch
        self.position = 0  # sequences given
        self._rest: tuple[int, ActivationBatch] | None = None  # the group that a request ended within, and its number
        self._stream_at = 0  # the group that the stream gives next
        self._marks: dict[int, dict[str, Any]] = {0: harvester.stream.state_dict()}  # the stream before some groups
        if cache is not None and cache.groups:
            self._check_text(cache)

    def __call__(self, n: int) -> Iterator[ActivationBatch]:
        """The next ``n`` sequences, a group at most at a time; they count as given once the last was taken."""
        start, end = self.position, self.position + n
        first, last = start // self.size, -(-end // self.size)
        for number, group in self._groups(first, last):
            low, high = max(start - number * self.size, 0), min(end - number * self.size, self.size)
            self._rest = (number, group) if number == last - 1 and end % self.size else None
            yield ActivationBatch(group.x[low:high], group.segments[low:high])
        self.position = end
        here = max(mark for mark in self._marks if mark <= end // self.size)
        self._marks = {mark: state for mark, state in self._marks.items() if mark in (0, here)}

    def state_dict(self) -> dict[str, Any]:
        """Where the feed stands: sequences given, and the stream at or before the group of the next one."""
        group = max(mark for mark in self._marks if mark <= self.position // self.size)
        return {"position": self.position, "group": group, "stream": self._marks[group]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; activations are looked up or harvested again when asked for."""
        self.position, self._rest = state["position"], None
        self._marks[state["group"]] = state["stream"]
        self.harvester.stream.load_state_dict(state["stream"])
        self._stream_at = state["group"]

    def _groups(self, first: int, last: int) -> Iterator[tuple[int, ActivationBatch]]:
        if self._rest is not None and self._rest[0] == first:
            yield self._rest
            first += 1
        cached = 0 if self.cache is None else min(self.cache.groups, last)
        if first < cached:
            with self.bar("Cache", (cached - first) * self.size * self.harvester.stream.length) as advance:
                for number in range(first, cached):
                    group = self._read(number)[1]
                    yield number, group if self.has(number) else ActivationBatch(group.x.to("meta"), group.segments)
                    advance(self.size * self.harvester.stream.length)
            first = cached
        if first >= last:
            return
        if self.cache is None:
            for number, _, group in self._harvest(first, last):
                yield number, group
            return
        self._learn(self.cache.shards)
        try:
            # From the cache's own end, which lies before ``first`` only if the cache was shortened meanwhile.
            for number, tokens, group in self._harvest(self.cache.groups, last):
                self.cache.append(tokens, group, self._marks[number + 1])
                if number >= first:
                    yield number, group
        except (AtSafePoint, GeneratorExit):
            self.cache.flush()
            raise
        self.cache.flush()

    def _harvest(self, first: int, last: int) -> Iterator[tuple[int, TokenBatch, ActivationBatch]]:
        """Groups from the language model."""
        total = (last - first) * self.size * self.harvester.stream.length
        with self.bar("Tokenizing", total) as advance:
            self._seek(first)
            tokens = [self._tokenize(advance) for _ in range(first, last)]
        with self.bar("Harvest", total) as advance:
            for number, part in enumerate(tokens, first):
                run = self.harvester.batches if self.has(number) else self.harvester.absent
                for group in run(part, advance):
                    yield number, part, group

    def _seek(self, number: int) -> None:
        """Bring the stream before group ``number``, from the last place known before it."""
        known = max(mark for mark in self._marks if mark <= number)
        if not known <= self._stream_at <= number:
            self.harvester.stream.load_state_dict(self._marks[known])
            self._stream_at = known
        while self._stream_at < number:
            self._tokenize()

    def _tokenize(self, advance: Callable[[int], None] | None = None) -> TokenBatch:
        """The stream's next group; where the stream then stands is kept."""
        tokens = self.harvester.tokenize(self.size, advance)
        self._stream_at += 1
        self._marks[self._stream_at] = self.harvester.stream.state_dict()
        return tokens

    def _read(self, number: int) -> tuple[TokenBatch, ActivationBatch]:
        """A group of the cache; its shard is harvested again if it is damaged."""
        assert self.cache is not None
        shard = self.cache.shard_of(number)
        if not self.cache.is_whole(shard):
            self._repair(shard)
        return self.cache.read(number)

    def _repair(self, shard: int) -> None:
        assert self.cache is not None
        if self.shared:
            raise UserError(
                f"{self.cache.path(shard)} is damaged, and several processes only read a cache; a run in one process "
                "mends it."
            )
        first, last = self.cache.span(shard)
        log.warning("%s is damaged: harvesting its sequences again", self.cache.path(shard))
        self.cache.lock()
        self._learn(shard)
        groups = [(tokens, group) for _, tokens, group in self._harvest(first, last)]
        self.cache.replace(shard, groups, self._marks[last])

    def _learn(self, shards: int) -> None:
        """Keep where the stream stood at the end of the last of the first ``shards`` shards that can tell."""
        assert self.cache is not None
        for shard in reversed(range(shards)):
            if self.cache.is_whole(shard):
                self._marks[self.cache.span(shard)[1]] = self.cache.stream_after(shard)
                return

    def _check_text(self, cache: ActivationCache) -> None:
        """Raise `UserError` unless the first group of the cache is of the stream's own tokens."""
        stored = self._read(0)[0]
        self._seek(0)
        tokens = self._tokenize()
        if not tokens.equals(stored):
            raise UserError(
                f"The cache {cache.directory} begins with other tokens than this run's text, so the text or the "
                "tokenizer has changed; name another directory with --cache, or remove this one."
            )
