"""What the readers share: files of tensors, checks of their shapes, and the autoencoder made of them.

No reader executes what a file says: safetensors and numpy arrays hold data alone, and PyTorch's pickles are read with
``weights_only=True``.
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

from tsae.config import Activation, SAEConfig
from tsae.errors import UserError, reason
from tsae.sae.model import SparseAutoencoder

Tensors = dict[str, Tensor]


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors` file, on the CPU; `UserError` if it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); the file is damaged.") from None


def read_pickle(path: Path) -> Tensors:
    """The tensors of a state dict that `torch.save` wrote, on the CPU.

    Only tensors and plain values are unpickled (``weights_only=True``): a file that asks for anything else, which is
    how a pickle executes code, raises `UserError` and nothing of it is run.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of other versions of pickle
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes the reader raise whatever it stumbles over
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is not None:
            raise UserError(
                f"{path} holds more than tensors (it asks for {asked[1]}), which could run code of its author's, so "
                "nothing of it was read; ask for a state dict of tensors alone."
            ) from None
        raise UserError(
            f"{path} cannot be read as a state dict of tensors alone, so nothing of it was read; it is damaged, or "
            "holds something else."
        ) from None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict of tensors.")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def read_npz(path: Path) -> Tensors:
    """The arrays of a numpy archive as tensors; `UserError` if it is damaged or holds pickled objects."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, AttributeError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as arrays of numbers ({reason(error)}).") from None


def matrix(path: Path, tensors: Tensors, name: str) -> tuple[int, int]:
    """The shape of the matrix ``name``; `UserError` if there is none."""
    if name not in tensors:
        raise UserError(f"{path} has no tensor {name}; it has {sorted(tensors)}.")
    shape = tuple(tensors[name].shape)
    if len(shape) != 2:
        raise UserError(f"{path}: {name} is {shape}; a matrix is wanted.")
    return shape


def expect(path: Path, tensors: Tensors, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """The tensors named in ``shapes``, as float32; `UserError` names the one that is missing or has another shape."""
    for name, wanted in shapes.items():
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name}; it has {sorted(tensors)}.")
        got = tuple(tensors[name].shape)
        if got != wanted:
            raise UserError(f"{path}: {name} is {got}; {wanted} is wanted.")
        if not tensors[name].is_floating_point():
            raise UserError(f"{path}: {name} is of {tensors[name].dtype}; floating-point numbers are wanted.")
    return {name: tensors[name].float() for name in shapes}


@torch.no_grad()
def assemble(
    activation: Activation,
    *,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    threshold: Tensor | None = None,
    k: int | None = None,
    subtract: bool = True,
    groups: tuple[int, ...] = (),
) -> SparseAutoencoder:
    """An autoencoder in ``eval()`` mode, of float32 tensors whose shapes have been checked.

    W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in), b_dec (d_in); threshold (d_sae) or scalar
    k:        features a token: what topk keeps, and what batchtopk kept in training
    subtract: whether ``b_dec`` is subtracted from the input first
    groups:   Matryoshka: ends of the groups, the last d_sae
    """
    d_in, d_sae = W_enc.shape
    sae = SparseAutoencoder(
        SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            activation=activation,
            k=min(32, d_sae) if k is None else k,
            groups=groups,
            unit_norm_decoder=False,
            apply_b_dec_to_input=subtract,
        )
    ).eval()
    for name, value in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
        getattr(sae, name).copy_(value)
    if threshold is not None:
        sae.threshold.copy_(threshold.clamp(min=0.0).expand(d_sae))  # a ReLU comes first in every form
        sae.adopt_thresholds()
    return sae


def whole_number(path: Path, name: str, value: object, at_most: float = math.inf) -> int:
    """``value`` as a positive whole number; `UserError` naming it otherwise."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
        limit = "" if at_most == math.inf else f" of at most {at_most}"
        raise UserError(f"{path} has {name} = {value!r}; a positive whole number{limit} is wanted.")
    return value
