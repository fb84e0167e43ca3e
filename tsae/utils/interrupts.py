"""SIGINT and SIGTERM: at once where nothing can be lost, else when the work in hand is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end.

    advice: a sentence on how to go on, for the user; empty where there is none
    """

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(advice)
        self.number, self.advice = number, advice

    @property
    def status(self) -> int:
        """The exit status by the shell's convention: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.number


class AtSafePoint(Interrupted):
    """Raised where all state is consistent, so that it can be saved."""


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    """``handler`` for both signals within the block; elsewhere than in the main thread Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def at_once() -> Iterator[None]:
    """Within the block a signal raises `Interrupted`, so that temporary files are removed on the way out."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled(stop):
        yield


@contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Within the block a signal is noted, and raises `AtSafePoint` when the yielded function is called next.

    One that was noted and not raised is raised when the block ends without an error. A second signal raises
    `Interrupted` at once.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise Interrupted(number)
        noted.append(number)

    def check() -> None:
        if noted:
            raise AtSafePoint(noted[0])

    with _handled(note):
        yield check
        check()
