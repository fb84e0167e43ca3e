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
_EDITABLE = (
    *("model", "revision", "data", "device", "lm_device", "cache", "log", "checkpoint", "parallel"),
    *("lm_device_map", "trust_remote_code", "init_from"),
)
# Fields that the first runs do not have, and the values that those were trained with. At these values a field counts as
# absent, so that the runs stay what they were. Every new field belongs here.
_ADDED: dict[str, Any] = {
    "buffer.max_norm_ratio": 0.0,
    "evaluation.massive_ratio": 4.0,
    "length": 128,
    "site": "resid_post",
    "target": None,
    "sae.d_out": 0,
    "sae.support_bits": 0.0,
    "sae.amplitude_bits": 4.0,
    "sae.gate_gradient": 0.0,
    "lm_quantization": "none",
    "text.roles": [],
    "text.min_characters": 0,
    "text.max_characters": 0,
    "text.prepend_bos": "auto",
    "sae.initial_decay": 0.5,
}


def fingerprint(config: TrainConfig) -> str:
    """Checksum of the fields that may not be edited once the run has trained."""
    return checksum_of(_fixed(to_dict(config)))


def check_unchanged(config: TrainConfig, trained: dict[str, Any], path: Path) -> None:
    """Raise `UserError`, naming the differences, if a field that may not be edited has changed.

    config: as read from ``path``
    trained: what the run was trained with, from `to_dict`
    """
    then = _fixed(trained)
    now = _fixed(to_dict(config))
    changed = ", ".join(
        f"{name} is {now.get(name, _ADDED.get(name))!r} there and was {then.get(name, _ADDED.get(name))!r}"
        for name in {**now, **_ADDED}
        if now.get(name) != then.get(name)
    )
    if changed:
        raise UserError(f"{path} is not what the run was trained with: {changed}; put that back, or train again.")


def _fixed(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that may not be edited, by dotted name, without those of `_ADDED` at the values there."""
    fixed = flatten({name: value for name, value in values.items() if name not in _EDITABLE})
    return {name: value for name, value in fixed.items() if name not in _ADDED or value != _ADDED[name]}
