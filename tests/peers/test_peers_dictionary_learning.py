"""Against the real dictionary_learning: its files load here, and ours there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_cases import D_IN, D_SAE, K, activations, same_to, trained

import tsae

reason = "dictionary-learning is not installed; make peers"
dictionary = pytest.importorskip("dictionary_learning.dictionary", reason=reason)
trainers = pytest.importorskip("dictionary_learning.trainers", reason=reason)


def theirs_of(kind: str) -> Any:
    """One of its autoencoders with random weights."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    makers = {
        "AutoEncoder": lambda: dictionary.AutoEncoder(D_IN, D_SAE),
        "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D_IN, D_SAE),
        "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D_IN, D_SAE),
        "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D_IN, D_SAE),
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [16, D_SAE - 16]),
    }
    sae = makers[kind]()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        if "threshold" in sae.state_dict():
            sae.threshold.copy_(sae.threshold.abs() if sae.threshold.dim() else torch.tensor(0.7))
    return sae


def read_both(sae: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its features and reconstruction; its Matryoshka class needs flat tokens."""
    with torch.no_grad():
        h = sae.encode(x.flatten(0, 1))
        return h.reshape(*x.shape[:-1], -1), sae.decode(h).reshape(x.shape)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "GatedAutoEncoder",
        "JumpReluAutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    ],
)
def test_their_files_load_here(kind: str, config: bool, tmp_path: Path) -> None:
    theirs, x = theirs_of(kind), activations(mean=0.5, scale=1.0)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    if config:
        trainer = {"dict_class": kind, "k": K, "activation_dim": D_IN, "dict_size": D_SAE}
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    elif kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        with pytest.raises(tsae.UserError, match=r"AutoEncoderTopK or a BatchTopKSAE.*config\.json"):
            tsae.load(tmp_path)
        return
    ours = tsae.load(tmp_path)
    h, xhat = read_both(theirs, x)
    with torch.no_grad():
        same_to(ours.encode(x), h)
        same_to(ours(x), xhat)
    if kind == "MatryoshkaBatchTopKSAE":
        assert ours.cfg.groups == (16, D_SAE)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"activation": "relu"}, "AutoEncoder"),
        ({"activation": "relu", "apply_b_dec_to_input": False}, "AutoEncoder"),
        ({"activation": "topk"}, "AutoEncoderTopK"),
        ({"activation": "batchtopk"}, "BatchTopKSAE"),
        ({"activation": "batchtopk", "groups": (16, D_SAE)}, "MatryoshkaBatchTopKSAE"),
        ({"activation": "jumprelu"}, "JumpReluAutoEncoder"),
    ],
)
def test_what_we_export_loads_there(options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    from dictionary_learning.utils import load_dictionary

    from tsae.export import main

    sae, x = trained(**options), activations()
    sae.save(tmp_path / "sae", model_name="m", hook_layer=3, context_size=129)
    out = tmp_path / "out"
    assert main([str(tmp_path / "sae"), "--to", "dictionary_learning", "--out", str(out)]) == 0
    assert sorted(p.name for p in (out / "trainer_0").iterdir()) == ["ae.pt", "config.json"]
    state = torch.load(out / "trainer_0" / "ae.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    theirs, config = load_dictionary(str(out / "trainer_0"), "cpu")
    assert config["trainer"]["dict_class"] == type(theirs).__name__ == kind
    assert (config["trainer"]["layer"], config["trainer"]["lm_name"], config["buffer"]["ctx_len"]) == (3, "m", 129)
    h, xhat = read_both(theirs, x)
    with torch.no_grad():
        # JumpReluAutoEncoder does not subtract b_dec, which is 600 in every dimension, so float32 rounds more.
        tolerance = 1e-5 if kind != "JumpReluAutoEncoder" else 1e-4
        same_to(h, sae.encode(x), tolerance)
        same_to(xhat, sae(x))
    again = tsae.load(out)
    with torch.no_grad():
        same_to(again.encode(x), sae.encode(x), tolerance)
