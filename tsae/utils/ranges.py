"""Ranges of numbers, declared in the annotations of dataclass fields, and the check of all fields."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from tsae.errors import UserError


@dataclass(frozen=True)
class Range:
    """Values a field may have, for its annotation: ``Annotated[int, at_least(1)]``.

    ``text`` completes "it must be ...". For a tuple the range holds for every number in it; None is always allowed.
    """

    text: str
    contains: Callable[[float], bool]


def at_least(low: int) -> Range:
    """``low`` or more."""
    return Range(f"at least {low}", lambda value: value >= low)


def between(low: int, high: int) -> Range:
    """From ``low`` to ``high``, both included."""
    return Range(f"from {low} to {high}", lambda value: low <= value <= high)


positive = Range("positive", lambda value: value > 0)


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise `UserError` for the first number that is not finite or is outside its field's range.

    config: a dataclass; dataclasses in its fields are checked too
    prefix: precedes the field names in the message
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
            continue
        ranges = [part for part in getattr(hints[field.name], "__metadata__", ()) if isinstance(part, Range)]
        for number in _numbers(value):
            if not isinstance(number, Integral) and not math.isfinite(number):
                raise UserError(f"{name} is {number}; it must be a finite number.")
            for allowed in ranges:
                if not allowed.contains(number):
                    raise UserError(
                        f"{name} is {value}; {'each' if value is not number else 'it'} must be {allowed.text}."
                    )


def _numbers(value: Any) -> Iterator[Any]:
    """A number itself, or the numbers in nested tuples and lists."""
    if isinstance(value, (tuple, list)):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, Real):  # of numpy too
        yield value
