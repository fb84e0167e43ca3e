"""Run directories with an untrained autoencoder, and autoencoders in the formats of other libraries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import sample_text

from tsae.config import EvaluationConfig, SAEConfig, TrainConfig
from tsae.sae.model import SparseAutoencoder
from tsae.utils.config_json import to_dict

LAYER, D_IN, D_SAE = 1, 32, 48


def write_run(directory: Path, model: Path, **sae: object) -> Path:
    """Write a run, `config.json` and `sae/`, on random text beside it."""
    text = directory.parent / "text.txt"
    if not text.exists():
        text.write_text(sample_text(20000))
    config = TrainConfig(
        model=str(model),
        layer=LAYER,
        data=str(text),
        device="cpu",
        lm_dtype="float32",
        sae=replace(SAEConfig(d_in=D_IN, d_sae=D_SAE, k=4, activation="topk"), **sae),
        evaluation=EvaluationConfig(sequences=4, ce_sequences=2),
    )
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    autoencoder = SparseAutoencoder(config.sae, generator=torch.Generator().manual_seed(0)).eval()
    autoencoder.threshold.fill_(0.5)
    autoencoder.release.fill_(0.1)
    autoencoder.update_threshold_parameters()
    autoencoder.save(directory / "sae", model_name=str(model), hook_layer=LAYER)
    return directory


def write_saelens(directory: Path, d_in: int = D_IN, scale: float = 1.0) -> Path:
    """Write an autoencoder of SAELens's `standard` architecture, its encoder scaled by ``scale``."""
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, d_in, generator=torch.Generator().manual_seed(1)), dim=1)
    weights = {"W_enc": scale * W_dec.T, "b_enc": torch.zeros(D_SAE), "W_dec": W_dec, "b_dec": torch.zeros(d_in)}
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "sae_weights.safetensors")
    (directory / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": d_in, "d_sae": D_SAE}))
    return directory


def write_dictionary_learning(directory: Path) -> Path:
    """Write a BatchTopK autoencoder in the format of dictionary_learning."""
    weight = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(2)) / D_IN**0.5
    state = {"encoder.weight": weight, "encoder.bias": torch.zeros(D_SAE), "decoder.weight": weight.T.clone()}
    state |= {"b_dec": torch.zeros(D_IN), "k": torch.tensor(4), "threshold": torch.tensor(0.5)}
    directory.mkdir()
    torch.save(state, directory / "ae.pt")
    (directory / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE"}}))
    return directory
