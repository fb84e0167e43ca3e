"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder per hookpoint, named after its module."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tsae.errors import UserError
from tsae.formats.build import build
from tsae.formats.fields import read as field
from tsae.formats.fields import refuse, require_known, require_no_others
from tsae.lm.site import from_sparsify_folder
from tsae.sae import metadata
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import load_json
from tsae.utils.tensor_files import matrix_shape, positive_integer, read_safetensors, require_tensors

CONFIG, WEIGHTS, TRAINING = "cfg.json", "sae.safetensors", "config.json"
UNSUPPORTED = {
    "transcode": "a transcoder, whose target is not its input",
    "skip_connection": "an autoencoder with a linear skip connection",
    "signed": "an autoencoder with signed features",
}
KNOWN = (*UNSUPPORTED, "activation", "d_in", "num_latents", "expansion_factor", "k", "normalize_decoder", "multi_topk")


def read(config: Path) -> SparseAutoencoder:
    """The TopK autoencoder of a hookpoint, given its `cfg.json`, in ``eval()`` mode.

    Raises:
        UserError: a file is damaged, a field has the wrong type or is unknown, a tensor has the wrong shape or is
            unknown, or it is not a plain TopK autoencoder.
    """
    values, path = load_json(config), config.with_name(WEIGHTS)
    refuse(config, values, UNSUPPORTED)
    require_known(config, values, KNOWN)
    for name in ("normalize_decoder", "multi_topk"):  # of the training
        field(config, values, name, bool)
    activation = field(config, values, "activation", str) or "topk"
    if activation != "topk":
        raise UserError(f"{config} has the activation {activation!r}; this version reads topk.")
    tensors = read_safetensors(path)
    d_sae, d_in = matrix_shape(path, tensors, "encoder.weight")
    d_in = positive_integer(config, "d_in", values.get("d_in", d_in))
    d_sae = _width(config, values, d_in, d_sae)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    weights = require_tensors(path, tensors, shapes)
    require_no_others(path, tensors, shapes, "a plain TopK autoencoder")
    sae = build(
        "topk",
        W_enc=weights["encoder.weight"].T,
        b_enc=weights["encoder.bias"],
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
        k=positive_integer(config, "k", values.get("k"), d_sae),
    )
    sae.metadata = _metadata(config)
    return sae


def _width(config: Path, values: dict[str, Any], d_in: int, stored: int) -> int:
    """The number of features: `num_latents`, or if it is 0 `d_in` times `expansion_factor`."""
    latents = field(config, values, "num_latents", int)
    if latents:
        return positive_integer(config, "num_latents", latents)
    factor = field(config, values, "expansion_factor", int)
    return stored if factor is None else d_in * factor


def _metadata(config: Path) -> dict[str, Any]:
    """The hookpoint, from the name of the folder, and the model, from the training's `config.json` above it."""
    folder = config.parent
    site = from_sparsify_folder(folder)
    said: dict[str, Any] = {}
    if site is not None:
        said = {"hook_name": site.hook_name, "hf_hook_name": site.name}
    above = folder.resolve()
    above = above.parents[1] if re.fullmatch(r"seed\d+", above.name) else above.parent
    training = above / TRAINING
    values = load_json(training) if training.is_file() else {}
    if "hookpoints" in values and "sae" in values:  # sparsify's, and nobody else's
        names = {"model": "model_name", "ctx_len": "context_size", "dataset": "dataset_path"}
        said |= {ours: values.get(theirs) for theirs, ours in names.items()}
        options = {name: values.get(name) for name in ("revision", "load_in_8bit") if values.get(name)}
        said |= {"model_from_pretrained_kwargs": options} if options else {}
    return metadata.checked(training if values else config, said)
