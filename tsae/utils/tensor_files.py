"""Files of tensors, and checks of what is in them.

No reader executes what a file says: safetensors and numpy arrays hold only data, and PyTorch pickles are read with
``weights_only=True``. All functions raise `UserError` naming the file.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tsae.errors import UserError, reason

Tensors = dict[str, Tensor]


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors` file, on the CPU."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); the file is damaged.") from None


def read_pickle(path: Path) -> Tensors:
    """The tensors of a state dict written by `torch.save`, on the CPU; numbers as tensors without dimensions.

    Only tensors and plain values are unpickled. A file that asks for anything else, which is how a pickle executes
    code, is refused and nothing in it runs.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about other pickle versions
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is not None:
            raise UserError(
                f"{path} holds more than tensors ({asked[1]}), which could run its author's code, so it was not read; "
                "ask for a state dict of tensors only."
            ) from None
        raise UserError(
            f"{path} is not a state dict of tensors, so it was not read; it is damaged or holds something else."
        ) from None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict of tensors.")
    tensors: Tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, (Tensor, int, float)):
            raise UserError(f"{path} has {name!r}, a {type(value).__name__}; expected a state dict of tensors only.")
        tensors[name] = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def read_npz(path: Path) -> Tensors:
    """The arrays of a numpy archive as tensors; pickled objects are refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, AttributeError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as numeric arrays ({reason(error)}).") from None


def matrix_shape(path: Path, tensors: Tensors, name: str) -> tuple[int, int]:
    """The shape of the matrix ``name``."""
    if name not in tensors:
        raise UserError(f"{path} has no tensor {name}; it has {sorted(tensors)}.")
    shape = tuple(tensors[name].shape)
    if len(shape) != 2:
        raise UserError(f"{path}: {name} has the shape {shape}; expected a matrix.")
    return shape


def require_tensors(path: Path, tensors: Tensors, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """The tensors named in ``shapes``, as float32, after a check of their shapes and dtypes."""
    for name, expected in shapes.items():
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name}; it has {sorted(tensors)}.")
        tensor = tensors[name]
        shape = tuple(tensor.shape)
        if shape != expected:
            raise UserError(f"{path}: {name} has the shape {shape}; expected {expected}.")
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} has the dtype {tensor.dtype}; expected floating point.")
        if tensor.dtype.itemsize < 2:
            raise UserError(
                f"{path}: {name} has the dtype {tensor.dtype}, whose scale is not known; save it as float32."
            )
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise UserError(f"{path}: {name} is sparse or without values; expected a dense tensor.")
    return {name: tensors[name].float() for name in shapes}


def positive_integer(path: Path, name: str, value: object, at_most: float = math.inf) -> int:
    """``value``, which ``path`` has under ``name``, as a positive integer."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
        limit = "" if at_most == math.inf else f" of at most {at_most}"
        raise UserError(f"{path} has {name} = {value!r}; expected a positive integer{limit}.")
    return value
