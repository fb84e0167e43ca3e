"""Nested dictionaries as flat ones."""

from __future__ import annotations

from typing import Any


def flatten(values: dict[Any, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """The values that are not dictionaries, by the joined keys that lead to them: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, separator, name + separator) if isinstance(value, dict) else {name: value}
    return flat
