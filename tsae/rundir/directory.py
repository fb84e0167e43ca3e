"""Run directories: the path of a new one, what may be replaced, and when the old content is removed."""

from __future__ import annotations

import os
import shutil
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.rundir import layout
from tsae.rundir.fingerprint import check_unchanged, fingerprint
from tsae.rundir.ownership import check_output_directory
from tsae.utils.atomic import write_json, writing
from tsae.utils.calling import option
from tsae.utils.config_json import from_dict, load_json, to_dict
from tsae.utils.paths import check_unicode


def new_directory(
    group: str, out: Path | None, *, overwrite: bool, marker: str = layout.CONFIG, what: str = "run"
) -> Path:
    """The directory of a new run: ``out``, or `runs/<group>/<timestamp>`. Creates nothing.

    marker, what: `config.json` and "run", or `sweep.json` and "sweep"

    Raises:
        UserError: the directory has a run and ``overwrite`` is off, or it contains something else, is in the place of
            a file of another run, or is not writable.
    """
    if out is None:
        # To the microsecond: two runs may start in the same second.
        return Path("runs") / group / datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")
    check_output_directory(out)
    check_writable(out)
    if (out / marker).exists() and not overwrite:
        go_on, replace = option("resume", out), option("overwrite")
        raise UserError(f"{out} already has a {what}; continue it with {go_on}, or replace it with {replace}.")
    if not (out / marker).exists() and not is_new(out):
        raise UserError(f"{out} is not empty and holds no {what}; name a new directory.")
    return out


def is_new(directory: Path) -> bool:
    """Whether a directory is missing, or empty but for a lock and what a killed start left."""
    own = {layout.LOCK, f".{layout.CONFIG}.tmp", f".{layout.SWEEP}.tmp"}
    return all(path.name in own or path.name.startswith(f"{layout.LOCK}.") for path in directory.glob("*"))


def check_writable(directory: Path) -> None:
    """Raise `UserError` unless files can be created in ``directory``, or in the parent where it would be."""
    check_unicode(directory)
    try:
        place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"A run cannot be written to {directory} ({error.strerror}); name another directory.") from None


def start_run(directory: Path, cfg: TrainConfig) -> None:
    """Make the run directory, empty except for `config.json`.

    An old run keeps its `config.json` until everything else is removed, so that a directory where this was killed is
    still a run directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_run(directory)
    write_json(directory / layout.CONFIG, to_dict(cfg))


def start_sweep(cfgs: dict[str, TrainConfig], directory: Path) -> None:
    """Make the directory of a sweep: `sweep.json`, and a run directory each, empty but for `config.json`.

    `sweep.json` is complete from the first moment, so that a sweep killed here can be resumed. An old sweep keeps its
    `sweep.json` until its runs are removed.
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


def start_runs(cfgs: dict[str, TrainConfig], directory: Path) -> None:
    """Make the directory of a run, which has the name "", or of a sweep, and point `runs/latest` to it."""
    if "" in cfgs:
        start_run(directory, cfgs[""])
    else:
        start_sweep(cfgs, directory)
    link_latest(directory)


def read_config(directory: Path) -> TrainConfig:
    """The configuration of the run in ``directory``.

    Raises:
        UserError: it cannot be read, or is not the configuration that the autoencoder was trained with.
    """
    config = from_dict(TrainConfig, load_json(directory / layout.CONFIG))
    trained = directory / layout.AUTOENCODER / "cfg.json"
    metadata = load_json(trained).get("metadata") if trained.is_file() else None
    known = metadata.get("trained_with") if isinstance(metadata, dict) else None
    if known is not None and known != fingerprint(config):
        raise UserError(
            f"{directory / layout.CONFIG} is not what the autoencoder beside it was trained with ({trained} has "
            "another fingerprint); put it back as it was, or train again."
        )
    return config


def check_resumable(cfgs: dict[str, TrainConfig], trained: dict[str, dict[str, Any]], directory: Path) -> None:
    """Raise `UserError` unless a checkpoint belongs to these runs.

    cfgs: by name, read from `sweep.json` or, for a single run, from `config.json` in ``directory``
    trained: the configurations in the checkpoint, from `to_dict`
    """
    if cfgs.keys() != trained.keys():
        raise UserError(
            f"{directory / layout.SWEEP} names the runs {sorted(cfgs)}, and the checkpoint there is of "
            f"{sorted(trained)}; put it back as it was, or train again."
        )
    for name, cfg in cfgs.items():
        check_unchanged(cfg, trained[name], directory / (layout.SWEEP if name else layout.CONFIG))


def remove_run(directory: Path) -> None:
    """Remove `layout.OUTPUTS` from a run's or a sweep's directory; `config.json`, `sweep.json` and other files stay."""
    for path in [path for pattern in layout.OUTPUTS for path in directory.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def link_latest(directory: Path) -> None:
    """Point `runs/latest` to ``directory`` if it is `runs/<group>/<timestamp>`."""
    if directory.parent.parent != Path("runs"):
        return
    link = Path("runs") / "latest"
    with writing(link), TemporaryDirectory(prefix=".latest-", dir=link.parent) as own:  # others may start now too
        temporary = Path(own) / link.name
        temporary.symlink_to(directory.relative_to("runs"))
        os.replace(temporary, link)
