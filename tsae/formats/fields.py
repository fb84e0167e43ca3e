"""Fields of another library's configuration file: each read with its type, and none passed over.

A field decides what an autoencoder computes, or tells of its training and origin. Each reader lists both kinds. Any
other field is refused by name, because this version cannot know which kind it is; only null, which sets nothing,
passes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from tsae.errors import UserError
from tsae.utils.tensor_files import Tensors

T = TypeVar("T")


def read(path: Path, values: dict[str, Any], name: str, kind: type[T], default: T | None = None) -> T | None:
    """The value of a field, of the type ``kind``; None if it is absent and ``default`` is None.

    default: the value of an absent field. If it is None, a null field counts as absent; otherwise null is refused as
        another type.

    Raises:
        UserError: the field has another type. bool is no int.
    """
    value = values.get(name, default)
    if value is None and default is None:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{path} has {name} = {value!r}; expected {_WORDS.get(kind, kind.__name__)}.")
    return value


_WORDS = {bool: "true or false", str: "text", int: "a whole number", dict: "an object", list: "a list"}


def require_known(path: Path, values: dict[str, Any], known: Collection[str], where: str = "") -> None:
    """Raise `UserError` naming a field that is not in ``known`` and not null.

    where: the object in the file that holds ``values``, for the message
    """
    for name, value in values.items():
        if name not in known and value is not None:
            raise UserError(
                f"{path} has the field {where}{name} = {shortened(value)}, which this version does not know, so it "
                "cannot tell what the autoencoder computes; remove the field if it does not change that."
            )


def refuse(path: Path, values: dict[str, Any], fields: dict[str, str]) -> None:
    """Raise `UserError` for the first of ``fields`` that is true, with what it makes of the autoencoder."""
    for name, what in fields.items():
        if read(path, values, name, bool, False):
            raise UserError(f"{path} is {what} ({name}), which this version does not read.")


def require_no_others(path: Path, tensors: Tensors, known: Collection[str], kind: str) -> None:
    """Raise `UserError` naming a tensor that ``kind`` does not have, so that none is left unread."""
    others = sorted(set(tensors) - set(known))
    if others:
        raise UserError(
            f"{path} has the tensor {others[0]}, which {kind} does not have, so this version cannot tell what the "
            "autoencoder computes; correct the architecture, or remove the tensor if it is not used."
        )


def shortened(value: object) -> str:
    """The value as in Python, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
