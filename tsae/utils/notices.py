"""Sentences for the user that are written once, however often their cause is met."""

from __future__ import annotations

import logging
from functools import cache


@cache
def warn_once(logger: logging.Logger, sentence: str) -> None:
    """Log a warning, unless this process has logged the same sentence before.

    Commands configure no handlers: Python then writes warnings to stderr.
    """
    logger.warning("%s", sentence)
