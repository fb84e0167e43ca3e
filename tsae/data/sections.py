"""Sections of a text that span several documents: a module, an article, a file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tsae.config import TextConfig
from tsae.data import python_docs
from tsae.data.documents import Document
from tsae.data.folders import TXT, has_suffix
from tsae.data.mixtures import parse_mixture
from tsae.data.text import PYTHON_DOCS, is_local
from tsae.data.text_files import TextFiles, read_files, source_files
from tsae.utils.paths import expanded

_DEFAULT = TextConfig()
_HEADING = re.compile(r"^[ \t]*= (?!=)(\S.*?) =[ \t]*$", re.MULTILINE)  # a title, not its subheadings `= = ... = =`


class Section(NamedTuple):
    """The section that a document belongs to."""

    name: str
    place: int
    """Position of the document in its file, ascending."""


def sections(source: str, documents: Iterable[Document], config: TextConfig = _DEFAULT) -> dict[str, Section]:
    """Document name -> section, for documents that lie in exactly one; empty unless there are at least two sections.

    source: the source of the documents, as for `tsae.data.text.open_text`; of several sources each counts
    config: how it was read

    "python-docs": a section is a module (docstrings and source code) or a topic of the language reference. Plain text
    files: it is the text below a title, a line `= Title =` as in WikiText; passages with text on both sides of a title
    belong to none. A file without titles is one section if there are other files. Rows (jsonl, parquet, the hub) have
    no sections.
    """
    names = {document.name for document in documents}
    found: dict[str, Section] = {}
    mixture = parse_mixture(source)
    for each, own in (
        [(source, config)] if mixture is None else [(m.data, m.config(config, hub=False)) for m in mixture]
    ):
        if each == PYTHON_DOCS:
            known = {unit.name for unit in python_docs.units()} if mixture else set()
            found |= {name: section for name in names if (section := _in_module(name, known)) is not None}
        elif is_local(each):
            paths = [path for path in source_files(expanded(each), own.split) if has_suffix(path, TXT)]
            found |= _in_files(paths, names)
    return found if len({section.name for section in found.values()}) > 1 else {}


def _in_module(name: str, known: set[str]) -> Section | None:
    """`zipfile.py (documentation)#3` belongs to `zipfile.py`. Names of other modules than `known`, if any, to none."""
    unit, _, place = name.rpartition("#")
    unit = unit.removesuffix(" (documentation)")
    return None if known and unit not in known else Section(unit, int(place))


def _in_files(paths: list[Path], names: set[str]) -> dict[str, Section]:
    found = {}
    for path in paths:
        title = str(path) if len(paths) > 1 else None
        for place, passage in enumerate(read_files(TextFiles([path]))):
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
    """The place distinguishes equal titles."""
    return f"{path}#{place}: {heading[1]}"
