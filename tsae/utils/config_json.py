"""Dataclasses as JSON: nested dictionaries and back, with errors that name the field."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from tsae.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries that JSON can hold (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """The inverse of `to_dict`; missing fields take their defaults.

    where: dotted name of ``values``, for messages
    Raises UserError, naming it, for an unknown field or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"The configuration's '{where or 'top level'}' is {values!r}; it must be an object.")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            raise UserError(f"The configuration has an unknown field {path!r}; {cls.__name__} has {sorted(known)}.")
        arguments[key] = convert(hints[key], value, path)
    return cls(**arguments)


def convert(hint: Any, value: Any, path: str) -> Any:
    """``value``, from JSON, as the type ``hint``; raises UserError naming ``path`` if it does not fit."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"The configuration's '{path}' is {value!r}; it must be one of {list(args)}.")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return convert(next(a for a in args if a is not type(None)), value, path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"The configuration's '{path}' is {value!r}; it must be a list.")
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise UserError(f"The configuration's '{path}' is {value!r}; it must have {len(args)} entries.")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(convert(h, v, path) for h, v in zip(inner, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"The configuration's '{path}' is too large a number.") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"The configuration's '{path}' is {value!r}; it must be of type {hint.__name__}.")
    return value


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises UserError, naming the file, if it is missing or invalid."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}; name an existing JSON file.") from None
    except (ValueError, RecursionError, OSError) as error:  # ValueError also for a number with too many digits
        raise UserError(f"{path} cannot be read as JSON ({error}); name a valid JSON file.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not a JSON object; name a configuration file.")
    return values
