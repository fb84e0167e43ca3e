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

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.formats.build import build, ungated
from tsae.formats.fields import read as field
from tsae.formats.fields import require_known, require_no_others, shortened
from tsae.formats.saelens_fields import COMPUTED, METADATA, RENAMED, TRAINING
from tsae.sae import metadata, saving
from tsae.sae.kinds import Activation
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import load_json
from tsae.utils.tensor_files import Tensors, positive_integer, read_safetensors, require_tensors

CONFIG, WEIGHTS, SCALER = saving.CONFIG, saving.WEIGHTS, "activation_scaler.json"
CHECKPOINTS = ("batchtopk", "matryoshka_batchtopk")  # SAELens saves the result of a training as jumprelu
ARCHITECTURES: dict[str, Activation] = {
    "standard": "relu",
    "topk": "topk",
    **dict.fromkeys(("jumprelu", "gated", *CHECKPOINTS), "jumprelu"),
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
}
TRANSCODERS = ("transcoder", "jumprelu_transcoder")
RESCALED = ("topk", *CHECKPOINTS)  # architectures that have rescale_acts_by_decoder_norm
DTYPES = ("float32", "float64", "float16", "bfloat16")
FACTORS = ("scaling_factor", "finetuning_scaling_factor")  # names of one tensor


def read(path: Path) -> SparseAutoencoder:
    """The autoencoder of a directory, given its `cfg.json`, in ``eval()`` mode.

    Raises:
        UserError: a file is missing or damaged, a field has the wrong type or is unknown, a tensor has the wrong shape
            or belongs to another architecture, or SAELens computes something that this version cannot.
    """
    directory = path.parent
    if saving.saved_config(directory) is not None:
        return SparseAutoencoder.load(directory)
    values = _current_names(path, load_json(path))
    require_known(path, values, COMPUTED | METADATA | TRAINING | {"metadata"})
    kind = _architecture(path, values)
    said = metadata.checked(path, _metadata(path, values), transcoder=kind in TRANSCODERS)
    k = _k(path, values, kind)
    d_in, d_sae = (positive_integer(path, name, values.get(name)) for name in ("d_in", "d_sae"))
    d_out = _d_out(path, values, kind, d_in)
    _check_input(path, values, said)
    tensors = read_safetensors(directory / WEIGHTS)
    scale = _input_scale(path, values)

    weights = _weights(directory / WEIGHTS, tensors, kind, d_in, d_sae, d_out)
    W_enc, W_dec = weights["W_enc"], weights["W_dec"]
    threshold = weights.get("threshold", weights.get("topk_threshold"))
    if kind == "gated":
        gate = (weights[name] for name in ("r_mag", "b_gate", "b_mag"))
        W_enc, b_enc, threshold = ungated(directory / WEIGHTS, W_enc, *gate)
    else:
        b_enc = weights["b_enc"]
    if _rescales(path, values, kind):
        norm = W_dec.norm(dim=1).clamp(min=1e-8)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    W_dec = W_dec * _finetuning_factor(path, values, tensors, d_sae)[:, None]
    sae = build(
        ARCHITECTURES[kind],
        W_enc=W_enc * scale,
        b_enc=b_enc,
        W_dec=W_dec if kind in TRANSCODERS else W_dec / scale,
        b_dec=weights["b_dec"] if kind in TRANSCODERS else weights["b_dec"] / scale,
        threshold=threshold,
        k=positive_integer(path, "k", k, d_sae) if kind == "topk" else None,
        subtract_b_dec=bool(field(path, values, "apply_b_dec_to_input", bool, kind not in TRANSCODERS)),
        transcoder=kind in TRANSCODERS,
    )
    sae.metadata = said
    return sae


