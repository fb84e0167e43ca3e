"""Paths as users write them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TypeVar

from tsae.errors import UserError

T = TypeVar("T")


def expanded(path: str | Path) -> Path:
    """The path with a leading `~` or `~name` replaced by that home directory; shells leave it in `--out=~/x`.

    Raises:
        UserError: there is no such home directory.
    """
    path = Path(path)
    first = path.parts[0] if path.parts else ""
    if first == "~" and not os.environ.get("HOME", "none"):
        raise _no_home(path, first)
    try:
        return path.expanduser()
    except (RuntimeError, KeyError):
        raise _no_home(path, first) from None


def _no_home(path: Path, first: str) -> UserError:
    if first == "~":
        return UserError(f"{path} cannot be found, since HOME is not set to a folder; set it, or write the whole path.")
    return UserError(f"{path} cannot be found, since there is no user {first[1:]!r}; write the whole path.")


def check_unicode(path: Path) -> None:
    """Raise `UserError` if a path is not Unicode: safetensors writes such files and cannot read them."""
    try:
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{path} has a name that is not UTF-8, which safetensors cannot read; name another.") from None


def with_expanded_paths(values: T) -> T:
    """A dataclass with every `Path` in it, also in tuples and nested dataclasses, `expanded`."""
    fields = dataclasses.fields(values)  # type: ignore[arg-type]
    changes = {field.name: _expand(getattr(values, field.name)) for field in fields}
    return dataclasses.replace(values, **changes)  # type: ignore[type-var]


def _expand(value: object) -> object:
    if isinstance(value, Path):
        return expanded(value)
    if isinstance(value, tuple):
        return tuple(_expand(part) for part in value)
    return with_expanded_paths(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
