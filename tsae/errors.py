"""The one error type that reaches a user as a sentence, and what it quotes of others."""

from __future__ import annotations

import re

_STATUS = re.compile(r"\d+ \w+ Error\b.{0,99}$")


class UserError(ValueError):
    """Bad input. The message is one sentence: what was wrong, what it was, what to do instead.

    The command-line entry points print it without a traceback and exit with status 2.
    """

    on_all_ranks = False
    """With several processes, whether all of them raise it."""


def reason(error: BaseException) -> str:
    """What another library's exception says, to be quoted in a sentence: its first line, without a full stop.

    A bare HTTP status, with which the hub's client begins, is passed over; an exception without words gives its name.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not _STATUS.match(line)] or lines
    return (said[0] if said else type(error).__name__).rstrip(".")
