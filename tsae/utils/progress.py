"""Progress bars with throughput for the long parts of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tsae.utils import notebook
from tsae.utils.output import console


class _Rate(ProgressColumn):
    """Units per second since the start."""

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        rate = task.completed / elapsed if elapsed else 0.0
        return Text(f"{rate:,.0f} {task.fields['unit']}/s" if rate >= 10 else f"{rate:.1f} {task.fields['unit']}/s")


class _Done(ProgressColumn):
    """Units done, and the total."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:>9,.0f}" + ("" if task.total is None else f"/{task.total:,.0f}"))


@contextmanager
def bar(description: str, total: float | None, unit: str = "tokens") -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr; the yielded function takes the units done since its last call.

    total: None if it is unknown

    In a notebook it is an output of the cell, updated in place. Elsewhere, without a terminal, one line is written at
    the end.
    """
    if notebook.shell() is not None:
        with notebook.bar(description, total, unit) as advance:
            yield advance
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=20),
        _Done(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, unit=unit)
        yield lambda done: progress.update(task, advance=done)
        if total is None:
            progress.update(task, total=progress.tasks[0].completed)
