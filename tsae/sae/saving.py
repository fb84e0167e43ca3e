"""An autoencoder on disk: SAELens's directory of `cfg.json` and `sae_weights.safetensors`.

relu is saved as SAELens's `standard`, topk as `topk`, batchtopk and jumprelu as `jumprelu`. SAELens has no form
for `gelu`, `schmitt`, `jumprelu_schmitt` and layer normalization: they carry an architecture name of their own, so
that a reader who does not know them refuses instead of computing something else. Matryoshka groups matter in training
alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tsae.config import SAEConfig, from_dict, load_json
from tsae.errors import UserError
from tsae.files import replacing, write_json

if TYPE_CHECKING:
    from tsae.sae.model import SparseAutoencoder

__all__ = ["load", "save"]

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURE = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
THRESHOLD = ("batchtopk", "jumprelu", "schmitt", "jumprelu_schmitt")  # have the tensor
RELEASE = ("schmitt", "jumprelu_schmitt")
LOGARITHMS = {"log_threshold", "release_logit"}  # parameters that say the same as `threshold` and `release`
SAELENS_VERSION = "6.54.0"  # the format written; a version below 6 is read through a legacy path there


def architecture(cfg: SAEConfig) -> str:
    """The `architecture` of `cfg.json`: SAELens's name where it has the form, else a name of our own."""
    if cfg.layer_norm != "none":
        return f"tsae_{cfg.activation}_layer_norm_{cfg.layer_norm}"
    if cfg.hysteresis == "two-sided":
        return f"tsae_{cfg.activation}_two_sided"
    return ARCHITECTURE.get(cfg.activation, f"tsae_{cfg.activation}")


def save(sae: SparseAutoencoder, directory: Path, metadata: dict[str, object]) -> None:
    """Write ``sae`` to ``directory``, each file atomically.

    ``metadata`` goes into `cfg.json`'s `metadata`: `model_name`, `hook_name`, `context_size`, `prepend_bos`,
    `dataset_path` are the names SAELens reads.
    """
    directory.mkdir(parents=True, exist_ok=True)
    cfg = sae.cfg
    values: dict[str, Any] = {
        "architecture": architecture(cfg),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            **metadata,
            "tsae": dataclasses.asdict(cfg),
        },
    }
    if values["architecture"] == "topk":
        values |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    if sae.training:
        sae.refresh_thresholds()
    state = sae.state_dict()
    for name in LOGARITHMS & state.keys():
        del state[name]
    if cfg.activation not in THRESHOLD:
        del state["threshold"]
    if cfg.activation not in RELEASE:
        del state["release"]
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    with replacing(directory / WEIGHTS) as temporary:
        save_file(weights, temporary)
    write_json(directory / CONFIG, values)


def load(directory: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read an autoencoder written by `save` or by SAELens (standard, topk, jumprelu), in ``eval()`` mode.

    Raises:
        UserError: a file is missing or broken, the architecture is not known, or a tensor has the wrong shape.
    """
    from tsae.sae.model import SparseAutoencoder

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"{directory} holds no autoencoder: it has no {name}; name a run's sae/ directory.")
    cfg = _config(load_json(directory / CONFIG), directory)
    try:
        weights = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory / WEIGHTS} cannot be read ({error}); the file is damaged.") from None
    sae = SparseAutoencoder(cfg).eval()
    expected = {name: tensor for name, tensor in sae.state_dict().items() if name not in LOGARITHMS}
    optional = {"threshold", "release"}
    for name, tensor in expected.items():
        if name not in weights:
            needed = name == "threshold" and cfg.activation in ("jumprelu", "schmitt", "jumprelu_schmitt")
            if name in optional and not needed:
                continue
            raise UserError(f"{directory / WEIGHTS} has no tensor {name}; it has {sorted(weights)}.")
        if weights[name].shape != tensor.shape:
            got, wanted = tuple(weights[name].shape), tuple(tensor.shape)
            raise UserError(f"{directory / WEIGHTS}: {name} is {got}; cfg.json asks for {wanted}.")
    values = {name: weights.get(name, tensor).float() for name, tensor in expected.items()}
    sae.load_state_dict(values, strict=False)  # all but LOGARITHMS
    sae.adopt_thresholds()
    return sae.to(device)


def _config(values: dict[str, Any], directory: Path) -> SAEConfig:
    own = (values.get("metadata") or {}).get("tsae")
    if own is not None:
        return from_dict(SAEConfig, own)
    kinds = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
    kind = values.get("architecture")
    if kind not in kinds:
        raise UserError(f"{directory / CONFIG} is of architecture {kind!r}; this version reads {sorted(kinds)}.")
    for name in ("d_in", "d_sae"):
        if not isinstance(values.get(name), int):
            raise UserError(f"{directory / CONFIG} has {name} = {values.get(name)!r}; it must be a whole number.")
    return SAEConfig(
        d_in=values["d_in"],
        d_sae=values["d_sae"],
        activation=kinds[kind],  # type: ignore[arg-type]
        k=values.get("k", min(32, values["d_sae"])),
        unit_norm_decoder=False,
        apply_b_dec_to_input=bool(values.get("apply_b_dec_to_input", True)),
    )
