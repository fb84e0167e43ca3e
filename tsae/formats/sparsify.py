"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder for each hookpoint."""

from __future__ import annotations

from pathlib import Path

from tsae.errors import UserError
from tsae.formats.tensors import assemble, expect, matrix, read_safetensors, whole_number
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import load_json

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(directory: Path) -> SparseAutoencoder:
    """The TopK autoencoder of a hookpoint's folder, in ``eval()`` mode.

    Raises:
        UserError: a file is broken, a tensor has the wrong shape, or it is a transcoder or another thing that this
            version cannot compute.
    """
    values = load_json(directory / CONFIG)
    path, weights_path = directory / CONFIG, directory / WEIGHTS
    for name, what in (
        ("transcode", "a transcoder, whose output is not its input"),
        ("skip_connection", "an autoencoder with a linear skip connection"),
        ("signed", "an autoencoder with signed features"),
    ):
        if values.get(name):
            raise UserError(f"{path} is of {what} ({name}); this version reads plain TopK autoencoders.")
    if values.get("activation", "topk") != "topk":
        raise UserError(f"{path} has the activation {values['activation']!r}; this version reads topk.")
    tensors = read_safetensors(weights_path)
    d_sae, d_in = matrix(weights_path, tensors, "encoder.weight")
    d_in = whole_number(path, "d_in", values.get("d_in", d_in))
    d_sae = values.get("num_latents") or d_in * values.get("expansion_factor", 0) or d_sae
    weights = expect(
        weights_path,
        tensors,
        {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)},
    )
    return assemble(
        "topk",
        W_enc=weights["encoder.weight"].T,
        b_enc=weights["encoder.bias"],
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
        k=whole_number(path, "k", values.get("k", 32), d_sae),
    )
