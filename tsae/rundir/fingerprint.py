"""Whether a run's config.json still says what the run was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.utils.atomic import checksum_of
from tsae.utils.config_json import to_dict
from tsae.utils.nested import flatten

# Fields that may be edited after training: where things are, and settings that no result depends on.
_EDITABLE = ("model", "revision", "data", "device", "lm_device", "cache", "log", "checkpoint", "parallel")


def fingerprint(config: TrainConfig) -> str:
    """Checksum of the fields that may not be edited once the run has trained."""
    return checksum_of(_fixed(to_dict(config)))


def check_unchanged(config: TrainConfig, trained: dict[str, Any], path: Path) -> None:
    """Raise `UserError`, naming the differences, if a field that may not be edited has changed.

    config: as read from ``path``
    trained: what the run was trained with, from `to_dict`
    """
    then = _fixed(trained)
    changed = ", ".join(
        f"{name} is {value!r} there and was {then.get(name)!r}"
        for name, value in _fixed(to_dict(config)).items()
        if value != then.get(name)
    )
    if changed:
        raise UserError(f"{path} is not what the run was trained with: {changed}; put that back, or train again.")


def _fixed(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that may not be edited, by dotted name."""
    return flatten({name: value for name, value in values.items() if name not in _EDITABLE})
