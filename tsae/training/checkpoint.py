"""Checkpoints that survive `kill -9` at any moment, and are not taken for good when they are damaged.

A checkpoint is a directory `checkpoint/step-00000500` that is written under another name and renamed when it is
whole. The activation buffer is large and changes seldom, so it lies beside them, `buffer-0003.safetensors`, once
for each refill. `manifest.json` in a checkpoint has the checksums of both. The newest checkpoints are kept, with the
buffers they name; all else is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tsae.errors import UserError, reason
from tsae.utils.atomic import WriteError, checksum, checksum_of, save_pickle, sync, write_json, writing

STATE, MANIFEST = "state.pt", "manifest.json"
FORMAT = 3  # of what `tsae.training.run` saves; to be raised with every change of it
NAME = re.compile(r"step-(\d+)")
SET_ASIDE = "damaged-"  # before the name of a checkpoint that cannot be read, until the next is saved


def save(
    directory: Path,
    step: int,
    state: dict[str, Any],
    buffer: dict[str, torch.Tensor] | None,
    refills: int,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` (steps completed) and drop those beyond the newest ``keep``.

    directory: the run's `checkpoint/`
    state: tensors and plain Python values only, so that it loads without unpickling code
    buffer: the activation buffer's contents as of refill number ``refills``; None where `has_buffer` has them

    Raises:
        WriteError: the disk is full, or cannot be written to; the checkpoints before stay.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f".tmp-{final.name}"
    try:
        with writing(final):
            directory.mkdir(parents=True, exist_ok=True)
            files = {} if buffer == {} else _save_buffer(directory, buffer, refills)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            save_pickle(state | {"step": step, "refills": 0 if buffer == {} else refills}, temporary / STATE)
            sync(temporary / STATE)
            write_json(temporary / MANIFEST, _manifest({STATE: checksum(temporary / STATE)} | files))
            if final.exists():  # the same step again, after a resume from an older one
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync(directory)
            _remove_old(directory, keep)
    except WriteError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        good = latest(directory)
        left = f"the last good one is {good}" if good else "there is none before it"
        raise WriteError(
            final,
            error.reason,
            f"{left}; make room, and continue with python -m tsae.train --resume {directory.parent}",
        ) from None
    return final


def has_buffer(directory: Path, refills: int) -> bool:
    """Whether a checkpoint has the activation buffer's contents as of this refill."""
    return bool(_known_buffer(_buffer_file(directory, refills)))


def _buffer_file(directory: Path, refills: int) -> Path:
    return directory / f"buffer-{refills:04d}.safetensors"


def _known_buffer(file: Path) -> dict[str, str]:
    """The file and its checksum, if a checkpoint has it."""
    for path in reversed(_checkpoints(file.parent)):
        known = _files(path).get(file.name)
        if known is not None and file.exists():
            return {file.name: known}
    return {}


def _save_buffer(directory: Path, buffer: dict[str, torch.Tensor] | None, refills: int) -> dict[str, str]:
    """The buffer's file and its checksum; it is written unless a checkpoint has it."""
    target = _buffer_file(directory, refills)
    known = _known_buffer(target)
    if known or buffer is None:
        return known
    temporary = target.with_suffix(".tmp")
    try:
        save_file(buffer, temporary)
        sync(temporary)
        digest = checksum(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return {target.name: digest}


def _manifest(files: dict[str, str]) -> dict[str, Any]:
    values = {"format": FORMAT, "files": files}
    return values | {"checksum": checksum_of(values)}


def _checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that came to their end, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if NAME.fullmatch(p.name) and (p / STATE).is_file())


def _files(checkpoint: Path) -> dict[str, str]:
    """Names and checksums in a checkpoint's manifest; none where it is damaged."""
    try:
        return _read_manifest(checkpoint)
    except UserError:
        return {}


def _read_manifest(checkpoint: Path) -> dict[str, str]:
    try:
        values = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        found, files = values["format"], values["files"]
        whole = values["checksum"] == checksum_of({"format": found, "files": files})
    except FileNotFoundError:
        raise UserError(
            f"The checkpoint {checkpoint} has no {MANIFEST}; it is damaged, or of an earlier version of tsae."
        ) from None
    except (OSError, ValueError, TypeError, KeyError):
        whole, found, files = False, FORMAT, {}
    if not whole or not isinstance(files, dict):
        raise UserError(f"The checkpoint {checkpoint} is damaged: {MANIFEST} is not as it was written.")
    if found != FORMAT:
        raise UserError(f"The checkpoint {checkpoint} is of another version of tsae; train again, or resume it there.")
    return files


def _remove_old(directory: Path, keep: int) -> None:
    whole = _checkpoints(directory)
    for old in whole[:-keep]:
        shutil.rmtree(old)
    wanted = {name for path in whole[-keep:] for name in _files(path)}
    for path in directory.iterdir():
        stale_buffer = path.name.startswith("buffer-") and path.name not in wanted
        if stale_buffer and path.is_file():
            path.unlink()
        elif path.name.startswith((".tmp-", SET_ASIDE)):
            shutil.rmtree(path)


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint of a run's `checkpoint/`, or None; it may be damaged all the same."""
    whole = _checkpoints(directory)
    return whole[-1] if whole else None


class Resumed(NamedTuple):
    """What a run goes on from.

    path: of the checkpoint; state, buffer: as they were given to `save`
    damaged: a sentence for each newer checkpoint that cannot be read
    """

    path: Path
    state: dict[str, Any]
    buffer: dict[str, torch.Tensor]
    damaged: list[str]


def load_latest(directory: Path) -> Resumed | None:
    """The newest good checkpoint of a run's `checkpoint/`, on the CPU; None where there is none at all.

    Newer ones that are damaged are set aside, as `damaged-step-...`, until the next one is saved.

    Raises:
        UserError: none of the checkpoints there can be read; they are left as they are.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(_checkpoints(directory)):
        try:
            state, buffer = load(path)
        except UserError as error:
            damaged[path] = str(error)
            continue
        for bad in damaged:
            shutil.rmtree(bad.with_name(SET_ASIDE + bad.name), ignore_errors=True)
            os.replace(bad, bad.with_name(SET_ASIDE + bad.name))
        return Resumed(path, state, buffer, list(damaged.values()))
    if damaged:
        first = next(iter(damaged.values()))
        others = "No other can be read" if len(damaged) > 1 else "There is no other"
        raise UserError(f"{first} {others}; remove {directory} to train from the first step.")
    return None


def load(checkpoint: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state and the buffer's contents of a checkpoint, on the CPU.

    Raises:
        UserError: the checkpoint or its buffer is damaged or missing, or of a version that saved something else.
    """
    files = _read_manifest(checkpoint)
    paths = {name: (checkpoint if name == STATE else checkpoint.parent) / name for name in files}
    try:
        for name, path in paths.items():
            if checksum(path) != files[name]:
                raise UserError(f"The checkpoint {checkpoint} is damaged: {path} is not as it was written.")
        state = torch.load(checkpoint / STATE, weights_only=True, map_location="cpu")
        name = _buffer_file(checkpoint.parent, state["refills"]).name
        contents = load_file(paths[name]) if state["refills"] else {}
    except UserError:
        raise
    except Exception as error:  # a pickle makes the reader raise whatever it stumbles over
        raise UserError(f"The checkpoint {checkpoint} cannot be read ({reason(error)}).") from None
    return state, contents
