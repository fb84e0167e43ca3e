"""Against the real SAELens: our files load there, its files load here, and both compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_cases import D_IN, D_SAE, K, activations, same_outputs, same_to, trained
from safetensors.torch import load_file, save_file

import tsae
from tsae.config import SAEConfig
from tsae.errors import UserError
from tsae.sae.model import SparseAutoencoder

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed; make peers")

ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("activation", ARCHITECTURES)
def test_saved_directory_loads_in_saelens(activation: str, subtract: bool, tmp_path: Path) -> None:
    sae = trained(activation, apply_b_dec_to_input=subtract)
    sae.save(tmp_path, model_name="m", hook_name="blocks.1.hook_resid_post")
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == ARCHITECTURES[activation]
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    x = activations()
    with torch.no_grad():
        h = sae.encode(x)
        assert 1 < float((h > 0).sum(-1).float().mean()) < D_SAE / 2 + 5
        same_to(theirs.encode(x), h)
        same_to(theirs(x), sae(x))


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "schmitt"},
        {"activation": "gelu"},
        {"activation": "relu", "layer_norm": "pre"},
        {"activation": "topk", "input_scale": 2.0},
    ],
)
def test_what_saelens_cannot_compute_it_refuses(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    monkeypatch.delitem(SAE_CLASS_REGISTRY, "tsae_schmitt", raising=False)  # tsae.integrations.sae_lens registers it
    trained(**options).save(tmp_path)
    with pytest.raises(KeyError, match="tsae_"):
        sae_lens.SAE.load_from_disk(tmp_path)


def theirs_of(kind: str, **options: object) -> object:
    """A SAELens autoencoder with random weights, for activations around zero."""
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(kind)
    if kind == "topk":
        options = {"k": K, **options}
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.copy_(parameter.abs())
    return sae


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("jumprelu", {"apply_b_dec_to_input": False}),
        ("gated", {}),
        ("gated", {"apply_b_dec_to_input": False}),
        ("gated", {"dtype": "bfloat16"}),
    ],
)
def test_saelens_directories_load_here(kind: str, options: dict[str, object], tmp_path: Path) -> None:
    theirs = theirs_of(kind, **options)
    theirs.save_model(tmp_path)
    ours, x = tsae.load(tmp_path), activations(mean=0.5, scale=1.0)
    theirs = theirs.to(dtype=torch.float32)
    same_outputs(ours, theirs, x)
    assert not ours.training


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka_batchtopk", "jumprelu"])
@pytest.mark.parametrize("rescale", [True, False])
def test_checkpoints_and_results_of_saelens_training_load_here(kind: str, rescale: bool, tmp_path: Path) -> None:
    """The checkpoint of a training, and the inference autoencoder that SAELens makes from it."""
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(kind)
    options = {} if kind == "jumprelu" else {"k": K, "rescale_acts_by_decoder_norm": rescale}
    if kind == "matryoshka_batchtopk":
        options["matryoshka_widths"] = [16, D_SAE]
    theirs = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **options))
    if hasattr(theirs, "topk_threshold"):
        theirs.topk_threshold.fill_(0.15)
    theirs.save_model(tmp_path / "checkpoint")
    theirs.save_inference_model(tmp_path / "inference")
    reference, x = sae_lens.SAE.load_from_disk(tmp_path / "inference"), activations(mean=0.5, scale=1.0)
    for name in ("checkpoint", "inference"):
        same_outputs(tsae.load(tmp_path / name), reference, x)


def test_a_checkpoint_with_its_scaling_factor(tmp_path: Path) -> None:
    theirs = theirs_of("standard", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    with pytest.raises(UserError, match="a factor that the directory does not contain"):
        tsae.load(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25, "has_whitening": False}))
    ours, x = tsae.load(tmp_path), activations(mean=0.5, scale=1.0)
    theirs.fold_activation_norm_scaling_factor(0.25)
    same_outputs(ours, theirs, x)


@pytest.mark.parametrize("kind", ["standard", "topk", "gated"])
def test_configurations_from_before_version_6(kind: str, tmp_path: Path) -> None:
    """The flat `cfg.json` of versions 3 to 5, with topk as an activation function; SAELens reads it too."""
    theirs_of(kind).save_model(tmp_path)
    old = {
        "architecture": "gated" if kind == "gated" else "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "model_name": "pythia-70m",
        "hook_name": "blocks.4.hook_resid_post",
        "hook_layer": 4,
        "activation_fn_str": "topk" if kind == "topk" else "relu",
        "activation_fn_kwargs": {"k": K} if kind == "topk" else {},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "normalize_activations": False,
        "context_size": 128,
        "prepend_bos": True,
        "sae_lens_training_version": "4.0.0",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    weights = load_file(tmp_path / "sae_weights.safetensors")
    save_file(weights | {"scaling_factor": torch.ones(D_SAE)}, tmp_path / "sae_weights.safetensors")
    theirs, ours, x = sae_lens.SAE.load_from_disk(tmp_path), tsae.load(tmp_path), activations(mean=0.5, scale=1.0)
    same_outputs(ours, theirs, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize_activations": "layer_norm"}, "normalizes each token separately"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalizes each token separately"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
    ],
)
def test_what_cannot_be_folded_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    theirs_of("standard", **options).save_model(tmp_path)
    with pytest.raises(UserError, match=message):
        tsae.load(tmp_path)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    theirs_of("standard").save_model(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    for kind in ("skip_transcoder", "matching_pursuit", "temporal"):
        (tmp_path / "cfg.json").write_text(json.dumps(values | {"architecture": kind}))
        with pytest.raises(UserError, match=f"architecture '{kind}'"):
            tsae.load(tmp_path)


@pytest.mark.parametrize(("activation", "kind"), [("relu", "transcoder"), ("jumprelu", "jumprelu_transcoder")])
def test_transcoders_load_in_saelens_and_here(activation: str, kind: str, tmp_path: Path) -> None:
    cfg = SAEConfig(d_in=D_IN, d_out=7, d_sae=D_SAE, k=K, activation=activation, apply_b_dec_to_input=False)
    sae = SparseAutoencoder(cfg, generator=torch.Generator().manual_seed(0)).eval()
    sae.b_enc.data.normal_(generator=torch.Generator().manual_seed(1))
    if activation == "jumprelu":
        sae.threshold.fill_(0.3)
        sae.update_threshold_parameters()
    sae = sae.folded(torch.full((D_IN,), 5.0), 3.0, torch.ones(7), 2.0)
    sae.save(tmp_path / "ours", model_name="m", hook_name="blocks.1.hook_mlp_in", hook_name_out="blocks.1.hook_mlp_out")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert theirs.cfg.architecture() == kind
    assert theirs.cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"
    x = activations(mean=5.0, scale=3.0)
    with torch.no_grad():
        same_to(theirs.encode(x), sae.encode(x))
        same_to(theirs(x), sae(x))
        theirs.save_model(tmp_path / "theirs")
        same_to(tsae.load(tmp_path / "theirs")(x), sae(x))
