"""Run directories: where a new one goes, what may be replaced, and the moment the old content goes."""

from __future__ import annotations

import os
import shutil
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.rundir import layout
from tsae.rundir.fingerprint import check_unchanged, fingerprint
from tsae.utils.atomic import write_json
from tsae.utils.config_json import from_dict, load_json, to_dict


def new_directory(
    group: str, out: Path | None, *, overwrite: bool, marker: str = layout.CONFIG, what: str = "run"
) -> Path:
    """Where a new run goes: ``out``, or `runs/<group>/<timestamp>`. Nothing is created here.

    marker, what: the file that makes a directory one of these, and their name

    Raises:
        UserError: the directory already has a run and ``overwrite`` is off, or holds something else, or cannot be
            written.
    """
    if out is None:
        # To the microsecond, as two may start in the same second.
        return Path("runs") / group / datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")
    check_writable(out)
    if (out / marker).exists() and not overwrite:
        raise UserError(f"{out} already has a {what}; continue it with --resume {out}, or replace it with --overwrite.")
    foreign = [path for path in out.glob("*") if path.name != f".{marker}.tmp"]  # which a killed start leaves
    if foreign and not (out / marker).exists():
        raise UserError(f"{out} is not empty and holds no {what}; name a new directory.")
    return out


def check_writable(directory: Path) -> None:
    """Raise `UserError` unless files can be made in ``directory``, or where it would be made."""
    try:
        place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"A run cannot be written to {directory} ({error.strerror}); name another directory.") from None


def start_run(directory: Path, cfg: TrainConfig) -> None:
    """Make the run directory, empty but for `config.json`.

    An old run keeps its `config.json` until all else of it is gone, so that a directory where this was killed
    still counts as a run's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_run(directory)
    write_json(directory / layout.CONFIG, to_dict(cfg))


def read_config(directory: Path) -> TrainConfig:
    """The configuration of the run in ``directory``.

    Raises:
        UserError: it cannot be read, or is not the one that the autoencoder there was trained with.
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
    """Raise `UserError` unless a checkpoint is of these runs.

    cfgs: by name, as read from ``directory``: a sweep's from its `sweep.json`, a single run's, without a name, from its
        `config.json`
    trained: what the checkpoint says they were, from `to_dict`
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
    """Point `runs/latest` to a directory `runs/<group>/<timestamp>`; others are left alone."""
    if directory.parent.parent != Path("runs"):
        return
    link = Path("runs") / "latest"
    temporary = link.with_name("latest.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(directory.relative_to("runs"))
    os.replace(temporary, link)
