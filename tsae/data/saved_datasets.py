"""Datasets that `datasets.save_to_disk` wrote: folders of Arrow files, which are read without being copied."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tsae.config import TextConfig
from tsae.data.folders import ARROW, has_suffix
from tsae.errors import UserError
from tsae.utils.notices import warn_once

log = logging.getLogger(__name__)

_SPLITS = "dataset_dict.json"  # of a DatasetDict, which has a folder for each split
_STATE, _INFO = "state.json", "dataset_info.json"  # of a Dataset
_ANY = TextConfig.split  # what `text.split` says if nobody has said anything


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` writes, a Dataset or a DatasetDict."""
    try:
        return (folder / _SPLITS).is_file() or all((folder / name).is_file() for name in (_STATE, _INFO))
    except OSError:  # it may not be entered, which is reported where it is read
        return False


def saved_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a saved dataset, in the order of its rows.

    split: which one of a DatasetDict; a Dataset must be this one, if it says which it is.
    Raises UserError if there is no such split, or if a file is missing or damaged.
    """
    if (folder / _SPLITS).is_file():
        splits = _read(folder / _SPLITS).get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise UserError(f"{str(folder / _SPLITS)!r} does not list the splits of the dataset: save it again")
        if split not in splits or Path(split).name != split:
            raise UserError(
                f"the dataset in {str(folder)!r} has no split {split!r}, only {', '.join(splits) or 'none'}: "
                "choose one with --text.split"
            )
        folder = folder / split
        if not is_saved_dataset(folder):
            raise UserError(f"the split {split!r} of the dataset in {str(folder.parent)!r} is missing: save it again")
        return _files(folder, _read(folder / _STATE))
    state = _read(folder / _STATE)
    own = state.get("_split")
    if own not in (None, split):
        if split != _ANY:
            raise UserError(f"the dataset in {str(folder)!r} is the split {own!r}, not {split!r}: name its own")
        warn_once(log, f"reading the dataset in {str(folder)!r}, which is the split {own!r}")
    return _files(folder, state)


def _files(folder: Path, state: dict[str, Any]) -> list[Path]:
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"the dataset in {str(folder)!r} selects rows by an index, as old versions save: save it again")
    entries = state.get("_data_files")
    names = [e.get("filename") if isinstance(e, dict) else None for e in entries] if isinstance(entries, list) else []
    paths = [folder / name for name in names if isinstance(name, str) and Path(name).name == name]
    if not paths or len(paths) != len(names):
        raise UserError(f"{str(folder / _STATE)!r} does not list the files of the dataset: save it again")
    for path in paths:
        if not path.is_file() or not has_suffix(path, ARROW):
            raise UserError(f"the dataset in {str(folder)!r} lacks its Arrow file {path.name!r}: save it again")
    return paths


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} is not a JSON object: save the dataset again")
    return values
