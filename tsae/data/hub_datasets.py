"""Text from Hugging Face hub datasets, streamed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from tsae.config import TextConfig
from tsae.data.chats import parse_chat
from tsae.data.columns import TEXT, Kind, choose_column, guess, kinds_of_schema, lookup, lookup_arrow, sample
from tsae.data.documents import Document
from tsae.data.encodings import row_text
from tsae.errors import UserError, reason
from tsae.utils.hub import hub_is_reachable
from tsae.utils.notices import warn_once

log = logging.getLogger(__name__)

_GUESSED_ON = 100  # rows


class HubText(NamedTuple):
    """The documents of a dataset, and whether they are chats."""

    documents: Iterator[Document]
    chats: bool


def read_hub(source: str, config: TextConfig, *, seed: int, epoch: int) -> HubText:
    """The rows of a hub dataset, streamed and shuffled by seed and epoch through a buffer of rows.

    Raises UserError, before the first row is requested, if the dataset, subset, split or column does not exist or the
    hub cannot be reached.
    """
    if not hub_is_reachable():
        raise UserError(
            f"cannot stream the dataset {source!r} because the Hugging Face hub cannot be reached: "
            'connect to the network, or use a local file or folder, or "python-docs"'
        )
    import datasets

    try:
        rows = datasets.load_dataset(source, name=config.subset, split=config.split, streaming=True)
        columns = _columns(rows, config.column or TEXT)
    except Exception as error:  # `datasets` passes on whatever its readers and HTTP client raise
        raise UserError(
            f"cannot open the dataset {source!r} (subset {config.subset!r}, split {config.split!r}): {reason(error)}"
        ) from error
    name = choose_column(columns, config.column, f"the dataset {source!r}")
    if name not in (config.column, TEXT):
        warn_once(log, guess(name, columns[name], f"the dataset {source!r}"))
    if rows.features is None:
        rows = rows.map(partial(_only, name))
    else:
        outer, _ = lookup_arrow(rows.features.arrow_schema, name) or (name, None)
        rows = rows.select_columns([outer])
    rows = rows.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
    rows.set_epoch(epoch)
    chats = columns[name] == Kind.CHAT
    return HubText(_documents(rows, name, source, chats=chats), chats)


def hub_holds_chats(source: str, config: TextConfig) -> bool:
    """Whether the documents of a dataset are chats. Raises as `read_hub` does."""
    return read_hub(source, config, seed=0, epoch=0).chats


def _columns(rows: Any, wanted: str) -> dict[str, Kind]:
    """The kinds of a dataset's columns: from their types, and from the first rows if there is none called `wanted`."""
    if rows.features is None:
        return sample(rows, wanted)
    columns = kinds_of_schema(rows.features.arrow_schema, wanted)
    strings = [name for name, kind in columns.items() if kind == Kind.TEXT]
    if wanted not in columns and strings:  # perhaps ids or blank
        columns |= sample(islice(rows.select_columns(strings), _GUESSED_ON), wanted)
    return columns


def _only(column: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with None in all other columns; rows of a dataset without declared columns may lack this one."""
    return dict.fromkeys(row) | {column: lookup(row, column)[1]}


def _documents(rows: Iterable[dict[str, Any]], column: str, source: str, *, chats: bool) -> Iterator[Document]:
    """The rows as documents; an error of `datasets` on the way as UserError."""
    remaining = enumerate(rows)
    while True:
        try:
            number, row = next(remaining)
        except StopIteration:
            return
        except Exception as error:  # a lost connection, a truncated file, rows of another type, ...
            raise UserError(f"cannot read on in the dataset {source!r}: {reason(error)}") from error
        text = lookup(row, column)[1]
        if chats:
            chat = parse_chat(text, f"row {number} of the dataset {source!r}")
            yield Document(f"{source}#{number}", "" if chat is None else chat.text, chat)
            continue
        if text is not None and not isinstance(text, str):
            raise UserError(f"row {number} of the dataset {source!r}: the column {column!r} does not hold text")
        yield Document(f"{source}#{number}", row_text(text or "", f"the dataset {source!r}"))
