"""Gemma Scope: JumpReLU autoencoders in `params.npz` (Gemma 2) or `params.safetensors` with `config.json` (Gemma 3).

They do not subtract `b_dec` from the input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsae.errors import UserError
from tsae.formats.build import build
from tsae.formats.fields import read as field
from tsae.formats.fields import refuse, require_known, require_no_others
from tsae.lm.site import TRANSCODERS, from_gemma_scope_folder, from_module
from tsae.sae import metadata
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import load_json
from tsae.utils.tensor_files import matrix_shape, read_npz, read_safetensors, require_tensors

ARRAYS, WEIGHTS, CONFIG = "params.npz", "params.safetensors", "config.json"
ORIGIN = ("model_name", "hf_hook_point_in", "hf_hook_point_out", "type")  # text
KNOWN = (*ORIGIN, "architecture", "width", "l0", "affine_connection", "apply_b_dec_to_input")


def read(path: Path) -> SparseAutoencoder:
    """The autoencoder of a `params.npz` or `params.safetensors`, in ``eval()`` mode.

    Raises:
        UserError: the file is damaged, a field has the wrong type or is unknown, a tensor has the wrong shape or is
            unknown, or it is a transcoder over several layers or with a skip connection.
    """
    config = path.with_name(CONFIG)
    values = load_json(config) if path.suffix == ".safetensors" and config.is_file() else {}
    transcoder = _check_config(config, values) or _in_transcoders_folder(path)
    tensors = read_npz(path) if path.suffix == ".npz" else read_safetensors(path)
    renamed = {name[:1].upper() + name[1:] if name.startswith("w_") else name: t for name, t in tensors.items()}
    if len(renamed) < len(tensors):
        raise UserError(f"{path} has W_enc or W_dec twice, in capitals and not; remove one of them.")
    if "affine_skip_connection" in renamed:
        raise UserError(f"{path} is a transcoder with a skip connection, which this version does not read.")
    d_in, d_sae = matrix_shape(path, renamed, "W_enc")
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "threshold": (d_sae,)}
    d_out = matrix_shape(path, renamed, "W_dec")[1] if transcoder else d_in
    shapes |= {"W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    weights: dict[str, Any] = require_tensors(path, renamed, shapes)
    require_no_others(path, renamed, shapes, "an autoencoder of Gemma Scope")
    width = field(config, values, "width", int)
    if width is not None and width != d_sae:
        raise UserError(f"{config} has the width {width}, but W_enc of {path.name} has {d_sae} features; restore both.")
    subtracts = bool(field(config, values, "apply_b_dec_to_input", bool, False))
    if transcoder and subtracts:
        raise UserError(f"{config} is of a transcoder with apply_b_dec_to_input; correct one of them.")
    sae = build("jumprelu", **weights, subtract_b_dec=subtracts, transcoder=transcoder)
    sae.metadata = _metadata(path, values, transcoder=transcoder)
    return sae


def _in_transcoders_folder(path: Path) -> bool:
    site, _ = from_gemma_scope_folder(path.parent)
    return site is not None and site.name == "transcoder"


def _check_config(config: Path, values: dict[str, Any]) -> bool:
    """Whether the file describes a transcoder; raises `UserError` if it is neither that nor an autoencoder."""
    kind = field(config, values, "architecture", str, "jump_relu")
    if kind != "jump_relu":
        raise UserError(f"{config} has the architecture {kind!r}; this version reads Gemma Scope's jump_relu.")
    refuse(config, values, {"affine_connection": "a transcoder with a skip connection"})
    require_known(config, values, KNOWN)
    for name in ORIGIN:
        field(config, values, name, str)
    kind = values.get("type") or "sae"
    source, target = values.get("hf_hook_point_in"), values.get("hf_hook_point_out")
    if kind not in ("sae", "transcoder"):
        raise UserError(
            f"{config} is of the type {kind!r}; only autoencoders and transcoders of one layer can be read."
        )
    if kind == "sae" and values.get("type") and target not in (None, source):
        raise UserError(f"{config} predicts {target} from {source}, but its type is 'sae'; correct one of them.")
    return kind == "transcoder" or target not in (None, source)


def _metadata(path: Path, values: dict[str, Any], *, transcoder: bool) -> dict[str, Any]:
    """Place and model, from `config.json`, and what it leaves out from the path."""
    site, model = from_gemma_scope_folder(path.parent)
    if site is not None and site.name in TRANSCODERS and not transcoder:
        raise UserError(
            f"{path} is a {site.name}, by the name of its folder; only autoencoders and transcoders can be read."
        )
    module = values.get("hf_hook_point_in")
    if module is not None:
        named = from_module(module)
        if site is not None and site.layer != named.layer:
            raise UserError(
                f"{path.with_name(CONFIG)} is for {module}, but its folder is named after layer {site.layer}; restore "
                "the folder's name."
            )
        site = named
    said: dict[str, Any] = {"model_name": values.get("model_name") or model, "hf_hook_name": module}
    if transcoder:
        target = values.get("hf_hook_point_out")
        if site is not None and site.name == "transcoder":  # Gemma Scope: the norm's weight is not in its input
            said["hook_name"] = f"blocks.{site.layer}.ln2.hook_normalized"
        elif site is not None:
            said["hook_name"] = site.hook_name
        if target is not None:
            said |= {"hook_name_out": from_module(target).hook_name, "hf_hook_name_out": target}
        elif site is not None:
            said["hook_name_out"] = f"blocks.{site.layer}.hook_mlp_out"
    elif site is not None:
        said["hook_name"] = site.hook_name
    return metadata.checked(path, said, transcoder=transcoder)
