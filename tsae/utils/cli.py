"""Command lines: parsing into dataclasses, and errors as one sentence."""

from __future__ import annotations

import contextlib
import errno
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro

from tsae.errors import UserError, WriteError
from tsae.utils.interrupts import Interrupted, at_once
from tsae.utils.output import Tolerant, tolerant_streams
from tsae.utils.paths import with_expanded_paths
from tsae.utils.torchrun import is_rank0

T = TypeVar("T")
CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ESTALE),
)
RESUME = "; continue with --resume and the run's directory"  # advice of commands that have --resume


@dataclass
class Status:
    """Exit status of a command."""

    code: int = 0


def parse(cls: type[T], argv: list[str], default: T | None, prog: str) -> T:
    """Parse ``argv`` into the dataclass ``cls``, its paths `expanded`; ``--help`` prints and exits.

    Raises:
        UserError: an unknown option or a value of the wrong type, tyro's message on one line; or a path in a home
            directory that does not exist.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            parsed: T = tyro.cli(cls, args=argv, default=cast(T, default), prog=prog)
            return with_expanded_paths(parsed)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = _sentence(captured.getvalue())
        raise UserError(f"{text}; see {prog} --help." if text else f"Bad options; see {prog} --help.") from None


def _sentence(box: str) -> str:
    """The first part of tyro's error box: below the title, above the first rule that is not the title's."""
    lines = [re.sub(r"^│ ?|│$", "", line).strip() for line in box.splitlines()]
    lines = [line for line in lines if line][1:]
    is_rule = [re.fullmatch(r"[╰╯─-]+", line) is not None for line in lines]
    if is_rule[:1] == [True]:  # in ASCII the title has a rule
        lines, is_rule = lines[1:], is_rule[1:]
    text = " ".join(lines[: is_rule.index(True)] if True in is_rule else lines).rstrip(".")
    return re.sub(r"\. Expected ", "; expected ", text[:1].upper() + text[1:])


def given_options(argv: Sequence[str]) -> list[str]:
    """The dotted names of the options in a command line: ``--sae.d-sae=64`` is "sae.d_sae"."""
    words = (word.split("=")[0] for word in argv if word.startswith("-"))
    return [word.removeprefix("--").replace("-", "_") if word.startswith("--") else word for word in words]


def only_options(given: Iterable[str], allowed: Iterable[str], why: str) -> None:
    """Raise `UserError`, a sentence that begins with ``why``, if options other than ``allowed`` are given.

    given, allowed: dotted names
    """
    others = [name for name in given if name not in tuple(allowed)]
    if others:
        named = (name if name.startswith("-") else f"--{name.replace('_', '-')}" for name in others)
        raise UserError(f"{why}; leave out {' '.join(named)}.")


def check_counts(**options: int | None) -> None:
    """Raise `UserError` naming the first option below 1; None is an option that was not given."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


def deliver(*writes: Callable[[], Any], show: Callable[..., None]) -> None:
    """Call all of ``writes``, and then ``show`` with what they returned: a result is on disk before it is printed.

    A write that fails is shown as None. Its error (the first, if there are several) is raised after ``show``, so that
    metrics that cannot be written are still printed.

    Raises:
        WriteError: a file could not be written.
    """
    results, errors = [], []
    for write in writes:
        try:
            results.append(write())
        except WriteError as error:
            results.append(None)
            errors.append(error)
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            results.append(None)
            errors.append(WriteError(Path(error.filename or "A file"), error.strerror or str(error), error.errno))
    show(*results)
    if errors:
        raise errors[0]


@contextlib.contextmanager
def report_errors(advice: str = "") -> Iterator[Status]:
    """Turn a `UserError`, a full or failing disk, and lack of memory into a sentence on stderr and status 2, and an
    interruption into status 130 or 143. With several processes only rank 0 prints.

    stdout and stderr are `tsae.utils.output.Tolerant` within the block. That nobody reads them any more, as in
    ``| head``, changes neither what a command does nor its status; any other failure of stdout gives status 2.

    advice: printed after an interruption that has no advice
    """
    status = Status()
    with tolerant_streams() as out:
        try:
            with _sentences(status, advice):
                yield status
        except SystemExit:  # --help
            if _lost(out):
                raise SystemExit(2) from None
            raise
        if _lost(out):
            status.code = status.code or 2


def _lost(out: Tolerant) -> bool:
    """Whether what was printed got lost although somebody wants to read it, which is said on stderr."""
    out.flush()
    if out.failure is None or out.failure.errno == errno.EPIPE:
        return False
    why = out.failure.strerror or str(out.failure)
    sys.stderr.write(f"error: What is printed on stdout cannot be written ({why}); the files written are complete.\n")
    return True


@contextlib.contextmanager
def _sentences(status: Status, advice: str) -> Iterator[None]:
    try:
        with at_once():
            yield
    except UserError as error:
        if is_rank0():
            sys.stderr.write(f"error: {error}\n")
        status.code = 2
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.stderr.write(f"error: {error.strerror}{where}; what was complete is kept: start or resume again.\n")
        status.code = 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        sys.stderr.write("error: There is not enough memory; lower sae.d_sae, batch or buffer.sequences.\n")
        status.code = 2
    except KeyboardInterrupt as error:
        own = error.advice if isinstance(error, Interrupted) else ""
        if is_rank0():
            sys.stderr.write(f"interrupted{own or advice}\n")
        status.code = error.status if isinstance(error, Interrupted) else 130
