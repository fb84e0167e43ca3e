"""SIGINT and SIGTERM: immediate while nothing can be lost, else deferred until the state can be saved."""

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

    advice: what the user can do next, the end of a sentence; may be empty
    """

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(advice)
        self.number, self.advice = number, advice

    def __str__(self) -> str:
        return f"interrupted{self.advice}"

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence, without the frames that it came through."""
        return [f"Interrupted{self.advice}"]

    @property
    def status(self) -> int:
        """The exit status by the shell's convention: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.number


class AtSafePoint(Interrupted):
    """Raised where the state is consistent and can be saved."""


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    """Handle both signals with ``handler`` within the block; no effect outside the main thread, as Python requires."""
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
    """Within the block a signal raises `Interrupted`, so that `finally` blocks remove temporary files."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled(stop):
        yield


@contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Within the block a signal is recorded; it raises `AtSafePoint` at the next call of the yielded function.

    A recorded signal is raised at the latest when the block ends without an error. A second signal raises `Interrupted`
    immediately.
    """
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        if received:
            raise Interrupted(number)
        received.append(number)

    def check() -> None:
        if received:
            raise AtSafePoint(received[0])

    with _handled(record):
        yield check
        check()
