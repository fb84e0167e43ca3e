"""SAELens directories, `cfg.json` and `sae_weights.safetensors`: ours, and SAELens's own of version 6 and before.

Every affine operation of SAELens is folded into the weights, so that one of our activations computes the same:

* `gated`: the gate ``z + b_gate > 0`` and the magnitude ``exp(r_mag) z + b_mag`` share ``z = x W_enc``. A gated feature
  is therefore a JumpReLU feature with weights ``exp(r_mag) W_enc`` and threshold ``b_mag - exp(r_mag) b_gate``.
* ``rescale_acts_by_decoder_norm``: the norms of the decoder rows move into the encoder.
* ``scaling_factor`` (finetuning before version 6) moves into the decoder rows.
* `expected_average_only_in`, if a training checkpoint has its factor in `activation_scaler.json`.

Normalization by each token's own norm or mean cannot be folded and is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tsae.errors import UserError
from tsae.formats.build import build
from tsae.sae import saving
from tsae.sae.kinds import Activation
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import load_json
from tsae.utils.tensor_files import Tensors, positive_integer, read_safetensors, require_tensors

CONFIG, WEIGHTS, SCALER = saving.CONFIG, saving.WEIGHTS, "activation_scaler.json"
TRAINING = ("batchtopk", "matryoshka_batchtopk")  # only in checkpoints; SAELens saves the result as jumprelu
ARCHITECTURES: dict[str, Activation] = {
    "standard": "relu",
    "topk": "topk",
    **dict.fromkeys(("jumprelu", "gated", *TRAINING), "jumprelu"),
}


def read(path: Path) -> SparseAutoencoder:
    """The autoencoder of a directory, given its `cfg.json`, in ``eval()`` mode.

    Raises:
        UserError: a file is missing or damaged, a tensor has the wrong shape, or SAELens computes something that this
            version cannot.
    """
    directory = path.parent
    if saving.saved_config(directory) is not None:
        return SparseAutoencoder.load(directory)
    values = load_json(path)
    kind, k = _architecture(path, values)
    d_in, d_sae = (positive_integer(path, name, values.get(name)) for name in ("d_in", "d_sae"))
    if values.get("reshape_activations") == "hook_z" or "hook_z" in str(values.get("hook_name", "")):
        raise UserError(f"{path} encodes attention heads (hook_z); only autoencoders of a block's output can be read.")
    tensors = read_safetensors(directory / WEIGHTS)
    scale = _input_scale(path, values)

    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys(("r_mag", "b_gate", "b_mag") if kind == "gated" else ("b_enc",), (d_sae,))
    if kind == "jumprelu":
        shapes["threshold"] = (d_sae,)
    if kind in TRAINING:
        shapes["topk_threshold"] = ()
    weights = require_tensors(directory / WEIGHTS, tensors, shapes)
    W_enc, W_dec = weights["W_enc"], weights["W_dec"]
    threshold = weights.get("threshold", weights.get("topk_threshold"))
    if kind == "gated":
        gain, b_enc = weights["r_mag"].exp(), weights["b_mag"]
        W_enc, threshold = W_enc * gain, b_enc - gain * weights["b_gate"]
    else:
        b_enc = weights["b_enc"]
    if values.get("rescale_acts_by_decoder_norm", kind in TRAINING) and kind in ("topk", *TRAINING):
        norm = W_dec.norm(dim=1).clamp(min=1e-8)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    W_dec = W_dec * _finetuning_factor(directory, values, tensors, d_sae)[:, None]
    return build(
        ARCHITECTURES[kind],
        W_enc=W_enc * scale,
        b_enc=b_enc,
        W_dec=W_dec / scale,
        b_dec=weights["b_dec"] / scale,
        threshold=threshold,
        k=positive_integer(path, "k", k, d_sae) if kind == "topk" else None,
        subtract_b_dec=bool(values.get("apply_b_dec_to_input", True)),
    )


def _architecture(path: Path, values: dict[str, Any]) -> tuple[str, object]:
    """The architecture, and k for topk, which before version 6 was an activation function of `standard`."""
    kind = values.get("architecture") or "standard"
    function = values.get("activation_fn") or values.get("activation_fn_str") or "relu"
    k = values.get("k") or (values.get("activation_fn_kwargs") or {}).get("k")
    if kind == "standard" and function == "topk":
        kind = "topk"
    if kind not in tuple(ARCHITECTURES):
        raise UserError(f"{path} has the architecture {kind!r}; this version reads {', '.join(ARCHITECTURES)}.")
    if function not in ("relu", "topk"):
        raise UserError(f"{path} has the activation function {function!r}; this version reads relu and topk.")
    return kind, k


def _input_scale(path: Path, values: dict[str, Any]) -> float:
    """The factor on the input, before everything else."""
    normalization = values.get("normalize_activations")
    if normalization in (None, False, "none"):
        return 1.0
    if normalization not in (True, "expected_average_only_in"):
        raise UserError(
            f"{path} normalizes each token separately (normalize_activations = {normalization!r}), which fixed weights "
            "cannot do; only 'none' and a folded 'expected_average_only_in' can be read."
        )
    scaler = path.with_name(SCALER)
    factor = load_json(scaler).get("scaling_factor") if scaler.is_file() else None
    if isinstance(factor, (int, float)) and factor > 0:
        return float(factor)
    raise UserError(
        f"{path} scales its input by a factor that the directory does not contain (normalize_activations = "
        f"{normalization!r}); fold the factor into the weights in SAELens and save again."
    )


def _finetuning_factor(directory: Path, values: dict[str, Any], tensors: Tensors, d_sae: int) -> torch.Tensor:
    """(d_sae), the factor on features before the decoder."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors:
            factor = require_tensors(directory / WEIGHTS, tensors, {name: (d_sae,)})[name]
            if not values.get("finetuning_scaling_factor") and not torch.allclose(factor, torch.ones_like(factor)):
                raise UserError(
                    f"{directory / WEIGHTS} has a {name}, but {CONFIG} does not set finetuning_scaling_factor; set it "
                    "to true to apply the factor, or remove the tensor."
                )
            return factor
    return torch.ones(d_sae)
