"""Harvesting ahead: the language model works on the next activations while the autoencoder trains on those at hand."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from tsae.data.feed import Bar, Feed, no_bar
from tsae.data.harvest import ActivationBatch

_LOOK = 0.2  # seconds between two looks at whether to stop


class _Failed(NamedTuple):
    error: BaseException


class PrefetchingFeed:
    """A feed whose sequences are asked for before they are wanted, in a thread of its own.

    What comes out is what the feed gives, in the same order, and a state saved with one goes on with the other. The
    thread begins with the first request. A context manager; its end waits for the forward pass in hand.

    Args:
        feed: the activations, used by the thread alone from the first request on; without a bar of its own.
        ahead: sequences that are held beside those handed out, at most; also the size of a request to the feed.
        total: sequences that will be asked for in all; the feed is asked for no more.
        bar: as a `Feed`'s, around what a request waits for.
        device: of the language model; on a GPU the thread has a stream of its own.
    """

    def __init__(
        self, feed: Feed, ahead: int, total: int, bar: Bar = no_bar, device: torch.device | None = None
    ) -> None:
        self.feed, self.ahead, self.total, self.bar, self.device = feed, ahead, total, bar, device
        self.given = feed.position
        self._before = feed.state_dict()  # as it was before the request to it that the last part given came from
        self._rest: ActivationBatch | None = None  # what a request left of a part
        self._room = threading.Semaphore(ahead)
        self._parts: queue.Queue[tuple[ActivationBatch, dict[str, Any]] | _Failed] = queue.Queue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PrefetchingFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __call__(self, n: int) -> Iterator[ActivationBatch]:
        """The next ``n`` sequences, in parts; they count as given once the last was taken."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self.given,), name="harvest ahead", daemon=True)
            self._thread.start()
        end, before = self.given + n, self._before
        with self.bar("Harvest", n * self.feed.harvester.stream.length) as advance:
            while n > 0:
                if self._rest is None:
                    self._rest, before = self._take(advance)
                part, taken = self._rest, min(n, len(self._rest.x))
                self._rest = ActivationBatch(part.x[taken:], part.segments[taken:]) if taken < len(part.x) else None
                n -= taken
                self._room.release(taken)
                yield ActivationBatch(part.x[:taken], part.segments[:taken])
                advance(part.segments[:taken].numel())
        self.given, self._before = end, before

    def _take(self, advance: Callable[[int], None]) -> tuple[ActivationBatch, dict[str, Any]]:
        """The next part, and the feed's state before the request that it came from."""
        while True:
            try:
                found = self._parts.get(timeout=_LOOK)
                break
            except queue.Empty:
                advance(0)  # so that a signal is seen
        if isinstance(found, _Failed):
            raise found.error
        return found

    def _work(self, position: int) -> None:
        try:
            stream = torch.cuda.Stream(self.device) if self.device is not None and self.device.type == "cuda" else None
            with torch.cuda.stream(stream):  # None: nothing is changed
                while position < self.total and not self._stop.is_set():
                    before = self.feed.state_dict()
                    request = self.feed(min(self.ahead, self.total - position))
                    for part in request:
                        if not self._has_room(len(part.x)):
                            request.close()
                            return
                        self._parts.put((part, before))
                        position += len(part.x)
            if position >= self.total:  # whoever asks on would wait for ever
                self._parts.put(_Failed(ValueError(f"there are {self.total} sequences, and more were asked for")))
        except BaseException as error:  # the thread that asks raises it
            self._parts.put(_Failed(error))

    def _has_room(self, sequences: int) -> bool:
        """Wait until there is; False if the thread is to stop."""
        for _ in range(sequences):
            while not self._room.acquire(timeout=_LOOK):
                if self._stop.is_set():
                    return False
        return not self._stop.is_set()

    def state_dict(self) -> dict[str, Any]:
        """A `Feed`'s, where the requests stand; what lies ahead is harvested again after `load_state_dict`."""
        return self._before | {"position": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; before the first request only."""
        self.feed.load_state_dict(state)
        self.given, self._before = state["position"], state
