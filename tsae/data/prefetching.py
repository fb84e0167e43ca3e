"""Prefetching: the language model harvests the next activations while the autoencoder trains."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

import torch

from tsae.data.feed import ActivationFeed, ProgressBar, no_progress
from tsae.data.harvest import ActivationBatch

_POLL = 0.2  # seconds between checks of whether to stop


class PrefetchingFeed:
    """An `ActivationFeed` that a thread reads ahead of the requests.

    It gives the same sequences in the same order, and the two can load each other's states. The thread starts with
    the first request. Leaving the context stops it after its current forward pass.

    Args:
        feed: without a progress bar; used only by the thread from the first request on.
        ahead: sequences to prefetch at most; also the size of a request to the feed.
        total: sequences that will be requested in all; no more are harvested.
        bar: wraps each request; the function it yields may raise `AtSafePoint`.
        device: of the language model; on a GPU the thread uses its own CUDA stream.
    """

    def __init__(
        self,
        feed: ActivationFeed,
        ahead: int,
        total: int,
        bar: ProgressBar = no_progress,
        device: torch.device | None = None,
    ) -> None:
        self.feed, self.ahead, self.total, self.bar, self.device = feed, ahead, total, bar, device
        self.position = feed.position  # sequences handed out
        self._state = feed.state_dict()  # before the feed's request that gave the last part handed out
        self._partial: ActivationBatch | None = None  # what remains of a part handed out
        self._room = threading.Semaphore(ahead)  # sequences that may still be prefetched
        self._parts: queue.Queue[tuple[ActivationBatch, dict[str, Any]] | BaseException] = queue.Queue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PrefetchingFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __call__(self, n: int) -> Iterator[ActivationBatch]:
        """The next ``n`` sequences, in parts; `position` moves once all have been taken."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._prefetch, args=(self.position,), name="prefetch", daemon=True)
            self._thread.start()
        end, state = self.position + n, self._state
        with self.bar("Harvest", n * self.feed.harvester.stream.length) as advance:
            while n > 0:
                if self._partial is None:
                    self._partial, state = self._next_part(advance)
                part, taken = self._partial, min(n, len(self._partial.x))
                self._partial = ActivationBatch(part.x[taken:], part.segments[taken:]) if taken < len(part.x) else None
                n -= taken
                self._room.release(taken)
                yield ActivationBatch(part.x[:taken], part.segments[:taken])
                advance(part.segments[:taken].numel())
        self.position, self._state = end, state

    def _next_part(self, advance: Callable[[int], None]) -> tuple[ActivationBatch, dict[str, Any]]:
        """The next prefetched part, and the feed's state before the request that gave it."""
        while True:
            try:
                found = self._parts.get(timeout=_POLL)
                break
            except queue.Empty:
                advance(0)  # checks for signals
        if isinstance(found, BaseException):
            raise found
        return found

    def _prefetch(self, position: int) -> None:
        """The thread: requests parts from the feed and puts them, or an exception, into the queue."""
        try:
            stream = torch.cuda.Stream(self.device) if self.device is not None and self.device.type == "cuda" else None
            with torch.cuda.stream(stream):  # None changes nothing
                while position < self.total and not self._stop.is_set():
                    state = self.feed.state_dict()
                    request = self.feed(min(self.ahead, self.total - position))
                    for part in request:
                        if not self._wait_for_room(len(part.x)):
                            cast(Generator[ActivationBatch], request).close()
                            return
                        self._parts.put((part, state))
                        position += len(part.x)
            if position >= self.total:  # a further request would wait forever
                self._parts.put(ValueError(f"there are {self.total} sequences, and more were requested"))
        except BaseException as error:
            self._parts.put(error)

    def _wait_for_room(self, sequences: int) -> bool:
        """Wait until there is room for these sequences; False if the thread is to stop."""
        for _ in range(sequences):
            while not self._room.acquire(timeout=_POLL):
                if self._stop.is_set():
                    return False
        return not self._stop.is_set()

    def state_dict(self) -> dict[str, Any]:
        """An `ActivationFeed`'s state; sequences that were prefetched but not handed out are harvested again."""
        return self._state | {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; only before the first request."""
        self.feed.load_state_dict(state)
        self.position, self._state = state["position"], state
