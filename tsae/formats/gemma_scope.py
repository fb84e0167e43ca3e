"""Gemma Scope: JumpReLU autoencoders in `params.npz` (Gemma 2) or `params.safetensors` with `config.json` (Gemma 3).

They do not subtract `b_dec` from the input.
"""

from __future__ import annotations

from pathlib import Path

from tsae.errors import UserError
from tsae.formats.build import build
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import load_json
from tsae.utils.tensor_files import matrix_shape, read_npz, read_safetensors, require_tensors

ARRAYS, WEIGHTS, CONFIG = "params.npz", "params.safetensors", "config.json"


def read(path: Path) -> SparseAutoencoder:
    """The autoencoder of a `params.npz` or `params.safetensors`, in ``eval()`` mode.

    Raises:
        UserError: the file is damaged, a tensor has the wrong shape, or it is a transcoder.
    """
    config = path.with_name(CONFIG)
    if path.suffix == ".safetensors" and config.is_file():
        kind = load_json(config).get("architecture", "jump_relu")
        if kind != "jump_relu":
            raise UserError(f"{config} has the architecture {kind!r}; this version reads Gemma Scope's jump_relu.")
    tensors = read_npz(path) if path.suffix == ".npz" else read_safetensors(path)
    tensors = {name[:1].upper() + name[1:] if name.startswith("w_") else name: t for name, t in tensors.items()}
    if "affine_skip_connection" in tensors:
        raise UserError(f"{path} is a transcoder with a skip connection; only autoencoders can be read.")
    d_in, d_sae = matrix_shape(path, tensors, "W_enc")
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "threshold": (d_sae,)}
    shapes |= {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return build("jumprelu", **require_tensors(path, tensors, shapes), subtract_b_dec=False)
