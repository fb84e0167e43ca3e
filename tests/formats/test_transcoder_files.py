"""Transcoders of other libraries, against their formulas, and what is written for SAELens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tsae
from tsae.config import SAEConfig
from tsae.evaluation.places import stated_site
from tsae.export import main as export
from tsae.sae.metadata import target_of
from tsae.sae.model import SparseAutoencoder

D_IN, D_OUT, D_SAE = 8, 5, 20


def tensors(jumprelu: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_OUT), "b_dec": (D_OUT,)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return found | ({"threshold": torch.rand(D_SAE, generator=generator)} if jumprelu else {})


def by_hand(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    pre = x @ weights["W_enc"] + weights["b_enc"]
    return pre.relu() * (pre > weights.get("threshold", torch.zeros(D_SAE))) @ weights["W_dec"] + weights["b_dec"]


def saelens(directory: Path, architecture: str, weights: dict[str, Tensor], **fields: Any) -> Path:
    directory.mkdir()
    said = {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out", "sae_lens_version": "6.54.0"}
    cfg = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_out": D_OUT,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": said,
    }
    (directory / "cfg.json").write_text(json.dumps(cfg | fields))
    save_file(weights, directory / "sae_weights.safetensors")
    return directory


@pytest.mark.parametrize(("architecture", "jumprelu"), [("transcoder", False), ("jumprelu_transcoder", True)])
def test_saelens(architecture: str, jumprelu: bool, tmp_path: Path) -> None:
    weights, x = tensors(jumprelu), torch.randn(3, 7, D_IN, generator=torch.Generator().manual_seed(1))
    sae = tsae.load(saelens(tmp_path / "sae", architecture, weights))
    assert (sae.cfg.d_in, sae.cfg.d_out) == (D_IN, D_OUT)
    torch.testing.assert_close(sae(x), by_hand(weights, x))
    assert stated_site("sae", sae)[0].hook_name == "blocks.1.hook_mlp_in"
    assert target_of(sae.metadata).hook_name == "blocks.1.hook_mlp_out"
    # Written again, it says and computes the same.
    assert export([str(tmp_path / "sae"), "--to", "saelens", "--out", str(tmp_path / "out")]) == 0
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_out"], cfg["apply_b_dec_to_input"]) == (architecture, D_OUT, False)
    again = tsae.load(tmp_path / "out")
    torch.testing.assert_close(again(x), sae(x), rtol=0, atol=0)
    assert again.metadata == sae.metadata
    saved = load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert saved.keys() == weights.keys()
    assert export([str(tmp_path / "sae"), "--to", "dictionary_learning", "--out", str(tmp_path / "dl")]) == 2


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("skip_transcoder", {}, "has the architecture 'skip_transcoder'; this version reads"),
        ("jumprelu_transcoder", {"apply_b_dec_to_input": True}, "is a transcoder with apply_b_dec_to_input"),
        ("jumprelu_transcoder", {"d_out": D_IN}, "W_dec"),
        ("jumprelu_transcoder", {"d_out": None}, "d_out"),
        ("jumprelu", {}, "predicts blocks.1.hook_mlp_out from blocks.1.hook_mlp_in"),
        ("jumprelu", {"metadata": {}}, "has d_out = 5, which jumprelu lacks"),
        (
            "jumprelu_transcoder",
            {"metadata": {"hook_name": "blocks.1.hook_mlp_in", "hook_head_index_out": 3}},
            "predicts head 3 of an attention layer",
        ),
    ],
)
def test_what_is_refused(architecture: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(tsae.UserError, match=message) as info:
        tsae.load(saelens(tmp_path / "sae", architecture, tensors(), **fields))
    assert "\n" not in str(info.value)


def test_gemma_scope(tmp_path: Path) -> None:
    weights, x = tensors(), torch.randn(3, 7, D_IN, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_7"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    sae = tsae.load(folder)
    torch.testing.assert_close(sae(x), by_hand(weights, x))
    assert sae.metadata == {
        "model_name": "google/gemma-2-2b",
        "hook_name": "blocks.3.ln2.hook_normalized",
        "hook_name_out": "blocks.3.hook_mlp_out",
    }
    with pytest.raises(tsae.UserError, match=r"encodes blocks.3.ln2.hook_normalized, which this version"):
        stated_site("sae", sae)


def test_gemma_scope_2(tmp_path: Path) -> None:
    weights, x = tensors(), torch.randn(3, 7, D_IN, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "gemma-scope-2-1b-pt" / "transcoder" / "layer_3_width_16k_l0_big"
    folder.mkdir(parents=True)
    save_file(weights, folder / "params.safetensors")
    config = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
        "affine_connection": False,
        "type": "transcoder",
    }
    (folder / "config.json").write_text(json.dumps(config))
    sae = tsae.load(folder)
    torch.testing.assert_close(sae(x), by_hand(weights, x))
    assert (stated_site("sae", sae)[0].layer, target_of(sae.metadata).key) == (3, ("mlp_out", 3, ""))
    for changes, message in (
        ({"affine_connection": True}, "a transcoder with a skip connection"),
        ({"type": "crosscoder"}, "of the type 'crosscoder'"),
        ({"type": "sae"}, "but its type is 'sae'"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(tsae.UserError, match=message):
            tsae.load(folder)


@pytest.mark.parametrize("activation", ["topk", "gelu", "schmitt"])
def test_what_saelens_has_no_transcoder_for(activation: str, tmp_path: Path) -> None:
    cfg = SAEConfig(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=4, activation=activation, apply_b_dec_to_input=False)
    sae = SparseAutoencoder(cfg).eval()
    sae.threshold.fill_(0.3)
    sae.release.fill_(0.1)
    sae.save(tmp_path / "sae")
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"].startswith("tsae_")
    again = tsae.load(tmp_path / "sae")
    x = torch.randn(2, 9, D_IN)
    torch.testing.assert_close(again(x), sae(x), rtol=0, atol=0)
    assert export([str(tmp_path / "sae"), "--to", "saelens", "--out", str(tmp_path / "out")]) == 2
