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

__all__ = ["Status", "parse", "report_errors"]

T = TypeVar("T")


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
        lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in captured.getvalue().splitlines()]
        text = " ".join(line for line in lines if line)
        text = re.sub(r"\s+", " ", re.sub(r"(Parsing|Value) error |Invalid choice (?=invalid)", "", text))
        text = re.sub(r"^(Unrecognized options) \1", r"\1", text)
        text = re.split("For full helptext|Argument helptext|Perhaps you meant", text)[0].strip().rstrip(".")
        raise UserError(f"{text}; see {prog} --help." if text else f"Bad options; see {prog} --help.") from None


@contextlib.contextmanager
def report_errors() -> Iterator[Status]:
    """Turns a `UserError` into its sentence on stderr and status 2, an interruption into status 130."""
    status = Status()
    try:
        yield status
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        status.code = 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; continue with --resume and the run's directory\n")
        status.code = 130
