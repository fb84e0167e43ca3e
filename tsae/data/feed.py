"""A feed of activations on demand, from the language model or from a cache.

The stream always passes through the language model in the same groups of sequences, however many are requested at
once. Every run then gets bit-identical activations: their last bits depend on which sequences share a forward pass.
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

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``bar(description, tokens)`` shows progress; it yields a function that takes the tokens done since its last call."""


def no_progress(description: str, tokens: int) -> AbstractContextManager[Callable[[int], None]]:
    """A `ProgressBar` that shows nothing."""
    return nullcontext(lambda done: None)


class ActivationFeed:
    """The sequences of a harvester's stream in order, any number at a time.

    With several processes, group i is harvested by rank i modulo ``world_size``. Other ranks get its segments, and
    activations on the meta device. The cache is then read-only.

    Args:
        harvester: runs the language model on groups of ``harvester.batch`` sequences.
        cache: where groups are looked up first and written to; with groups of the same size.
        bar: wraps harvesting and reading; the function it yields may raise `AtSafePoint`.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        harvester: Harvester,
        cache: ActivationCache | None = None,
        bar: ProgressBar = no_progress,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.harvester, self.cache, self.bar = harvester, cache, bar
        self.rank, self.world_size = rank, world_size
        self.size = harvester.batch
        self.position = 0  # sequences handed out
        self._partial: tuple[int, ActivationBatch] | None = None  # number and content of a group handed out in part
        self._next_tokenized = 0  # number of the group that the stream gives next
        self._states: dict[int, dict[str, Any]] = {0: harvester.stream.state_dict()}  # the stream before a group
        if cache is not None and cache.groups:
            self._check_tokens(cache)

    def __call__(self, n: int) -> Iterator[ActivationBatch]:
        """The next ``n`` sequences, at most a group at a time; `position` moves once all have been taken."""
        start, end = self.position, self.position + n
        first, last = start // self.size, -(-end // self.size)
        for number, group in self._groups(first, last):
            low, high = max(start - number * self.size, 0), min(end - number * self.size, self.size)
            self._partial = (number, group) if number == last - 1 and end % self.size else None
            yield ActivationBatch(group.x[low:high], group.segments[low:high])
        self.position = end
        here = self._known_before(end // self.size)
        self._states = {number: state for number, state in self._states.items() if number in (0, here)}

    def state_dict(self) -> dict[str, Any]:
        """Sequences handed out, and the stream's state at or before the group of the next one."""
        group = self._known_before(self.position // self.size)
        return {"position": self.position, "group": group, "stream": self._states[group]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; activations are read or harvested again on demand."""
        self.position, self._partial = state["position"], None
        self._states[state["group"]] = state["stream"]
        self.harvester.stream.load_state_dict(state["stream"])
        self._next_tokenized = state["group"]

    def _groups(self, first: int, last: int) -> Iterator[tuple[int, ActivationBatch]]:
        """Groups ``first`` to ``last`` - 1 with their numbers: from the cache as far as it reaches, then harvested."""
        if self._partial is not None and self._partial[0] == first:
            yield self._partial
            first += 1
        cached = 0 if self.cache is None else min(self.cache.groups, last)
        if first < cached:
            group_tokens = self.size * self.harvester.stream.length
            with self.bar("Cache", (cached - first) * group_tokens) as advance:
                for number in range(first, cached):
                    group = self._read(number)[1]
                    x = group.x if self._is_local(number) else group.x.to("meta")
                    yield number, ActivationBatch(x, group.segments)
                    advance(group_tokens)
            first = cached
        if first >= last:
            return
        if self.cache is None:
            for number, _, group in self._harvest(first, last):
                yield number, group
            return
        self._restore_state(self.cache.shards)
        try:
            # From the end of the cache, which is before ``first`` only if the cache has since become shorter.
            for number, tokens, group in self._harvest(self.cache.groups, last):
                self.cache.append(tokens, group, self._states[number + 1])
                if number >= first:
                    yield number, group
        except (AtSafePoint, GeneratorExit):
            self.cache.flush()
            raise
        self.cache.flush()

    def _is_local(self, number: int) -> bool:
        """Whether this process holds the activations of a group."""
        return number % self.world_size == self.rank

    def _harvest(self, first: int, last: int) -> Iterator[tuple[int, TokenBatch, ActivationBatch]]:
        """Groups from the language model, with their numbers and tokens."""
        total = (last - first) * self.size * self.harvester.stream.length
        with self.bar("Tokenizing", total) as advance:
            self._seek(first)
            groups = []
            for _ in range(first, last):
                groups.append(self._tokenize())
                advance(groups[-1].segments.numel())
        with self.bar("Harvest", total) as advance:
            for number, tokens in enumerate(groups, first):
                run = self.harvester.batches if self._is_local(number) else self.harvester.placeholders
                for group in run(tokens):
                    yield number, tokens, group
                    advance(tokens.segments.numel())

    def _known_before(self, number: int) -> int:
        """The last group, at or before ``number``, before which the stream's state is known."""
        return max(known for known in self._states if known <= number)

    def _seek(self, number: int) -> None:
        """Move the stream to the beginning of a group."""
        known = self._known_before(number)
        if not known <= self._next_tokenized <= number:
            self.harvester.stream.load_state_dict(self._states[known])
            self._next_tokenized = known
        while self._next_tokenized < number:
            self._tokenize()

    def _tokenize(self) -> TokenBatch:
        """The stream's next group; the stream's state after it is kept."""
        tokens = self.harvester.tokenize(self.size)
        self._next_tokenized += 1
        self._states[self._next_tokenized] = self.harvester.stream.state_dict()
        return tokens

    def _read(self, number: int) -> tuple[TokenBatch, ActivationBatch]:
        """A group from the cache; a damaged shard is harvested again first."""
        assert self.cache is not None
        shard = self.cache.shard_of(number)
        if not self.cache.is_intact(shard):
            self._repair(shard)
        return self.cache.read(number)

    def _repair(self, shard: int) -> None:
        """Harvest a damaged shard again."""
        assert self.cache is not None
        if self.world_size > 1:
            raise UserError(
                f"{self.cache.path(shard)} is damaged, and several processes only read a cache; repair it with a run "
                "in one process."
            )
        first, last = self.cache.span(shard)
        log.warning("%s is damaged: harvesting its sequences again", self.cache.path(shard))
        self.cache.lock()
        self._restore_state(shard)
        groups = [(tokens, group) for _, tokens, group in self._harvest(first, last)]
        self.cache.replace(shard, groups, self._states[last])

    def _restore_state(self, shards: int) -> None:
        """Take the stream's state from the last intact one of the first ``shards`` shards."""
        assert self.cache is not None
        for shard in reversed(range(shards)):
            if self.cache.is_intact(shard):
                self._states[self.cache.span(shard)[1]] = self.cache.stream_after(shard)
                return

    def _check_tokens(self, cache: ActivationCache) -> None:
        """Raise `UserError` unless the cache begins with the stream's own tokens."""
        stored = self._read(0)[0]
        self._seek(0)
        if not self._tokenize().equals(stored):
            raise UserError(
                f"The cache {cache.directory} begins with other tokens than this run's text: the text or the "
                "tokenizer has changed; name another directory with --cache, or remove this one."
            )
