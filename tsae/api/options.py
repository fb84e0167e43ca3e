"""Options as keywords: nested dictionaries or dataclasses over a configuration, checked by name and type."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import typing
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from tsae.errors import UserError
from tsae.utils.config_json import convert

T = TypeVar("T")


def override(base: T, options: Mapping[str, Any]) -> T:
    """A copy of a dataclass with other values.

    options: by name; a nested dataclass takes a dictionary of its options, or a dataclass of its type, which replaces
        it. Dotted names reach into it: ``{"sae.d_sae": 64}`` is ``{"sae": {"d_sae": 64}}``. Aliases of the command line
        hold too (``objective="slow"``).

    Raises:
        UserError: an unknown option, with the nearest one, or a value of another type.
    """
    changed: T = _override(base, _nested(options, aliases(type(base))), "", _names(type(base)))
    return changed


def _override(base: Any, options: Mapping[str, Any], where: str, known: list[str]) -> Any:
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for name, value in options.items():
        path = where + name
        if name not in hints:
            raise UserError(f"There is no option {path!r}; the nearest is {nearest(path, known)}.")
        current = getattr(base, name)
        if not dataclasses.is_dataclass(current):
            changes[name] = convert(hints[name], _plain(value, hints[name]), path)
        elif isinstance(value, type(current)):
            changes[name] = value
        elif isinstance(value, Mapping):
            changes[name] = _override(current, value, f"{path}.", known)
        else:
            raise UserError(f"{path} is {value!r}; give a dictionary of its options, or a {type(current).__name__}.")
    return dataclasses.replace(base, **changes)


def _nested(options: Mapping[str, Any], alias: Mapping[str, str]) -> dict[str, Any]:
    """Dotted names and aliases as nested dictionaries."""
    nested: dict[str, Any] = {}
    for name, value in options.items():
        if name in alias and not isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
            name = alias[name]
        head, _, rest = name.partition(".")
        if not rest and not isinstance(value, Mapping):
            nested[head] = value
            continue
        part = _nested({rest: value} if rest else value, {})
        if not isinstance(nested.setdefault(head, {}), dict):
            raise UserError(f"{head} is given twice; give it once.")
        nested[head] |= part
    return nested


def aliases(cls: type) -> dict[str, str]:
    """Further names of options, as on the command line: {"objective": "objective.temporal"}."""
    found: dict[str, str] = {}
    for path, annotation in _annotations(cls):
        for part in getattr(annotation, "__metadata__", ()):
            found |= {alias.lstrip("-").replace("-", "_"): path for alias in getattr(part, "aliases", None) or ()}
    return found


def _annotations(cls: type, where: str = "") -> Iterable[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _annotations(hint, f"{where}{name}.")  # type: ignore[arg-type]
        else:
            yield where + name, hint


def _names(cls: type) -> list[str]:
    return [path for path, _ in _annotations(cls)]


def names(options: Mapping[str, Any]) -> list[str]:
    """The dotted names of the options given as in `override`; a dataclass gives all of its options."""
    found: list[str] = []
    for name, value in options.items():
        nested = vars(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        found += [f"{name}.{part}" for part in names(nested)] if isinstance(nested, Mapping) else [name]
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """The known option that is most like ``name``, as it is written: `'steps'`, or `sae={'d_sae': ...}`."""
    options = list(known)
    last = name.split(".")[-1]
    same = [option for option in options if option.split(".")[-1] == last or option.replace(".", "_") == name]
    by_last = {option.split(".")[-1]: option for option in reversed(options)}
    close = difflib.get_close_matches(name, options, 1, 0.75) or [
        by_last[found] for found in difflib.get_close_matches(last, by_last, 1, 0.0)
    ]
    *sections, option = (same or close)[0].split(".")
    return f"{sections[0]}={{{option!r}: ...}}" if sections else repr(option)


def _plain(value: Any, hint: Any) -> Any:
    """The value in the types of configurations: numbers of numpy, paths, devices and sets of other kinds."""
    wanted = {hint, *typing.get_args(hint)}
    if Path in wanted:
        return Path(value) if isinstance(value, (str, os.PathLike)) else value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if type(value).__name__ == "device" and str in wanted:  # of PyTorch
        return str(value)
    return value


def keywords(cls: type, without: Iterable[str] = ()) -> list[inspect.Parameter]:
    """The fields of a dataclass as keywords of a function's signature, with their defaults."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        default = field.default
        if default is dataclasses.MISSING:
            factory = field.default_factory
            default = inspect.Parameter.empty if factory is dataclasses.MISSING else factory()
        kind = inspect.Parameter.KEYWORD_ONLY
        found.append(inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name]))
    return found
