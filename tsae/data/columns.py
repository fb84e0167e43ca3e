"""Which column of a source of rows holds the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tsae.data.chats import COLUMNS, is_message
from tsae.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

TEXT = "text"
"""The column that is read without being named."""

SAMPLE = 1_000
"""Rows at the beginning of a source that decide about its columns."""

_CHARACTERS = 1 << 24  # of those rows, likewise
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

    @property
    def is_readable(self) -> bool:
        """Whether the column can be read, as text or as chats."""
        return self.is_text or self == Kind.CHAT


def kind_of(value: Any) -> Kind:
    """The kind of a value in JSON or of a row's dictionary."""
    if value is None:
        return Kind.EMPTY
    if isinstance(value, str):
        words = value.split()
        return Kind.EMPTY if not words else Kind.WORD if len(words) == 1 and value.isascii() else Kind.TEXT
    if isinstance(value, list) and any(isinstance(item, dict) and is_message(item) for item in value):
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
    is_chat = item is not None and types.is_struct(item) and is_message({field.name for field in item})
    return Kind.CHAT if is_chat else Kind.NESTED


def lookup(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Whether a row has the column, and its value: `a.b` is the value of b in the object a.

    A column that is spelled like this itself comes first.
    """
    if column in row:
        return True, row[column]
    for at in (at for at, character in enumerate(column) if character == "."):
        if isinstance(inner := row.get(column[:at]), Mapping):
            found, value = lookup(inner, column[at + 1 :])
            if found:
                return True, value
    return False, None


def lookup_arrow(schema: Iterable[pa.Field], column: str) -> tuple[str, pa.DataType] | None:
    """The column of an Arrow schema that holds `column`, as for `lookup`, and its type; None if there is none."""
    import pyarrow as pa

    types = {field.name: field.type for field in schema}
    if column in types:
        return column, types[column]
    for at in (at for at, character in enumerate(column) if character == "."):
        outer = types.get(column[:at])
        if outer is not None and pa.types.is_struct(outer):
            inner = lookup_arrow([outer.field(i) for i in range(outer.num_fields)], column[at + 1 :])
            if inner is not None:
                return column[:at], inner[1]
    return None


def kinds_of_schema(schema: pa.Schema, wanted: str) -> dict[str, Kind]:
    """The kinds of an Arrow table's columns, also of `wanted` if it lies in an object."""
    columns = {field.name: kind_of_arrow(field.type) for field in schema}
    if wanted not in columns and (found := lookup_arrow(schema, wanted)) is not None:
        columns[wanted] = kind_of_arrow(found[1])
    return columns


def sample(rows: Iterable[Mapping[str, Any]], wanted: str) -> dict[str, Kind]:
    """The kinds of the columns in the first rows, or in fewer that already show text in the column `wanted`.

    `wanted` is among them also if it lies in an object (see `lookup`).
    """
    columns: dict[str, Kind] = {}
    characters = 0
    for number, row in enumerate(rows, 1):
        merge(columns, {name: kind_of(value) for name, value in row.items()})
        found, inner = lookup(row, wanted) if wanted not in row else (False, None)
        if found:
            merge(columns, {wanted: kind_of(inner)})
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if columns.get(wanted, Kind.EMPTY) >= Kind.WORD or number == SAMPLE or characters > _CHARACTERS:
            break
    return columns


def merge(columns: dict[str, Kind], others: Mapping[str, Kind]) -> None:
    """Add what other rows or files say of the columns."""
    for name, kind in others.items():
        columns[name] = max(kind, columns.get(name, Kind.EMPTY))


def choose_column(columns: Mapping[str, Kind], requested: str | None, source: str) -> str:
    """The column to read: the requested one, or "text", or that of the chats, or the only one of strings.

    Chats are found in the column "messages" or "conversations"; strings must not be single words.

    columns: the kinds of the columns.
    source: for messages, as in "the dataset 'x'".
    Raises UserError, which lists the columns, if there is no such column or it holds neither text nor chats.
    """
    names = listed(columns)
    wanted = TEXT if requested is None else requested
    if requested is not None and requested not in columns:
        raise UserError(f"no column {requested!r} in {source}: the columns are {names}")
    if requested is not None and not columns[requested].is_readable:
        raise UserError(f"the column {requested!r} of {source} does not hold text: the columns are {names}")
    if wanted in columns and (requested is not None or columns[wanted].is_text):
        return wanted
    chats = [name for name, kind in columns.items() if kind == Kind.CHAT]
    if len(found := [name for name in chats if name in COLUMNS]) == 1 and wanted not in chats:
        return found[0]
    if chats:
        raise UserError(f"the column {chats[0]!r} of {source} holds chats: name it to read them, or one of {names}")
    strings = [name for name, kind in columns.items() if kind in (Kind.WORD, Kind.TEXT)]
    if not any(kind.is_text for kind in columns.values()):
        raise UserError(f"no column of {source} holds text, one string a row: the columns are {names}")
    if len(strings) != 1 or columns[strings[0]] != Kind.TEXT:
        raise UserError(f"cannot tell which column of {source} holds the text: name one of {names}")
    return strings[0]


def guess(column: str, kind: Kind, source: str) -> str:
    """What the user is told of a column that was neither named nor is called "text"."""
    if kind == Kind.CHAT:
        return f"reading the chats in the column {column!r} of {source}; to read another, name it"
    return f"reading the column {column!r} of {source}, the only one of text; to read another, name it"


def listed(columns: Mapping[str, Kind]) -> str:
    """The names, on one line; of very many the first."""
    shown = [name if name.isprintable() else repr(name) for name in list(columns)[:_SHOWN]]
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return (", ".join(shown) or "none") + more
