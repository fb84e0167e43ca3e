"""Labels of documents: another column of the rows that hold their text."""

from __future__ import annotations

from collections.abc import Iterable

from tsae.config import TextConfig
from tsae.data.columns import lookup
from tsae.data.documents import Document
from tsae.data.folders import TXT, has_suffix
from tsae.data.mixtures import parse_mixture
from tsae.data.rows import read_rows
from tsae.data.text import PYTHON_DOCS, is_local
from tsae.data.text_files import choose_files
from tsae.errors import UserError
from tsae.utils.paths import expanded

_DEFAULT = TextConfig()


def labels(source: str, documents: Iterable[Document], column: str, config: TextConfig = _DEFAULT) -> dict[str, str]:
    """Document name -> its value in a column, for documents that have one: text, a whole number or a truth value.

    source: the source of the documents, as for `tsae.data.text.open_text`; of several sources each counts
    config: how it was read

    Raises UserError if no row of the documents has the column, or if a value is something else.
    """
    # Pieces of a long row are called FILE#ROW.PIECE.
    names: dict[str, list[str]] = {}
    for document in documents:
        path, _, piece = document.name.rpartition("#")
        names.setdefault(f"{path}#{piece.partition('.')[0]}", []).append(document.name)
    mixture = parse_mixture(source)
    found: dict[str, str] = {}
    for each, own in (
        [(source, config)] if mixture is None else [(m.data, m.config(config, hub=False)) for m in mixture]
    ):
        if each == PYTHON_DOCS or not is_local(each):
            continue
        for file in choose_files(expanded(each), own.column, own.split).paths:
            if has_suffix(file, TXT):
                continue
            for number, row in read_rows(file, [column]):
                here = names.get(f"{file}#{number}", ())
                value = lookup(row, column)[1] if here else None
                if value is None or value == "":
                    continue
                if not isinstance(value, (str, int)):
                    raise UserError(
                        f"row {number} of {str(file)!r} has {value!r} in the column {column!r}, which is no label: "
                        "name a column of words or whole numbers"
                    )
                found |= dict.fromkeys(here, str(value))
    if not found:
        raise UserError(
            f"no document of {source!r} has a label in a column {column!r}: name a column of its .jsonl, .csv or "
            ".parquet files"
        )
    return found
