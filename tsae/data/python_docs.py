"""The documentation and source code of the Python installation: text that needs no download."""

from __future__ import annotations

import ast
import logging
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import decode_source
from pathlib import Path

from tsae.data.documents import Document, cut, shuffle
from tsae.errors import UserError, reason
from tsae.utils.notices import warn_once

log = logging.getLogger(__name__)

_EXCLUDED = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test", "idlelib", "lib2to3"),
    "encodings",  # tables
    "pydoc_data",  # read as topics of the language reference
}
_SOURCE_EPOCHS = 3  # epochs to cover all source code, of which there is about three times as much as documentation
_SHUFFLE_BUFFER = 500  # passages; the modules are shuffled too
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Unit:
    """A library module or a topic of the language reference; the split keeps all of it on one side."""

    name: str
    text: str
    is_module: bool


@lru_cache(maxsize=1)
def units() -> tuple[Unit, ...]:
    """All modules (about 9 MB, not yet parsed) and topics, in a fixed order. Raises UserError if there are none."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(n for n in subfolders if n not in _EXCLUDED and not n.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                try:
                    text = decode_source(path.read_bytes())  # in the encoding that it declares
                except (OSError, SyntaxError, UnicodeDecodeError) as error:
                    warn_once(log, f"ignored {str(path)!r}, because it cannot be read: {reason(error)}")
                    continue
                found.append(Unit(path.relative_to(root).as_posix(), text, is_module=True))
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a separate package in some distributions
        topics = {}  # type: ignore[misc]  # declared final
    found += [Unit(name, text, is_module=False) for name, text in sorted(topics.items())]
    found = [unit for unit in found if unit.text.strip()]
    if not found:
        raise UserError(f"this Python installation has no library source in {str(root)!r}: name another text")
    return tuple(found)


def documents(chosen: Sequence[Unit], rng: random.Random, epoch: int) -> Iterator[Document]:
    """Passages of documentation and of source code, about equal amounts, in random order.

    An epoch has all of the documentation and a third of the source; three epochs have all of it. Modules are parsed
    as they are reached, so that the first passage comes quickly.
    """
    order = list(chosen)
    rng.shuffle(order)

    def passages() -> Iterator[Document]:
        for unit in order:
            documentation, source = _passages(unit)
            turn = (epoch + len(unit.text)) % _SOURCE_EPOCHS  # spreads short modules over the epochs
            yield from documentation
            yield from source[turn::_SOURCE_EPOCHS]

    return shuffle(passages(), rng, _SHUFFLE_BUFFER)


@cache
def _passages(unit: Unit) -> tuple[list[Document], list[Document]]:
    """The documentation and the source code of a unit, cut to passages."""
    documentation, source = _split_docstrings(unit) if unit.is_module else (unit.text, "")
    return _cut(unit.name + " (documentation)", documentation), _cut(unit.name, source)


def _cut(name: str, text: str) -> list[Document]:
    pieces = (piece.strip("\n") for piece in cut([text]))
    return [Document(f"{name}#{i}", piece) for i, piece in enumerate(pieces) if piece and not piece.isspace()]


def _split_docstrings(unit: Unit) -> tuple[str, str]:
    """The docstrings of a module, each under its object's name, and its source code without them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in library code
            tree = ast.parse(unit.text)
    except (SyntaxError, ValueError, RecursionError):
        return "", unit.text
    lines: list[str | None] = [*unit.text.split("\n")]
    entries = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
        if docstring := ast.get_docstring(node):
            entries.append(f"{name}\n{'-' * len(name)}\n\n{docstring}\n\n")
            statement = node.body[0]
            if len(node.body) > 1 or isinstance(node, ast.Module):  # a docstring that is the only statement stays
                first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
                lines[first:last] = [None] * (last - first)
        for child in node.body:
            if isinstance(child, _DOCUMENTED):
                visit(child, f"{name}.{child.name}")

    visit(tree, unit.name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return "".join(entries), "\n".join(line for line in lines if line is not None)
