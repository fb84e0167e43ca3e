"""The one error type that reaches a user as a sentence."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """Bad input. The message is one sentence: what was wrong, what it was, what to do instead.

    The command-line entry points print it without a traceback and exit with status 2.
    """

    agreed = False
    """Of several processes, whether all raise it."""
