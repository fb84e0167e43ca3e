"""What the command lines share: parsing into dataclasses, and errors as one sentence."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import tyro

from tsae.errors import UserError
from tsae.interrupts import Interrupted, at_once
from tsae.parallel.environment import is_first

__all__ = ["Status", "only_options", "parse", "report_errors"]

T = TypeVar("T")
DEFAULT_ADVICE = "; continue with --resume and the run's directory"


@dataclass
class Status:
    """Exit status of a command."""

    code: int = 0


def parse(cls: type[T], argv: list[str], default: T | None, prog: str) -> T:
    """Parse ``argv`` into the dataclass ``cls``; ``--help`` prints and exits.

    Raises:
        UserError: an unknown option or a value of the wrong type, in tyro's words on one line.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(cls, args=argv, default=default, prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = _sentence(captured.getvalue())
        raise UserError(f"{text}; see {prog} --help." if text else f"Bad options; see {prog} --help.") from None


def _sentence(box: str) -> str:
    """What tyro says in the first part of its box: below the title, above the first rule that is not the title's."""
    lines = [re.sub(r"^│ ?|│$", "", line).strip() for line in box.splitlines()]
    lines = [line for line in lines if line][1:]
    is_rule = [re.fullmatch(r"[╰╯─-]+", line) is not None for line in lines]
    if is_rule[:1] == [True]:  # in ASCII the title has one of its own
        lines, is_rule = lines[1:], is_rule[1:]
    text = " ".join(lines[: is_rule.index(True)] if True in is_rule else lines).rstrip(".")
    return re.sub(r"\. Expected ", "; expected ", text[:1].upper() + text[1:])


def only_options(argv: list[str], allowed: tuple[str, ...], why: str) -> None:
    """Raise `UserError`, a sentence that begins with ``why``, if ``argv`` has other options than those ``allowed``."""
    others = [a for a in argv if a.startswith("-") and a.split("=")[0] not in allowed]
    if others:
        raise UserError(f"{why}; leave out {' '.join(others)}.")


@contextlib.contextmanager
def report_errors() -> Iterator[Status]:
    """Turns a `UserError` into its sentence on stderr and status 2, an interruption into status 130 or 143.

    Of several processes, which torchrun starts, only the first says it.
    """
    status = Status()
    try:
        with at_once():
            yield status
    except UserError as error:
        if is_first():
            sys.stderr.write(f"error: {error}\n")
        status.code = 2
    except KeyboardInterrupt as error:
        advice = error.advice if isinstance(error, Interrupted) else ""
        if is_first():
            sys.stderr.write(f"interrupted{advice or DEFAULT_ADVICE}\n")
        status.code = error.status if isinstance(error, Interrupted) else 130
