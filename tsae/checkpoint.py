"""Checkpoints that survive `kill -9` at any moment.

A checkpoint is a directory `checkpoint/step-00000500` that is written under another name and renamed when it is
whole. The activation buffer is large and changes seldom, so it lies beside them, `buffer-0003.safetensors`, once
for each refill. The newest checkpoints are kept, with the buffers they name; all else is removed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tsae.errors import UserError

__all__ = ["has_buffer", "latest", "load", "save"]

STATE = "state.pt"
FORMAT = 2  # of what `tsae.run` saves; to be raised with every change of it
NAME = re.compile(r"step-(\d+)")


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
    """
    directory.mkdir(parents=True, exist_ok=True)
    if buffer:
        target = _buffer_file(directory, refills)
        if not target.exists():
            temporary = target.with_suffix(".tmp")
            save_file(buffer, temporary)
            _sync(temporary)
            os.replace(temporary, target)
    final = directory / f"step-{step:08d}"
    temporary = directory / f".tmp-step-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    torch.save(state | {"format": FORMAT, "step": step, "refills": 0 if buffer == {} else refills}, temporary / STATE)
    _sync(temporary / STATE)
    if final.exists():  # the same step again, after a resume: what is there is as good
        shutil.rmtree(temporary)
    else:
        os.replace(temporary, final)
        _sync(directory)
    _remove_old(directory, keep)
    return final


def has_buffer(directory: Path, refills: int) -> bool:
    """Whether the activation buffer's contents as of this refill are there."""
    return _buffer_file(directory, refills).exists()


def _buffer_file(directory: Path, refills: int) -> Path:
    return directory / f"buffer-{refills:04d}.safetensors"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if NAME.fullmatch(p.name) and (p / STATE).is_file())


def _remove_old(directory: Path, keep: int) -> None:
    whole = _checkpoints(directory)
    for old in whole[:-keep]:
        shutil.rmtree(old)
    wanted = {f"buffer-{_refills(path):04d}.safetensors" for path in whole[-keep:]}
    for path in directory.iterdir():
        stale_buffer = path.name.startswith("buffer-") and path.name not in wanted
        if stale_buffer and path.is_file():
            path.unlink()
        elif path.name.startswith(".tmp-"):
            shutil.rmtree(path)


def _refills(checkpoint: Path) -> int:
    return int(torch.load(checkpoint / STATE, weights_only=True, map_location="cpu", mmap=True)["refills"])


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint of a run's `checkpoint/`, or None."""
    whole = _checkpoints(directory)
    return whole[-1] if whole else None


def load(checkpoint: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state and the buffer's contents of a checkpoint, on the CPU.

    Raises:
        UserError: the checkpoint or its buffer is damaged or missing, or of a version that saved something else.
    """
    try:
        state = torch.load(checkpoint / STATE, weights_only=True, map_location="cpu")
        name = f"buffer-{state['refills']:04d}.safetensors"
        contents = load_file(checkpoint.parent / name) if state["refills"] else {}
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"The checkpoint {checkpoint} cannot be read ({reason}); remove that directory to resume from the one "
            "before it."
        ) from None
    if state.get("format") != FORMAT:
        raise UserError(f"The checkpoint {checkpoint} is of another version of tsae; train again, or resume it there.")
    return state, contents
