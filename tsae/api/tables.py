"""Tables that a notebook shows as HTML and a terminal as text."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from tsae.reports.table import comparison
from tsae.utils.output import rendered


def as_text(table: Table, width: int = 160) -> str:
    """The table as it is printed, ``width`` characters wide at most."""
    return "\n".join(line.rstrip() for line in rendered(table, width).splitlines())


def as_html(table: Table, note: str = "") -> str:
    """The table as HTML; ``note``: a sentence below it."""
    head = "".join(f"<th style='text-align:{column.justify}'>{_cell(column.header)}</th>" for column in table.columns)
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td style='text-align:{column.justify};white-space:pre'>{_cell(cell)}</td>"
            for column, cell in zip(table.columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    title = f"<caption style='text-align:left'><b>{_cell(table.title)}</b></caption>" if table.title else ""
    below = f"<div>{escape(note)}</div>" if note else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def _cell(cell: Any) -> str:
    bold = isinstance(cell, Text) and "bold" in str(cell.style)
    text = escape(cell.plain if isinstance(cell, Text) else str(cell)).strip("\n").replace("-\n", "").replace("\n", " ")
    return f"<b>{text}</b>" if bold else text


class TableOfRuns:
    """Shows runs or autoencoders side by side."""

    _table: Table | None = None
    _note: str = ""

    def show_as(self, rows: dict[str, dict[str, Any]], *, title: str, what: str) -> None:
        """Show ``rows``, with `metrics` and `error` each, as `tsae.reports.table.comparison` does."""
        self._table = comparison(rows, title, what)
        self._note = " ".join(f"{name}: {row['error']}" for name, row in rows.items() if row["error"])

    def __repr__(self) -> str:
        if self._table is None:
            return super().__repr__()
        return as_text(self._table) + (f"\n{self._note}" if self._note else "")

    def _repr_html_(self) -> str | None:
        return None if self._table is None else as_html(self._table, self._note)
