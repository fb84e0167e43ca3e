"""Progress bars in a notebook: one output of the cell each, updated in place a few times a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

_EVERY = 0.5  # seconds between updates, which are messages to the browser
_shown: dict[tuple[int, str], Any] = {}  # the outputs of the running cell, by its number and the bar's description


def shell() -> Any:
    """IPython's shell if its kernel runs a notebook; None elsewhere, in a terminal too."""
    ipython = sys.modules.get("IPython")
    found = None if ipython is None else ipython.get_ipython()
    return found if hasattr(found, "kernel") else None


class _Bar:
    """The state of a bar, as a notebook shows it."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.start = 0.0, time.perf_counter()

    def _text(self) -> str:
        seconds = max(time.perf_counter() - self.start, 1e-9)
        of = "" if self.total is None else f"/{self.total:,.0f}"
        left = (self.total - self.done) * seconds / self.done if self.total and self.done else 0.0
        rest = f", {_clock(left)} left" if left >= 1 else ""
        rate = self.done / seconds
        return f"{self.done:,.0f}{of} {self.unit}, {rate:,.{0 if rate >= 10 else 1}f}/s, {_clock(seconds)}{rest}"

    def __repr__(self) -> str:
        return f"{self.description}: {self._text()}"

    def _repr_html_(self) -> str:
        share = f"value='{self.done:.0f}' max='{self.total:.0f}'" if self.total else ""
        return (
            f"<div><span style='display:inline-block;min-width:11em'>{escape(self.description)}</span>"
            f"<progress {share}></progress> {escape(self._text())}</div>"
        )


def _output(state: _Bar) -> Any:
    """The output of the cell that shows a bar."""
    from IPython import display

    cell = shell().execution_count
    for key in [key for key in _shown if key[0] != cell]:
        del _shown[key]
    key = (cell, state.description)
    if key in _shown:
        _shown[key].update(state)
    else:
        show: Any = display.display
        _shown[key] = show(state, display_id=True)
    return _shown[key]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def bar(description: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
    """A progress bar as output of the running cell; the yielded function takes the units done since its last call.

    total: None if it is unknown

    A bar that comes again in the same cell, such as that of the next harvest, takes the place of the last one.
    """
    state, shown = _Bar(description, total, unit), time.perf_counter()
    handle = _output(state)

    def advance(done: float) -> None:
        nonlocal shown
        state.done += done
        if time.perf_counter() - shown >= _EVERY:
            shown = time.perf_counter()
            handle.update(state)

    try:
        yield advance
    finally:
        if total is None:
            state.total = state.done
        handle.update(state)
