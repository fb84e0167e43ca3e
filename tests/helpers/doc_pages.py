"""Parse README.md, CONTRIBUTING.md and docs/: fenced blocks, and the commands of a shell block."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

LANGUAGES = (
    "python",
    "bash",
    "yaml",
    "json",
    "text",
)  # others are an error: a typo would hide a block
_FENCE = re.compile(r"^ *```(\S*)\s*$")
_NOT_RUN = re.compile(r"^<!-- not run: (\S.*?) -->$")
_SHELL = {"|", "||", "&&", ";", "for", "do", "done", "if", ">", "<"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Line number of its first line of code, from 1."""
    language: str
    code: str
    not_run: str | None
    """The reason in a preceding `<!-- not run: reason -->`."""

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks, in order.

    Raises:
        ValueError: unknown language, or a block without an end.
    """
    found, code, before = [], [], ""
    language: str | None = None
    start = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if language is not None:
            if fence is None:
                code.append(line)
                continue
            marker = _NOT_RUN.match(before)
            found.append(Block(page, start, language, "\n".join(code) + "\n", marker and marker[1]))
            language, code, before = None, [], ""
        elif fence is not None:
            if fence[1] not in LANGUAGES:
                raise ValueError(f"{name(page)}:{number}: a block of {fence[1] or 'no language'!r}, not of {LANGUAGES}")
            language, start = fence[1], number + 1
        elif line.strip():
            before = line.strip()
    if language is not None:
        raise ValueError(f"{name(page)}:{start - 1}: the block does not end")
    return found


def commands(code: str) -> list[list[str]]:
    """The words of each command, without comments, leading `NAME=value` and a trailing `&`.

    Raises:
        ValueError: shell syntax beyond one command per line.
    """
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words[-1:] == ["&"]:
            words = words[:-1]
        if _SHELL & set(words):
            raise ValueError(f"more shell than the tests read: {line}")
        if words:
            found.append(words)
    return found


def module_call(words: list[str]) -> tuple[str, list[str]] | None:
    """The module and the arguments of `python -m tsae...` or `torchrun ... -m tsae...`; None for other commands."""
    if words[:1] == ["torchrun"] and "-m" in words:
        words = ["python", *words[words.index("-m") :]]
    if words[:2] == ["python", "-m"] and len(words) > 2 and re.match(r"tsae\b|tsae_", words[2]):
        return words[2], words[3:]
    return None
