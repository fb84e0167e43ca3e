"""The error that users see as one sentence, and quoting other libraries' errors in it."""

from __future__ import annotations

import errno
import re
from pathlib import Path

_STATUS = re.compile(r"\d+ \w+ Error\b.{0,99}$")


class UserError(ValueError):
    """Bad input. The message is one sentence: what was wrong, the value, what to do instead.

    Commands print it without a traceback and exit with status 2.
    """

    on_all_ranks = False
    """With several processes, whether all of them raise it."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence, without the frames that it came through."""
        return [f"{type(self).__name__}: {self}"]


class WriteError(UserError):
    """A file could not be written, for example on a full disk.

    path: the file
    reason: the message of the operating system
    number: its error number, which decides about the advice; or give the advice
    """

    def __init__(self, path: Path, reason: str, number: int | None = None, *, advice: str | None = None) -> None:
        if advice is None:
            full = number in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "make room there" if full else "see that it can be written to"
            advice += ", and start or resume again"
        super().__init__(f"{path} cannot be written ({reason}); what was complete is kept: {advice}.")
        self.path, self.reason = path, reason


def reason(error: BaseException) -> str:
    """Another library's message for quotation in a sentence: its first line without the final period.

    A leading bare HTTP status, as in the hub client's messages, is skipped. Without a message: the exception's name.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not _STATUS.match(line)] or lines
    return (said[0] if said else type(error).__name__).rstrip(".")
