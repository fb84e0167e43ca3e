"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder per hookpoint."""

from __future__ import annotations

from pathlib import Path

from tsae.errors import UserError
from tsae.formats.build import build
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import load_json
from tsae.utils.tensor_files import matrix_shape, positive_integer, read_safetensors, require_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
UNSUPPORTED = {
    "transcode": "a transcoder, whose target is not its input",
    "skip_connection": "an autoencoder with a linear skip connection",
    "signed": "an autoencoder with signed features",
}


def read(config: Path) -> SparseAutoencoder:
    """The TopK autoencoder of a hookpoint, given its `cfg.json`, in ``eval()`` mode.

    Raises:
        UserError: a file is damaged, a tensor has the wrong shape, or it is not a plain TopK autoencoder.
    """
    values, path = load_json(config), config.with_name(WEIGHTS)
    for name, what in UNSUPPORTED.items():
        if values.get(name):
            raise UserError(f"{config} is {what} ({name}); this version reads plain TopK autoencoders.")
    if values.get("activation", "topk") != "topk":
        raise UserError(f"{config} has the activation {values['activation']!r}; this version reads topk.")
    tensors = read_safetensors(path)
    d_sae, d_in = matrix_shape(path, tensors, "encoder.weight")
    d_in = positive_integer(config, "d_in", values.get("d_in", d_in))
    d_sae = values.get("num_latents") or d_in * values.get("expansion_factor", 0) or d_sae
    weights = require_tensors(
        path,
        tensors,
        {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)},
    )
    return build(
        "topk",
        W_enc=weights["encoder.weight"].T,
        b_enc=weights["encoder.bias"],
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
        k=positive_integer(config, "k", values.get("k", 32), d_sae),
    )
