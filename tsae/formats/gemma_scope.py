"""Gemma Scope: JumpReLU autoencoders in `params.npz` (Gemma 2) or `params.safetensors` with `config.json` (Gemma 3).

They do not subtract `b_dec` from the input.
"""

from __future__ import annotations

from pathlib import Path

from tsae.errors import UserError
from tsae.formats.tensors import assemble, expect, matrix, read_npz, read_safetensors
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import load_json

ARRAYS, WEIGHTS, CONFIG = "params.npz", "params.safetensors", "config.json"


def read(path: Path) -> SparseAutoencoder:
    """The autoencoder of a `params.npz` or `params.safetensors`, in ``eval()`` mode.

    Raises:
        UserError: the file is broken, a tensor has the wrong shape, or it is a transcoder.
    """
    config = path.with_name(CONFIG)
    if path.suffix == ".safetensors" and config.is_file():
        kind = load_json(config).get("architecture", "jump_relu")
        if kind != "jump_relu":
            raise UserError(f"{config} is of architecture {kind!r}; this version reads Gemma Scope's jump_relu.")
    tensors = read_npz(path) if path.suffix == ".npz" else read_safetensors(path)
    tensors = {name[:1].upper() + name[1:] if name.startswith("w_") else name: t for name, t in tensors.items()}
    if "affine_skip_connection" in tensors:
        raise UserError(f"{path} is of a transcoder with a skip connection; only autoencoders can be read.")
    d_in, d_sae = matrix(path, tensors, "W_enc")
    weights = expect(
        path,
        tensors,
        {
            "W_enc": (d_in, d_sae),
            "b_enc": (d_sae,),
            "W_dec": (d_sae, d_in),
            "b_dec": (d_in,),
            "threshold": (d_sae,),
        },
    )
    return assemble("jumprelu", **weights, subtract=False)
