"""Which column of a source of rows holds the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tsae.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

TEXT = "text"
"""The column that is read without being named."""

SAMPLE = 1_000
"""Rows at the beginning of a source that decide about its columns."""

_CHARACTERS = 1 << 24  # of those rows, likewise
_MESSAGE = ({"role", "content"}, {"from", "value"})  # keys of a chat's messages
_SHOWN = 20  # names in an error message


class Kind(IntEnum):
    """What the values of a column are. Of values of several kinds the greatest counts."""

    EMPTY = 0  # null or blank, which says nothing
    OTHER = 1  # numbers, dates, bytes
    NESTED = 2  # objects and lists
    WORD = 3  # strings, none of which has a space or a letter beyond ASCII: ids, URLs, file names
    TEXT = 4
    CHAT = 5  # a list of messages, each with a role and content

    @property
    def is_text(self) -> bool:
        """Whether the column can be read as text."""
        return self in (Kind.EMPTY, Kind.WORD, Kind.TEXT)


def kind_of(value: Any) -> Kind:
    """The kind of a value in JSON or of a row's dictionary."""
    if value is None:
        return Kind.EMPTY
    if isinstance(value, str):
        words = value.split()
        return Kind.EMPTY if not words else Kind.WORD if len(words) == 1 and value.isascii() else Kind.TEXT
    if isinstance(value, list) and any(isinstance(item, dict) and _is_message(item) for item in value):
        return Kind.CHAT
    return Kind.NESTED if isinstance(value, dict | list) else Kind.OTHER


def kind_of_arrow(kind: pa.DataType) -> Kind:
    """The kind of a column of an Arrow table; strings of every type count as text."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return kind_of_arrow(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return Kind.TEXT
    if types.is_null(kind):
        return Kind.EMPTY
    if not types.is_nested(kind):
        return Kind.NESTED if isinstance(kind, pa.BaseExtensionType) else Kind.OTHER
    item = getattr(kind, "value_type", None)
    is_chat = item is not None and types.is_struct(item) and _is_message({field.name for field in item})
    return Kind.CHAT if is_chat else Kind.NESTED


def _is_message(names: Iterable[str]) -> bool:
    return any(keys <= set(names) for keys in _MESSAGE)


def sample(rows: Iterable[Mapping[str, Any]], wanted: str) -> dict[str, Kind]:
    """The kinds of the columns in the first rows, or in fewer that already show text in the column `wanted`."""
    columns: dict[str, Kind] = {}
    characters = 0
    for number, row in enumerate(rows, 1):
        merge(columns, {name: kind_of(value) for name, value in row.items()})
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if columns.get(wanted, Kind.EMPTY) >= Kind.WORD or number == SAMPLE or characters > _CHARACTERS:
            break
    return columns


def merge(columns: dict[str, Kind], others: Mapping[str, Kind]) -> None:
    """Add what other rows or files say of the columns."""
    for name, kind in others.items():
        columns[name] = max(kind, columns.get(name, Kind.EMPTY))


def choose_column(columns: Mapping[str, Kind], requested: str | None, source: str) -> str:
    """The text column: the requested one, or "text", or the only column of strings if they are not single words.

    columns: the kinds of the columns.
    source: for messages, as in "the dataset 'x'".
    Raises UserError, which lists the columns, if there is no such column or it does not hold text.
    """
    names = listed(columns)
    wanted = TEXT if requested is None else requested
    if columns.get(wanted) == Kind.CHAT:
        raise UserError(_chat(wanted, source))
    if requested is not None and requested not in columns:
        raise UserError(f"no column {requested!r} in {source}: the columns are {names}")
    if requested is not None and not columns[requested].is_text:
        raise UserError(f"the column {requested!r} of {source} does not hold text: the columns are {names}")
    if wanted in columns and columns[wanted].is_text:
        return wanted
    for name, kind in columns.items():
        if kind == Kind.CHAT:
            raise UserError(_chat(name, source))
    strings = [name for name, kind in columns.items() if kind in (Kind.WORD, Kind.TEXT)]
    if not any(kind.is_text for kind in columns.values()):
        raise UserError(f"no column of {source} holds text, one string a row: the columns are {names}")
    if len(strings) != 1 or columns[strings[0]] != Kind.TEXT:
        raise UserError(f"cannot tell which column of {source} holds the text: name one of {names}")
    return strings[0]


def _chat(name: str, source: str) -> str:
    return (
        f"the column {name!r} of {source} holds chats, lists of messages, which cannot be read: write the text of each "
        "chat into a column of strings"
    )


def guess(column: str, source: str) -> str:
    """What the user is told of a column that was neither named nor is called "text"."""
    return f"reading the column {column!r} of {source}, the only one of text; to read another, name it"


def listed(columns: Mapping[str, Kind]) -> str:
    """The names, on one line; of very many the first."""
    shown = [name if name.isprintable() else repr(name) for name in list(columns)[:_SHOWN]]
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return (", ".join(shown) or "none") + more
