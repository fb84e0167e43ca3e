"""The YAML file of a sweep: many autoencoders on one stream of activations.

base: {preset: demo, steps: 800}                # any option, nested or with dotted keys
runs:
  plain: {sae.activation: schmitt, sae.release_ratio: 1.0, sae.gate_gradient: 0, objective.temporal: none}
  demo: {}
grid: {seed: [0, 1, 2], sae.k: [24, 36]}        # every run at every point; optional, as is `runs`
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.presets import at_length, preset
from tsae.rundir import layout
from tsae.training.init_from import adopted
from tsae.training.job import check_agreement
from tsae.utils.config_json import from_dict, to_dict
from tsae.utils.nested import flatten
from tsae.utils.strict_yaml import load_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
RESERVED = (layout.CHECKPOINTS, layout.SWEEP)  # a sweep's own, beside its runs


def read_sweep(path: Path) -> dict[str, TrainConfig]:
    """The configurations of a sweep file, by name, checked.

    Raises:
        UserError: the file cannot be read, or an option is not valid; the message names run and option.
    """
    try:
        values = load_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}; name a sweep's YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({reason}); correct the file.") from None
    parts: dict[str, Any] = {"base": {}, "runs": None, "grid": {}}
    if not isinstance(values, dict) or not values or set(values) - set(parts):
        raise UserError(f"{path} must be a mapping with base, and runs or grid or both.")
    parts |= {key: value for key, value in values.items() if value is not None}
    runs = {"": {}} if parts["runs"] is None else parts["runs"]
    for key, part in (("base", parts["base"]), ("runs", runs), ("grid", parts["grid"])):
        if not isinstance(part, dict) or (key == "runs" and not part):
            raise UserError(f"'{key}' of {path} is {part!r}; it must be a mapping.")
    if parts["runs"] is None and not parts["grid"]:
        raise UserError(f"{path} has neither runs nor a grid; name at least one run.")
    cfgs: dict[str, TrainConfig] = {}
    for name, own in runs.items():
        for label, point in _points(parts["grid"], path):
            whole = "-".join(filter(None, (str(name), label)))
            if not NAME.fullmatch(whole) or whole in RESERVED:
                raise UserError(
                    f"A run of {path} is named {whole!r}, which must be the name of its directory: letters, digits "
                    "and . _ + = - after a letter or digit."
                )
            if whole in cfgs:
                raise UserError(f"{path} has two runs named {whole!r}; name them apart.")
            try:
                cfgs[whole] = _config(parts["base"], own, point)
                cfgs[whole].check()
            except UserError as error:
                raise UserError(f"Run {whole!r} of {path}: {error}") from None
    check_agreement(cfgs)
    return cfgs


def _points(grid: dict[str, Any], path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every combination of the values of the grid: a label such as `k24-seed0`, and the options."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"'grid.{key}' of {path} is {values!r}; it must be a list of values.")
    out = []
    for combination in itertools.product(*grid.values()):
        point = dict(zip(grid, combination, strict=True))
        labels = [f"{str(key).split('.')[-1]}{_label(value)}" for key, value in point.items()]
        out.append(("-".join(labels), point))
    return out


def _label(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9._+]+", "_", f"{value:g}" if isinstance(value, float) else str(value)).strip("_")


def _config(base: dict[str, Any], *overrides: dict[str, Any]) -> TrainConfig:
    """The configuration of a preset, `at_length`, with the options of the file applied in order, the last one
    winning."""
    chosen, length = "demo", None
    for part in (base, *overrides):
        if part is not None and not isinstance(part, dict):
            raise UserError(f"The run is {part!r}; it must be a mapping of options, or empty.")
        chosen, length = (part or {}).get("preset", chosen), (part or {}).get("length", length)
    start = preset(chosen)
    values = to_dict(at_length(start, length) if type(length) is int else start)
    for part in (base, *overrides):
        _assign(values, part or {})
    cfg = adopted(from_dict(TrainConfig, values), _names(base, *overrides))
    if cfg.data_seed is None:  # all runs share one stream, whatever their seeds
        seeds = to_dict(preset(chosen))
        _assign(seeds, base)
        cfg = replace(cfg, data_seed=from_dict(TrainConfig, seeds).seed)
    return cfg


def _names(*parts: dict[str, Any]) -> set[str]:
    """The dotted names of all options in nested or dotted ``parts``."""
    return {name for part in parts for name in flatten(part or {})}


def with_options(cfg: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    """``cfg`` with nested or dotted options applied; `UserError` if one does not exist or has the wrong type."""
    values = to_dict(cfg)
    _assign(values, options)
    return from_dict(TrainConfig, values)


def _assign(values: dict[str, Any], options: dict[str, Any]) -> None:
    """Set nested or dotted ``options`` in nested ``values``."""
    for key, value in options.items():
        *outer, last = str(key).split(".")
        place: Any = values
        for i, part in enumerate(outer):
            place = place.get(part) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise UserError(f"There is no option {key!r}: '{'.'.join(outer[: i + 1])}' is not a group of options.")
        if isinstance(value, dict) and isinstance(place.get(last), dict):
            _assign(place[last], value)
        else:
            place[last] = value
