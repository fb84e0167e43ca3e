"""An autoencoder on disk: SAELens's directory of `cfg.json` and `sae_weights.safetensors`.

relu is saved as SAELens's `standard`, topk as `topk`, batchtopk and jumprelu as `jumprelu`. SAELens has no form
for `gelu`, `schmitt`, `jumprelu_schmitt` and layer normalization: they carry an architecture name of their own, so
that a reader who does not know them refuses instead of computing something else. Matryoshka groups matter in training
alone.

Directories that SAELens itself wrote are read by `tsae.formats.saelens`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from tsae.config import SAEConfig
from tsae.errors import UserError
from tsae.utils.atomic import atomic_write, checksum_of, write_json
from tsae.utils.config_json import from_dict, load_json

if TYPE_CHECKING:
    from tsae.sae.model import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURE = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
THRESHOLD = ("batchtopk", "jumprelu", "schmitt", "jumprelu_schmitt")  # have the tensor
RELEASE = ("schmitt", "jumprelu_schmitt")
CHECKSUM = "xxh3_128"  # in the header of the weights' file: of them and of `metadata.tsae`
LOGARITHMS = {"log_threshold", "release_logit"}  # parameters that say the same as `threshold` and `release`
SAELENS_VERSION = "6.54.0"  # the format written; a version below 6 is read through a legacy path there


def architecture(cfg: SAEConfig) -> str:
    """The `architecture` of `cfg.json`: SAELens's name where it has the form, else a name of our own."""
    if cfg.layer_norm != "none":
        return f"tsae_{cfg.activation}_layer_norm_{cfg.layer_norm}"
    if cfg.hysteresis == "two-sided":
        return f"tsae_{cfg.activation}_two_sided"
    if cfg.input_scale != 1.0 and cfg.activation in ARCHITECTURE:
        return f"tsae_{cfg.activation}_scaled"
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
    own = checksum_of_tensors(values["metadata"]["tsae"], weights)
    with atomic_write(directory / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={CHECKSUM: own})
    write_json(directory / CONFIG, values)


def load(directory: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read an autoencoder written by `save`, or by SAELens (`tsae.formats.saelens`), in ``eval()`` mode.

    Raises:
        UserError: a file is missing, broken or not as it was written, the architecture is not known, or a tensor has
            the wrong shape.
    """
    from tsae.formats import saelens
    from tsae.formats.tensors import expect, read_safetensors
    from tsae.sae.model import SparseAutoencoder

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"{directory} holds no autoencoder: it has no {name}; name a run's sae/ directory.")
    metadata = load_json(directory / CONFIG).get("metadata")
    own = metadata.get("tsae") if isinstance(metadata, dict) else None
    if own is None:
        return saelens.read(directory).to(device)
    tensors = read_safetensors(directory / WEIGHTS)
    sae = SparseAutoencoder(from_dict(SAEConfig, own)).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items() if name not in LOGARITHMS}
    for name, users in (("threshold", THRESHOLD), ("release", RELEASE)):
        if sae.cfg.activation not in users:
            del shapes[name]
    wanted = expect(directory / WEIGHTS, tensors, shapes)
    _check_whole(directory, own, tensors)
    sae.load_state_dict(wanted, strict=False)  # all but LOGARITHMS
    sae.adopt_thresholds()
    return sae.to(device)


def checksum_of_tensors(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """XXH3 (128 bits) of a configuration and the float32 tensors on the CPU that go with it."""
    digest = xxhash.xxh3_128(checksum_of(config).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _check_whole(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Raise `UserError` unless weights and configuration are as `save` wrote them; others' files have no checksum."""
    path = directory / WEIGHTS
    with safe_open(path, framework="pt") as file:
        wanted = (file.metadata() or {}).get(CHECKSUM)
    if wanted is not None and wanted != checksum_of_tensors(config, tensors):
        raise UserError(
            f"{path} is damaged, or {CONFIG} beside it (metadata.tsae) has changed: their checksum is another than "
            "when they were written; put both back as they were, or train again."
        )
