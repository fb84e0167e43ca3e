"""The error that users see as one sentence, and quoting other libraries' errors in it."""

from __future__ import annotations

import re

_STATUS = re.compile(r"\d+ \w+ Error\b.{0,99}$")


class UserError(ValueError):
    """Bad input. The message is one sentence: what was wrong, the value, what to do instead.

    Commands print it without a traceback and exit with status 2.
    """

    on_all_ranks = False
    """With several processes, whether all of them raise it."""


def reason(error: BaseException) -> str:
    """Another library's message for quotation in a sentence: its first line without the final period.

    A leading bare HTTP status, as in the hub client's messages, is skipped. Without a message: the exception's name.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not _STATUS.match(line)] or lines
    return (said[0] if said else type(error).__name__).rstrip(".")