def _current_names(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The fields under the names of today."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        _put(path, out, RENAMED.get(name, name), value)
    return out


def _put(path: Path, out: dict[str, Any], name: str, value: object) -> None:
    """Add a field to ``out``, unless it is there already; raises `UserError` if it is there with another value."""
    if out.get(name) is not None and value is not None and out[name] != value:
        raise UserError(
            f"{path} says twice what {name} is, {shortened(out[name])} and {shortened(value)}; correct one of them."
        )
    if out.get(name) is None:
        out[name] = value


def _metadata(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What the file says of model and text: `metadata`, and before version 6 fields beside the others.

    Raises `UserError` for what is told only inside another object.
    """
    out = _current_names(path, field(path, values, "metadata", dict, {}) or {})
    for name in METADATA & values.keys():
        _put(path, out, name, values[name])
    for name in (COMPUTED - {"dtype"}) & out.keys():
        if out[name] not in (None, values.get(name)):
            raise UserError(
                f"{path} has {name} = {shortened(out[name])} inside metadata, where it is not read; move it out of "
                "metadata, or remove it."
            )
    for name, inner in out.items():
        for key, value in inner.items() if isinstance(inner, dict) else ():
            key = RENAMED.get(key, key)
            if key in metadata.TYPES and value is not None and value != out.get(key):
                raise UserError(
                    f"{path} has {key} = {shortened(value)} inside metadata.{name}, where it is not read; move it into "
                    "metadata."
                )
    return out


def _architecture(path: Path, values: dict[str, Any]) -> str:
    """The architecture; before version 6 topk was an activation function of `standard`, which was the default."""
    kind = field(path, values, "architecture", str, None if "metadata" in values else "standard")
    function = field(path, values, "activation_fn", str) or "relu"
    if function not in ("relu", "topk"):
        raise UserError(f"{path} has the activation function {function!r}; this version reads relu and topk.")
    if kind == "standard" and function == "topk":
        kind = "topk"
    if kind not in tuple(ARCHITECTURES):
        raise UserError(f"{path} has the architecture {kind!r}; this version reads {', '.join(ARCHITECTURES)}.")
    if function == "topk" and kind != "topk":
        raise UserError(
            f"{path} has the architecture {kind} and the activation function topk, which contradict each other; "
            "correct one of them."
        )
    return kind


def _k(path: Path, values: dict[str, Any], kind: str) -> object:
    """``k``, of the architectures that have it."""
    options = dict(field(path, values, "activation_fn_kwargs", dict) or {})
    found = {"k": values.get("k")}
    _put(path, found, "k", options.pop("k", None))
    for name, value in options.items():
        if value not in (None, False):
            raise UserError(
                f"{path} has activation_fn_kwargs.{name} = {shortened(value)}, which this version does not know; "
                "remove it if it does not change what the autoencoder computes."
            )
    k = found["k"]
    if k is not None and kind not in RESCALED:
        raise UserError(
            f"{path} has k = {shortened(k)}, which the architecture {kind} does not have; correct the architecture."
        )
    if k is not None and (isinstance(k, bool) or not isinstance(k, (int, float))):
        raise UserError(f"{path} has k = {shortened(k)}; expected a number.")
    return k


def _check_input(path: Path, values: dict[str, Any], said: dict[str, Any]) -> None:
    """Raise `UserError` for input that is reshaped in an unknown way, and for a dtype that is none."""
    reshaped = field(path, values, "reshape_activations", str) or "none"
    heads = "hook_z" in said.get("hook_name", "")  # [..., heads, d_head], which SAELens makes [..., heads * d_head]
    if reshaped == "hook_z" and not heads:
        raise UserError(f"{path} has reshape_activations = 'hook_z', but its hook_name is no hook_z; correct one.")
    if reshaped not in ("none", "hook_z"):
        raise UserError(f"{path} has reshape_activations = {reshaped!r}; this version reads 'none'.")
    dtype = field(path, values, "dtype", str)
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
        raise UserError(f"{path} has the dtype {dtype!r}; expected one of {', '.join(DTYPES)}.")


def _d_out(path: Path, values: dict[str, Any], kind: str, d_in: int) -> int:
    """The width of the decoder's output, which only a transcoder's file names."""
    if kind in TRANSCODERS:
        if field(path, values, "apply_b_dec_to_input", bool, False):
            raise UserError(
                f"{path} is a transcoder with apply_b_dec_to_input, which would subtract the target's bias from the "
                "input; correct one of them."
            )
        return positive_integer(path, "d_out", values.get("d_out"))
    if values.get("d_out") not in (None, d_in):
        raise UserError(f"{path} has d_out = {shortened(values['d_out'])}, which {kind} lacks; correct one of them.")
    return d_in


def _weights(path: Path, tensors: Tensors, kind: str, d_in: int, d_sae: int, d_out: int) -> Tensors:
    """The tensors of an architecture, float32; a checkpoint's `log_threshold` as `threshold`."""
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(("r_mag", "b_gate", "b_mag") if kind == "gated" else ("b_enc",), (d_sae,))
    jumprelu = kind in ("jumprelu", "jumprelu_transcoder")
    logarithm = jumprelu and "threshold" not in tensors and "log_threshold" in tensors
    if jumprelu:
        shapes["log_threshold" if logarithm else "threshold"] = (d_sae,)
    if kind in CHECKPOINTS:
        shapes["topk_threshold"] = ()
    weights = require_tensors(path, tensors, shapes)
    require_no_others(path, tensors, (*shapes, *FACTORS), f"the architecture {kind}")
    if kind in CHECKPOINTS and not weights["topk_threshold"].isfinite():
        raise UserError(
            f"{path}: topk_threshold is {weights['topk_threshold'].item()}; train again, or restore the file."
        )
    if logarithm:
        weights["threshold"] = weights.pop("log_threshold").exp()
    return weights


def _rescales(path: Path, values: dict[str, Any], kind: str) -> bool:
    rescales = bool(field(path, values, "rescale_acts_by_decoder_norm", bool, kind in CHECKPOINTS))
    if rescales and kind not in RESCALED:
        raise UserError(f"{path} sets rescale_acts_by_decoder_norm, which {kind} lacks; correct one of them.")
    return rescales


def _input_scale(path: Path, values: dict[str, Any]) -> float:
    """The factor on the input, before everything else."""
    normalization = values.get("normalize_activations")
    scaler = path.with_name(SCALER)
    scaling = load_json(scaler) if scaler.is_file() else {}
    factor = scaling.get("scaling_factor")
    if normalization is None or normalization is False or normalization == "none":
        if factor is not None or scaling.get("has_whitening"):
            raise UserError(
                f"{scaler} has a factor for the input, but {CONFIG} does not use it (normalize_activations = "
                f"{normalization!r}); remove {SCALER}, or set normalize_activations."
            )
        return 1.0
    if normalization is not True and normalization != "expected_average_only_in":
        raise UserError(
            f"{path} normalizes each token separately (normalize_activations = {normalization!r}), which fixed weights "
            "cannot do; only 'none' and a folded 'expected_average_only_in' can be read."
        )
    number = factor if isinstance(factor, (int, float)) and not isinstance(factor, bool) else 0
    if 0 < number < math.inf and not scaling.get("has_whitening"):
        return float(number)
    if factor is not None:
        raise UserError(
            f"{scaler} is not a positive factor alone (scaling_factor = {shortened(factor)}); restore the file."
        )
    raise UserError(
        f"{path} scales its input by a factor that the directory does not contain (normalize_activations = "
        f"{normalization!r}); fold the factor into the weights in SAELens and save again."
    )


def _finetuning_factor(path: Path, values: dict[str, Any], tensors: Tensors, d_sae: int) -> Tensor:
    """(d_sae), the factor on features before the decoder."""
    file, said = path.with_name(WEIGHTS), field(path, values, "finetuning_scaling_factor", bool)
    found = [name for name in FACTORS if name in tensors]
    if not found:
        if said:
            raise UserError(f"{file} has no scaling_factor, which {CONFIG} says it has; restore the file.")
        return torch.ones(d_sae)
    factors = require_tensors(file, tensors, dict.fromkeys(found, (d_sae,)))
    factor = factors[found[0]]
    if not said and not torch.allclose(factor, torch.ones_like(factor)):
        raise UserError(
            f"{file} has a {found[0]}, but {CONFIG} does not set finetuning_scaling_factor; set it to true to apply "
            "the factor, or remove the tensor."
        )
    if len(found) > 1 and not torch.equal(factor, factors[found[1]]):
        raise UserError(f"{file} has both {' and '.join(FACTORS)}, with different values; remove one of them.")
    return factor
