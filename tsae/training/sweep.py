"""Sweeps: many autoencoders on one stream of activations, from a YAML file to a table that compares them.

    base: {preset: demo, steps: 800}                # anything of a configuration, nested or with dotted keys
    runs:
      plain: {sae.release_ratio: 1.0, objective.temporal: none}
      schmitt: {}
    grid: {seed: [0, 1, 2], sae.k: [24, 36]}        # every run at every point; optional, as is `runs`

The runs train in step on the same batches, so that any number of them costs one harvest.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.presets import preset
from tsae.rundir import layout
from tsae.rundir.directory import link_latest, new_directory, remove_run, start_run
from tsae.utils.atomic import write_json
from tsae.utils.config_json import from_dict, load_json, to_dict

if TYPE_CHECKING:
    from tsae.training.run import Outcome

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
RESERVED = (layout.CHECKPOINTS, layout.SWEEP)  # a sweep's own, beside its runs
# What decides the stream, its evaluation and its checkpoints, which all runs share.
COMMON = (
    *("model", "revision", "layer", "data", "text", "steps", "batch", "data_seed", "device", "lm_dtype"),
    *("buffer", "evaluation", "checkpoint", "cache", "parallel"),
)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everywhere but in YAML 1.1, and a key may not come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands here twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_sweep(path: Path) -> dict[str, TrainConfig]:
    """The configurations of a sweep file, by name; checked, and agreeing on the stream.

    Raises:
        UserError: the file cannot be read, or an option of it makes no sense; one sentence, naming run and option.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}; name a sweep's YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({reason}); mend it.") from None
    parts = {"base": {}, "runs": None, "grid": {}}
    if not isinstance(values, dict) or not values or set(values) - set(parts):
        raise UserError(f"{path} must be a mapping of base, runs and grid, of which runs or grid may be left out.")
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
    """Every combination of the grid's values: a label such as `k24-seed0`, and the options."""
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
    """A preset's configuration with the options of the file over it, the later ones first."""
    chosen = "demo"
    for part in (base, *overrides):
        if part is not None and not isinstance(part, dict):
            raise UserError(f"The run is {part!r}; it must be a mapping of options, or empty.")
        chosen = (part or {}).get("preset", chosen)
    values = to_dict(preset(chosen))
    for part in (base, *overrides):
        _assign(values, part or {})
    cfg = from_dict(TrainConfig, values)
    if cfg.data_seed is None:  # all runs see one stream, whatever their own seeds
        seeds = to_dict(preset(chosen))
        _assign(seeds, base)
        cfg = replace(cfg, data_seed=from_dict(TrainConfig, seeds).seed)
    return cfg


