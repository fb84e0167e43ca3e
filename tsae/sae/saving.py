"""An autoencoder on disk: `cfg.json` and `sae_weights.safetensors`, the directory format of SAELens.

Activations that SAELens computes are saved under its architecture names (`tsae.sae.kinds`). The others (gelu,
hysteresis, layer normalization, a scaled input) get names of their own, so that SAELens refuses them instead of
computing something else. Our configuration is in `metadata.tsae`; directories without it are SAELens's own, which
`tsae.formats.saelens` reads.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from tsae.config import SAEConfig
from tsae.errors import UserError
from tsae.sae import metadata
from tsae.sae.recurrence import LARGEST_DECAY
from tsae.utils.atomic import atomic_write, checksum_of, write_json
from tsae.utils.config_json import from_dict, load_json
from tsae.utils.tensor_files import Tensors, read_safetensors, require_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
TRANSCODERS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}  # SAELens's names; it has none of TopK
CHECKSUM = "xxh3_128"  # key in the header of the weights; covers the weights and `metadata.tsae`
ALWAYS = ("activation", "apply_b_dec_to_input", "input_scale", "layer_norm")  # fields that every version has written
SAELENS_VERSION = "6.54.0"  # of the format written; SAELens reads versions below 6 through a legacy path


def architecture(cfg: SAEConfig) -> str:
    """The `architecture` in `cfg.json`: SAELens's name if it computes the same, else a name of our own."""
    if cfg.layer_norm != "none":
        return f"tsae_{cfg.activation}_layer_norm_{cfg.layer_norm}"
    if cfg.hysteresis != "causal":
        return f"tsae_{cfg.activation}_{cfg.hysteresis.replace('-', '_')}"
    if cfg.input_scale != 1.0 and cfg.kind.saelens is not None:
        return f"tsae_{cfg.activation}_scaled"
    if cfg.d_out:
        return TRANSCODERS.get(cfg.kind.saelens or "", f"tsae_{cfg.activation}_transcoder")
    return cfg.kind.saelens or f"tsae_{cfg.activation}"


def tensor_shapes(cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
    """The saved tensors; learned thresholds are saved as `threshold` and `release` too."""
    d_in, d_sae = cfg.d_in, cfg.d_sae
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,)}
    shapes |= {"W_dec": (d_sae, cfg.width_out), "b_dec": (cfg.width_out,)}
    shapes |= {"threshold": (d_sae,)} if cfg.kind.stores_threshold else {}
    shapes |= {"release": (d_sae,)} if cfg.kind.release else {}
    shapes |= {"decay": (d_sae,)} if cfg.kind.recurrent else {}
    return shapes | ({"rates": (2, d_sae), "bit_price": ()} if cfg.kind.rates else {})


def save(directory: Path, cfg: SAEConfig, tensors: Tensors, said: dict[str, Any]) -> None:
    """Write an autoencoder to ``directory``, each file atomically.

    tensors: at least those of `tensor_shapes`; others are not saved
    said: more values for `cfg.json`'s `metadata`
    """
    directory.mkdir(parents=True, exist_ok=True)
    own = dataclasses.asdict(cfg)
    values = {"dtype": "float32", "device": "cpu", **_saelens_fields(cfg)}
    values["metadata"] = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        **said,
        "tsae": own,
    }
    weights = {name: tensors[name].detach().float().cpu().contiguous() for name in tensor_shapes(cfg)}
    with atomic_write(directory / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={CHECKSUM: _checksum(own, weights)})
    write_json(directory / CONFIG, values)


def _saelens_fields(cfg: SAEConfig) -> dict[str, Any]:
    """The fields from which SAELens takes what it computes; it ignores `metadata.tsae`."""
    values: dict[str, Any] = {
        "architecture": architecture(cfg),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if cfg.d_out:
        values |= {"d_out": cfg.d_out}
    if values["architecture"] == "topk":
        values |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    return values


def saved_config(directory: Path) -> dict[str, Any] | None:
    """Our configuration in a directory's `cfg.json`; None if another library wrote it."""
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no {name}, so it holds no autoencoder; name a run's sae/ directory.")
    metadata = load_json(directory / CONFIG).get("metadata")
    return metadata.get("tsae") if isinstance(metadata, dict) else None


def load(directory: Path) -> tuple[SAEConfig, Tensors, dict[str, Any]]:
    """Configuration, tensors and metadata of an autoencoder written by `save`.

    Raises:
        UserError: a file is missing, damaged or edited, another library wrote it, a tensor has the wrong shape or is
            unknown, or a field of the metadata has the wrong type.
    """
    own = saved_config(directory)
    if own is None:
        raise UserError(
            f"{directory} was not written by tsae ({CONFIG} has no metadata.tsae); read it with tsae.load, which knows "
            "other libraries' formats."
        )
    cfg = from_dict(SAEConfig, own)
    cfg.check()
    path = directory / WEIGHTS
    found = read_safetensors(path)
    shapes = tensor_shapes(cfg)
    tensors = require_tensors(path, found, shapes)
    with safe_open(path, framework="pt") as file:
        checksum = (file.metadata() or {}).get(CHECKSUM)
    if checksum is not None and checksum != _checksum(own, found):
        raise UserError(
            f"{path} is damaged, or metadata.tsae in {CONFIG} was edited: the checksum does not match; restore both "
            "files, or train again."
        )
    for name in () if checksum is not None else ALWAYS:  # all of ours have a checksum; others save them again without
        if name not in own:
            raise UserError(f"{directory / CONFIG} has no metadata.tsae.{name}; restore the file.")
    for name in found.keys() - shapes.keys():
        raise UserError(
            f"{path} has the tensor {name}, which the activation {cfg.activation} does not have; restore the file."
        )
    values = load_json(directory / CONFIG)
    for name, value in _saelens_fields(cfg).items():
        if name in values and values[name] != value:
            raise UserError(
                f"{directory / CONFIG} has {name} = {values[name]!r}, but its metadata.tsae means {value!r}; restore "
                "the file."
            )
    if cfg.kind.release and bool(((tensors["release"] > tensors["threshold"]) | (tensors["release"] < 0)).any()):
        raise UserError(f"{path}: release must be from 0 to threshold for every feature; restore the file.")
    if cfg.kind.rates and bool(((tensors["rates"] <= 0) | (tensors["rates"] >= 1)).any()):
        raise UserError(f"{path}: rates must be between 0 and 1 for every feature; restore the file.")
    if cfg.kind.recurrent and not bool(((tensors["decay"] >= 0) & (tensors["decay"] <= LARGEST_DECAY)).all()):
        raise UserError(f"{path}: decay must be from 0 to {LARGEST_DECAY} for every feature; restore the file.")
    said = {name: value for name, value in values["metadata"].items() if name != "tsae"}
    said = metadata.checked(directory / CONFIG, said, transcoder=cfg.d_out > 0)
    if "hook_layer" in said and "hook_name" not in values["metadata"]:  # our first versions named only the layer
        said.setdefault("hook_name", f"blocks.{said['hook_layer']}.hook_resid_post")
    return cfg, tensors, said


def _checksum(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """XXH3 (128 bits) of a configuration and its float32 tensors on the CPU."""
    digest = xxhash.xxh3_128(checksum_of(config).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
