"""The larger unit that a document is a part of, where the text knows one: a module, an article, a file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tsae.data.files import find_files, read_files
from tsae.data.passages import Document
from tsae.data.text import PYTHON_DOCS

_HEADING = re.compile(r"^[ \t]*= (?!=)(\S.*?) =[ \t]*$", re.MULTILINE)  # a title, not the `= = parts = =` below it
_TXT = (".txt", ".txt.gz", ".txt.zst")


class Section(NamedTuple):
    """Where a document stands."""

    name: str
    place: int
    """Its place among the documents of its file, ascending in the text."""


def sections(source: str, documents: Iterable[Document]) -> dict[str, Section]:
    """The section of every document that is in just one, by the document's name; empty if the source knows none.

    source:    as `tsae.data.text.open_text` takes it, which gave the documents

    "python-docs": the module, its docstrings and its source together, or the topic of the language reference. Files
    of plain text: what stands below the last title, a line `= Title =` as in WikiText, before the passage; passages
    with text on both sides of a title are in no section. A file without titles is a section if there are other files.
    Rows of tables (jsonl, parquet, the hub) stand alone: no sections.
    """
    names = {document.name for document in documents}
    if source == PYTHON_DOCS:
        found = {name: _in_module(name) for name in names}
    elif Path(source).expanduser().exists():
        paths = [path for path in find_files(Path(source).expanduser()) if path.name.endswith(_TXT)]
        found = _in_files(paths, names)
    else:
        found = {}
    return found if len({section.name for section in found.values()}) > 1 else {}


def _in_module(name: str) -> Section:
    """`zipfile.py (documentation)#3` is of `zipfile.py`."""
    unit, _, place = name.rpartition("#")
    return Section(unit.removesuffix(" (documentation)"), int(place))


def _in_files(paths: list[Path], names: set[str]) -> dict[str, Section]:
    found = {}
    for path in paths:
        title = str(path) if len(paths) > 1 else None
        for place, passage in enumerate(read_files([path], None)):
            headings = list(_HEADING.finditer(passage.text))
            begins = bool(headings) and not passage.text[: headings[0].start()].strip()
            if begins:
                title = _title(path, place, headings[0])
            if title is not None and len(headings) == begins and passage.name in names:
                found[passage.name] = Section(title, place)
            if headings:
                title = _title(path, place, headings[-1])
    return found


def _title(path: Path, place: int, heading: re.Match[str]) -> str:
    """Titles may come twice; the place tells them apart."""
    return f"{path}#{place}: {heading[1]}"
