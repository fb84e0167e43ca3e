"""Configurations as JSON: to and from nested dictionaries, and whether a file still says what a run trained with."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.utils.atomic import checksum_of


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries that JSON can hold (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """The inverse of `to_dict`.

    Fields that `values` lacks keep their defaults; a field that `cls` lacks, or a value of the wrong type,
    raises `UserError` naming it.
    """
    if not isinstance(values, dict):
        raise UserError(f"The configuration's '{where or 'top level'}' is {values!r}; it must be an object.")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            raise UserError(f"The configuration has an unknown field '{path}'; {cls.__name__} has {sorted(known)}.")
        arguments[key] = _convert(hints[key], value, path)
    return cls(**arguments)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value`, from JSON, as the type `hint`; `UserError` names `path` where it does not fit."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"The configuration's '{path}' is {value!r}; it must be one of {list(args)}.")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"The configuration's '{path}' is {value!r}; it must be a list.")
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise UserError(f"The configuration's '{path}' is {value!r}; it must have {len(args)} entries.")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_convert(h, v, path) for h, v in zip(inner, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"The configuration's '{path}' is too large a number.") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"The configuration's '{path}' is {value!r}; it must be of type {hint.__name__}.")
    return value


# What may be edited in a run's config.json: where things lie, and what no result depends on.
_MOVABLE = ("model", "revision", "data", "device", "cache", "log", "checkpoint", "parallel")


def check_unchanged(config: TrainConfig, trained: dict[str, Any], path: Path) -> None:
    """Raise `UserError`, naming the difference, unless a run's config.json says what the run was trained with.

    trained: the configuration of that time, from `to_dict`; path: of the file that ``config`` was read from
    """
    there, then = _fixed(to_dict(config)), _fixed(trained)
    changed = ", ".join(
        f"{name} is {value!r} there and was {then.get(name)!r}"
        for name, value in there.items()
        if value != then.get(name)
    )
    if changed:
        raise UserError(f"{path} is not what the run was trained with: {changed}; put that back, or train again.")


def fingerprint(config: TrainConfig) -> str:
    """Of what may not be edited in a run's config.json once it has trained."""
    return checksum_of(_fixed(to_dict(config)))


def _fixed(values: dict[str, Any]) -> dict[str, Any]:
    return _flat({name: value for name, value in values.items() if name not in _MOVABLE})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by dotted name."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`; a missing or broken file raises `UserError` naming it."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}; name an existing JSON file.") from None
    except (ValueError, RecursionError, OSError) as error:  # a number may be too long, or what is nested too deep
        raise UserError(f"{path} cannot be read as JSON ({error}); name a valid JSON file.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not a JSON object; name a configuration file.")
    return values