def with_options(cfg: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    """``cfg`` with nested or dotted options over it; `UserError` names one that does not fit."""
    values = to_dict(cfg)
    _assign(values, options)
    return from_dict(TrainConfig, values)


def _assign(values: dict[str, Any], options: dict[str, Any]) -> None:
    """Put nested or dotted ``options`` into nested ``values``."""
    for key, value in options.items():
        *outer, last = str(key).split(".")
        place: Any = values
        for i, part in enumerate(outer):
            place = place.get(part) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise UserError(f"There is no option {key!r}, for '{'.'.join(outer[: i + 1])}' is no group of options.")
        if isinstance(value, dict) and isinstance(place.get(last), dict):
            _assign(place[last], value)
        else:
            place[last] = value


def check_agreement(cfgs: dict[str, TrainConfig]) -> None:
    """Raise `UserError`, naming run and option, unless all runs can share one stream and one evaluation of it."""
    (first, reference), *others = cfgs.items()
    for name, cfg in others:
        for option, value in _common(cfg).items():
            wanted = _common(reference).get(option)
            if value != wanted:
                raise UserError(
                    f"Run {name!r} has {option} = {value!r} and run {first!r} {wanted!r}, but the runs of a sweep "
                    "share one stream of activations; put it under base, or make two sweeps."
                )


def _common(cfg: TrainConfig) -> dict[str, Any]:
    """The options that runs have in common, by dotted name."""
    values = to_dict(cfg) | {"data_seed": cfg.stream_seed}
    flat = {}
    for name in COMMON:
        if isinstance(values[name], dict):
            flat |= {f"{name}.{key}": value for key, value in values[name].items()}
        else:
            flat[name] = values[name]
    return flat


def sweep_directory(name: str, out: Path | None, *, overwrite: bool) -> Path:
    """Where a new sweep goes: ``out``, or `runs/sweep-<name>/<timestamp>`; see `new_directory`."""
    return new_directory(f"sweep-{name}", out, overwrite=overwrite, marker=layout.SWEEP, what="sweep")


def start_sweep(cfgs: dict[str, TrainConfig], directory: Path) -> None:
    """Make the sweep's directory: `sweep.json`, and each run's directory, empty but for `config.json`.

    `sweep.json` holds all configurations from the first moment, so that `resume_sweep` can go on wherever this was
    killed; an old sweep keeps its own until its runs are gone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_run(directory)  # the checkpoints
    if (directory / layout.SWEEP).exists():
        for name in load_json(directory / layout.SWEEP).get("runs", {}):
            old = directory / name
            if old.is_dir():
                remove_run(old)
                (old / layout.CONFIG).unlink(missing_ok=True)
                if not any(old.iterdir()):
                    old.rmdir()
    write_json(directory / layout.SWEEP, {"runs": {name: {"config": to_dict(cfg)} for name, cfg in cfgs.items()}})
    for name, cfg in cfgs.items():
        start_run(directory / name, cfg)
    link_latest(directory)


def run_sweep(cfgs: dict[str, TrainConfig], directory: Path, *, resume: bool = False) -> dict[str, Outcome]:
    """Train, evaluate and compare; `sweep.json` gets every run's steps, metrics and error.

    cfgs: from `read_sweep`, or agreeing by `check_agreement`
    directory: from `sweep_directory`, or an existing sweep's with ``resume``
    """
    from tsae.parallel.environment import is_rank0
    from tsae.training.run import run_all

    if resume:
        for name, cfg in cfgs.items():  # a start that was killed may not have come to all
            if is_rank0() and not (directory / name / layout.CONFIG).exists():
                start_run(directory / name, cfg)
    outcomes = run_all(cfgs, directory, resume=resume, start=start_sweep)
    if not is_rank0():
        return outcomes
    old = load_json(directory / layout.SWEEP)["runs"]
    rows = {
        name: {
            "config": old[name]["config"],
            "steps": outcome.steps,
            "error": None if outcome.error is None else str(outcome.error),
            "metrics": None if outcome.evaluation is None else outcome.evaluation.metrics,
        }
        for name, outcome in outcomes.items()
    }
    write_json(directory / layout.SWEEP, {"runs": rows})
    return outcomes


def read_runs(directory: Path) -> dict[str, TrainConfig]:
    """The configurations of the sweep in ``directory``, by name."""
    runs = load_json(directory / layout.SWEEP).get("runs")
    if not isinstance(runs, dict) or not runs:
        raise UserError(f"{directory / layout.SWEEP} names no runs; start the sweep again.")
    for name, values in runs.items():
        if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
            raise UserError(
                f"{directory / layout.SWEEP} has no configuration for the run {name!r}; start the sweep again."
            )
    return {name: from_dict(TrainConfig, values["config"]) for name, values in runs.items()}


def resume_sweep(directory: Path) -> dict[str, Outcome]:
    """Go on with the sweep in ``directory`` from its last checkpoint, with its own configurations."""
    return run_sweep(read_runs(directory), directory, resume=True)


def print_sweep(directory: Path) -> None:
    """Print the table of a finished sweep.

    Raises:
        UserError: no run came to its end.
    """
    from tsae.reports.table import print_comparison

    runs = load_json(directory / layout.SWEEP)["runs"]
    print_comparison(runs)
    if all(run["error"] for run in runs.values()):
        raise UserError(f"No run of {directory} came to its end; {layout.SWEEP} there says why.")
