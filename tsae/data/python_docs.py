"""The documentation and source text of the Python installation: text that needs no download."""

from __future__ import annotations

import ast
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from tsae.data.passages import Document, cut, shuffled
from tsae.errors import UserError

_LEFT_OUT = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test", "idlelib", "lib2to3"),
    "encodings",  # tables
    "pydoc_data",  # read as documentation, not as source
}
_SOURCE_EPOCHS = 3  # there is about three times as much source as documentation, so an epoch takes a third of it
_POOL = 500  # passages among which the order is shuffled, beside the shuffled files
_HEADED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Unit:
    """What the split keeps together: a library module or a topic of the language reference."""

    name: str
    text: str
    is_module: bool


@lru_cache(maxsize=1)
def units() -> tuple[Unit, ...]:
    """All modules and topics, in a fixed order. Modules are read (about 9 MB in all) but not parsed.

    Raises UserError if this Python has neither.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(n for n in subfolders if n not in _LEFT_OUT and not n.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                text = path.read_text(encoding="utf-8", errors="replace")
                found.append(Unit(path.relative_to(root).as_posix(), text, is_module=True))
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        topics = {}
    found += [Unit(name, text, is_module=False) for name, text in sorted(topics.items())]
    found = [unit for unit in found if unit.text.strip()]
    if not found:
        raise UserError(f"this Python installation has no library source in {str(root)!r}: name another text")
    return tuple(found)


def documents(chosen: Sequence[Unit], rng: random.Random, epoch: int) -> Iterator[Document]:
    """Passages of documentation and of source, about as much of each, in an order drawn from `rng`.

    Modules are parsed when their turn comes, so the first passage does not wait for all of them. An epoch has
    all of the documentation and a third of the source: three epochs have all of it.
    """
    order = list(chosen)
    rng.shuffle(order)

    def passages() -> Iterator[Document]:
        for unit in order:
            documentation, source = _passages(unit)
            turn = (epoch + len(unit.text)) % _SOURCE_EPOCHS  # else every short module came in epoch 0
            yield from documentation
            yield from source[turn::_SOURCE_EPOCHS]

    return shuffled(passages(), rng, _POOL)


@cache
def _passages(unit: Unit) -> tuple[list[Document], list[Document]]:
    """The documentation and the source of a unit, cut to passages."""
    documentation, source = _separate(unit) if unit.is_module else (unit.text, "")
    return _cut(unit.name + " (documentation)", documentation), _cut(unit.name, source)


def _cut(name: str, text: str) -> list[Document]:
    pieces = (piece.strip("\n") for piece in cut([text]))
    return [Document(f"{name}#{i}", piece) for i, piece in enumerate(pieces) if piece and not piece.isspace()]


def _separate(unit: Unit) -> tuple[str, str]:
    """The docstrings of a module, each under its object's name, and its source without them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(unit.text)
    except (SyntaxError, ValueError, RecursionError):
        return "", unit.text
    lines: list[str | None] = unit.text.split("\n")
    entries = []

    def visit(node: ast.AST, name: str) -> None:
        if docstring := ast.get_docstring(node):
            entries.append(f"{name}\n{'-' * len(name)}\n\n{docstring}\n\n")
            at = node.body[0]
            if len(node.body) > 1 or isinstance(node, ast.Module):  # a body of nothing else keeps it
                lines[at.lineno - 1 : at.end_lineno] = [None] * (at.end_lineno - at.lineno + 1)
        for child in node.body:
            if isinstance(child, _HEADED):
                visit(child, f"{name}.{child.name}")

    visit(tree, unit.name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return "".join(entries), "\n".join(line for line in lines if line is not None)
