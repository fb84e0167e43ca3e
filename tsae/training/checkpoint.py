"""Checkpoints that survive `kill -9` at any moment and are rejected when damaged.

A checkpoint is a directory `checkpoint/step-00000500`, written under a temporary name and renamed when complete. The
activation buffer is large and changes rarely, so it is a file beside them, `buffer-0003.safetensors`, one per refill.
`manifest.json` in a checkpoint has the checksums of both. The newest checkpoints and the buffers they refer to are
kept; everything else is removed.
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
from tsae.utils.calling import resume_call

STATE, MANIFEST = "state.pt", "manifest.json"
FORMAT = 3  # of what `tsae.training.loop` saves; raise it with every change
NAME = re.compile(r"step-(\d+)")
SET_ASIDE = "damaged-"  # prefix of a checkpoint that cannot be read, until the next one is saved


def save(
    directory: Path,
    step: int,
    state: dict[str, Any],
    buffer: dict[str, torch.Tensor] | None,
    refills: int,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` (steps completed) and remove all but the newest ``keep``.

    directory: `checkpoint/` of the run
    state: tensors and plain Python values only, so that it loads without unpickling code
    buffer: contents of the activation buffer after refill number ``refills``; None if `has_buffer` is true

    Raises:
        WriteError: the disk is full or not writable; earlier checkpoints stay.
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
            advice=f"{left}; make room, and continue with {resume_call(directory.parent)}",
        ) from None
    return final


def has_buffer(directory: Path, refills: int) -> bool:
    """Whether a checkpoint has the contents of the activation buffer after this refill."""
    return bool(_known_buffer(_buffer_file(directory, refills)))


def _buffer_file(directory: Path, refills: int) -> Path:
    return directory / f"buffer-{refills:04d}.safetensors"


def _known_buffer(file: Path) -> dict[str, str]:
    """The file and its checksum, if a checkpoint refers to it."""
    for path in reversed(_checkpoints(file.parent)):
        known = _files(path).get(file.name)
        if known is not None and file.exists():
            return {file.name: known}
    return {}


def _save_buffer(directory: Path, buffer: dict[str, torch.Tensor] | None, refills: int) -> dict[str, str]:
    """The file of the buffer and its checksum; written unless a checkpoint already has it."""
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
    """Complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if NAME.fullmatch(p.name) and (p / STATE).is_file())


def _files(checkpoint: Path) -> dict[str, str]:
    """File names and checksums in the manifest of a checkpoint; empty if it is damaged."""
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
    """The newest complete checkpoint in `checkpoint/` of a run, or None. Its checksums are not verified."""
    whole = _checkpoints(directory)
    return whole[-1] if whole else None


class Resumed(NamedTuple):
    """A checkpoint to resume from.

    state, buffer: as given to `save`
    damaged: a sentence for each newer checkpoint that cannot be read
    """

    path: Path
    state: dict[str, Any]
    buffer: dict[str, torch.Tensor]
    damaged: list[str]


def load_latest(directory: Path) -> Resumed | None:
    """The newest intact checkpoint in `checkpoint/` of a run, on the CPU; None if there is no checkpoint.

    Newer damaged ones are renamed `damaged-step-...` until the next one is saved.

    Raises:
        UserError: no checkpoint can be read; they are not changed.
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
    """The state and the buffer contents of a checkpoint, on the CPU.

    Raises:
        UserError: the checkpoint or its buffer is damaged or missing, or has another format version.
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
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"The checkpoint {checkpoint} cannot be read ({reason(error)}).") from None
    return state, contents
