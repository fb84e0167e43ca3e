"""SAELens's directories: `cfg.json` and `sae_weights.safetensors`, of version 6 and before.

Everything SAELens computes with an affine map is folded into the weights, so that one of our forms computes the same:

* `gated`: the gate ``z + b_gate > 0`` and the magnitude ``exp(r_mag) z + b_mag`` are of the same ``z = x W_enc``, so a
  gated feature is a JumpReLU one whose weights are ``exp(r_mag) W_enc`` and whose threshold is
  ``b_mag - exp(r_mag) b_gate``.
* ``rescale_acts_by_decoder_norm``: the decoder's norms go from its rows into the encoder.
* ``scaling_factor`` (before version 6, after finetuning) goes into the decoder's rows.
* `expected_average_only_in` with the factor beside it (`activation_scaler.json`, in a checkpoint of training).

What depends on each token's own norm or mean cannot be folded, and is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tsae.errors import UserError
from tsae.formats.tensors import Tensors, assemble, expect, read_safetensors, whole_number
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import load_json

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
TRAINING = ("batchtopk", "matryoshka_batchtopk")  # saved as jumprelu in the end, and as themselves in checkpoints
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", *TRAINING)


def read(directory: Path) -> SparseAutoencoder:
    """The autoencoder of a directory that SAELens wrote, in ``eval()`` mode.

    Raises:
        UserError: a file is missing or broken, a tensor has the wrong shape, or SAELens computes something that this
            version cannot.
    """
    path = directory / CONFIG
    values = load_json(path)
    kind, k = _architecture(path, values)
    d_in, d_sae = (whole_number(path, name, values.get(name)) for name in ("d_in", "d_sae"))
    if values.get("reshape_activations") == "hook_z" or "hook_z" in str(values.get("hook_name", "")):
        raise UserError(f"{path} is of an attention layer's heads (hook_z); only a block's output can be read.")
    tensors = read_safetensors(directory / WEIGHTS)
    scale = _input_scale(directory, values)

    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    biases = ("r_mag", "b_gate", "b_mag") if kind == "gated" else ("b_enc",)
    shapes |= dict.fromkeys(biases, (d_sae,))
    if kind == "jumprelu":
        shapes["threshold"] = (d_sae,)
    if kind in TRAINING:
        shapes["topk_threshold"] = ()
    weights = expect(directory / WEIGHTS, tensors, shapes)
    W_enc, W_dec, b_dec, threshold = weights["W_enc"], weights["W_dec"], weights["b_dec"], weights.get("threshold")
    if kind == "gated":
        gain = weights["r_mag"].exp()
        W_enc, b_enc, threshold = W_enc * gain, weights["b_mag"], weights["b_mag"] - gain * weights["b_gate"]
    else:
        b_enc = weights["b_enc"]
    if kind in TRAINING:
        threshold = weights["topk_threshold"]
    if values.get("rescale_acts_by_decoder_norm", kind in TRAINING) and kind in ("topk", *TRAINING):
        norm = W_dec.norm(dim=1).clamp(min=1e-8)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    W_dec = W_dec * _finetuning(directory, values, tensors, d_sae)[:, None]
    return assemble(
        {"standard": "relu", "topk": "topk"}.get(kind, "jumprelu"),  # type: ignore[arg-type]
        W_enc=W_enc * scale,
        b_enc=b_enc,
        W_dec=W_dec / scale,
        b_dec=b_dec / scale,
        threshold=threshold,
        k=whole_number(path, "k", k, d_sae) if kind == "topk" else None,
        subtract=bool(values.get("apply_b_dec_to_input", True)),
    )


def _architecture(path: Path, values: dict[str, Any]) -> tuple[str, object]:
    """The architecture, and topk's k; before version 6 topk was an activation function of `standard`."""
    kind = values.get("architecture") or "standard"
    function = values.get("activation_fn") or values.get("activation_fn_str") or "relu"
    k = values.get("k") or (values.get("activation_fn_kwargs") or {}).get("k")
    if kind == "standard" and function == "topk":
        kind = "topk"
    if kind not in ARCHITECTURES:
        raise UserError(f"{path} is of architecture {kind!r}; this version reads {', '.join(ARCHITECTURES)}.")
    if function not in ("relu", "topk"):
        raise UserError(f"{path} has the activation function {function!r}; this version reads relu and topk.")
    return kind, k


def _input_scale(directory: Path, values: dict[str, Any]) -> float:
    """What the input is multiplied by before everything else."""
    normalization = values.get("normalize_activations")
    if normalization in (None, False, "none"):
        return 1.0
    path = directory / CONFIG
    if normalization in (True, "expected_average_only_in"):
        factor = None
        if (directory / SCALER).is_file():
            factor = load_json(directory / SCALER).get("scaling_factor")
        if isinstance(factor, (int, float)) and factor > 0:
            return float(factor)
        raise UserError(
            f"{path} wants its input scaled by a factor that the directory does not hold "
            f"(normalize_activations = {normalization!r}); fold the factor into the weights in SAELens and save again."
        )
    raise UserError(
        f"{path} normalizes each token by itself (normalize_activations = {normalization!r}), which no fixed weights "
        "can do; only 'none' and a folded 'expected_average_only_in' can be read."
    )


def _finetuning(directory: Path, values: dict[str, Any], tensors: Tensors, d_sae: int) -> torch.Tensor:
    """(d_sae), what features are multiplied by before the decoder."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors:
            factor = expect(directory / WEIGHTS, tensors, {name: (d_sae,)})[name]
            if not values.get("finetuning_scaling_factor") and not torch.allclose(factor, torch.ones_like(factor)):
                raise UserError(
                    f"{directory / WEIGHTS} has a {name} that {CONFIG} does not speak of (finetuning_scaling_factor); "
                    "whether it belongs to the autoencoder cannot be told."
                )
            return factor
    return torch.ones(d_sae)
