"""`tsae.load` on files of other formats, written here without their libraries: values by formula, and bad input."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tsae
from tsae.config import SAEConfig
from tsae.sae.model import SparseAutoencoder

D_IN, D_SAE, K = 8, 24, 3
ROOT = Path(__file__).parents[2]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 10, D_IN, generator=torch.Generator().manual_seed(1))


def linear(weights: dict[str, torch.Tensor], bias: str = "b_dec") -> dict[str, torch.Tensor]:
    """The same weights as two linear layers."""
    return {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(),
        bias: weights["b_dec"],
    }


def pre(weights: dict[str, torch.Tensor], x: torch.Tensor, subtract: bool = True) -> torch.Tensor:
    return (x - weights["b_dec"] * subtract) @ weights["W_enc"] + weights["b_enc"]


def topk(z: torch.Tensor) -> torch.Tensor:
    values, indices = z.relu().topk(K, dim=-1)
    return torch.zeros_like(z).scatter(-1, indices, values)


def check(sae: SparseAutoencoder, weights: dict[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor) -> None:
    assert not sae.training
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), h)
        torch.testing.assert_close(sae(x), h @ weights["W_dec"] + weights["b_dec"])


def saelens(directory: Path, weights: dict[str, torch.Tensor], **values: Any) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "sae_weights.safetensors")
    base = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "metadata": {"sae_lens_version": "6.54.0"}}
    (directory / "cfg.json").write_text(json.dumps(base | values))
    return directory


def ae(directory: Path, state: dict[str, Any], **trainer: Any) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(state, directory / "ae.pt")
    if trainer:
        (directory / "config.json").write_text(json.dumps({"trainer": trainer}))
    return directory


def test_saelens(weights, x, tmp_path) -> None:
    check(tsae.load(saelens(tmp_path, weights)), weights, x, pre(weights, x).relu())
    check(tsae.load(str(tmp_path)), weights, x, pre(weights, x).relu())
    check(tsae.load(tmp_path / "cfg.json"), weights, x, pre(weights, x).relu())
    saelens(tmp_path, weights, architecture="topk", k=K, apply_b_dec_to_input=False)
    check(tsae.load(tmp_path), weights, x, topk(pre(weights, x, False)))
    threshold = torch.linspace(-0.5, 2, D_SAE)
    saelens(tmp_path, weights | {"threshold": threshold}, architecture="jumprelu")
    z = pre(weights, x)
    check(tsae.load(tmp_path), weights, x, z.relu() * (z > threshold))


def test_saelens_gated(weights, x, tmp_path) -> None:
    generator = torch.Generator().manual_seed(2)
    gate, magnitude, r = (0.5 * torch.randn(D_SAE, generator=generator) for _ in range(3))
    stored = {name: weights[name] for name in ("W_enc", "W_dec", "b_dec")}
    saelens(tmp_path, stored | {"b_gate": gate, "b_mag": magnitude, "r_mag": r}, architecture="gated")
    z = (x - weights["b_dec"]) @ weights["W_enc"]
    check(tsae.load(tmp_path), weights, x, (z + gate > 0) * (r.exp() * z + magnitude).relu())


def test_saelens_scaling_factor(weights, x, tmp_path) -> None:
    """A factor on features before the decoder, from finetuning before version 6."""
    factor = torch.linspace(0.5, 2, D_SAE)
    saelens(tmp_path, weights | {"scaling_factor": factor}, finetuning_scaling_factor=True)
    sae, h = tsae.load(tmp_path), pre(weights, x).relu()
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), h)
        torch.testing.assert_close(sae(x), (h * factor) @ weights["W_dec"] + weights["b_dec"])
    saelens(tmp_path, weights | {"scaling_factor": factor})
    with pytest.raises(tsae.UserError, match="scaling_factor"):
        tsae.load(tmp_path)


def test_dictionary_learning(weights, x, tmp_path) -> None:
    z, theta = pre(weights, x), torch.tensor(0.8)
    check(tsae.load(ae(tmp_path / "relu", linear(weights, "bias"))), weights, x, z.relu())
    old_topk = linear(weights) | {"k": torch.tensor(K)}
    check(tsae.load(ae(tmp_path / "topk", old_topk)), weights, x, topk(z))
    batch = linear(weights) | {"k": torch.tensor(K), "threshold": theta}
    for kind in ("BatchTopKSAE", "TemporalBatchTopKSAE"):
        check(tsae.load(ae(tmp_path / kind, batch, dict_class=kind)), weights, x, z * (z > theta))
    check(tsae.load(tmp_path / "BatchTopKSAE" / "ae.pt"), weights, x, z * (z > theta))


@pytest.mark.parametrize("kind", ["MatryoshkaBatchTopKSAE", "TemporalMatryoshkaBatchTopKSAE", None])
def test_matryoshka_and_t_sae(kind: str | None, weights, x, tmp_path) -> None:
    state = weights | {"k": torch.tensor(K), "threshold": torch.tensor(0.8), "group_sizes": torch.tensor([4, 20])}
    sae = tsae.load(ae(tmp_path, state, **({"dict_class": kind} if kind else {})))
    z = pre(weights, x)
    check(sae, weights, x, z * (z > 0.8))
    assert (sae.cfg.activation, sae.cfg.groups, sae.cfg.k) == ("batchtopk", (4, D_SAE), K)


def test_sparsify(weights, x, tmp_path) -> None:
    stored = linear(weights)
    del stored["decoder.weight"]
    save_file(stored | {"W_dec": weights["W_dec"]}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D_IN, "expansion_factor": 3, "num_latents": 0, "k": K}))
    check(tsae.load(tmp_path), weights, x, topk(pre(weights, x)))


def test_gemma_scope(weights, x, tmp_path) -> None:
    threshold = torch.rand(D_SAE, generator=torch.Generator().manual_seed(2))
    z = pre(weights, x, False)
    arrays = {name: tensor.numpy() for name, tensor in (weights | {"threshold": threshold}).items()}
    np.savez(tmp_path / "params.npz", **arrays)
    for place in (tmp_path, tmp_path / "params.npz"):
        check(tsae.load(place), weights, x, z.relu() * (z > threshold))
    second = tmp_path / "second"
    second.mkdir()
    lower = {name.replace("W_", "w_"): tensor for name, tensor in (weights | {"threshold": threshold}).items()}
    save_file(lower, second / "params.safetensors")
    (second / "config.json").write_text(json.dumps({"architecture": "jump_relu"}))
    check(tsae.load(second), weights, x, z.relu() * (z > threshold))


def test_our_own_directories(tmp_path) -> None:
    sae = SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, activation="schmitt")).eval()
    sae.threshold.fill_(0.5)
    sae.release.fill_(0.1)
    sae.save(tmp_path / "run" / "sae")
    (tmp_path / "run" / "config.json").write_text("{}")
    for place in ("run", "run/sae", "run/sae/cfg.json"):
        loaded = tsae.load(tmp_path / place)
        assert loaded.cfg == sae.cfg
        assert torch.equal(loaded.release, sae.release)


# A fake hub; tests/hub tests what all readers of the hub share.


def test_a_repository_on_the_hub(weights, x, tmp_path, monkeypatch, hub) -> None:
    saelens(tmp_path / "saelens", weights)
    ae(tmp_path / "dictionary", linear(weights, "bias"), dict_class="AutoEncoder")
    files = {}
    for folder in ("saelens", "dictionary"):
        files |= {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / folder).rglob("*") if p.is_file()}
        shutil.rmtree(tmp_path / folder)
    hub.repositories["someone/saes"] = {**files, "README.md": b"# many", "saelens/training.bin": b"large"}
    monkeypatch.chdir(tmp_path)
    check(tsae.load("someone/saes/saelens@v1.0"), weights, x, pre(weights, x).relu())
    assert any("/revision/v1.0" in request for request in hub.requests)
    assert hub.fetched() == {name for name in files if name.startswith("saelens/")}  # never a whole repository
    check(tsae.load("someone/saes/dictionary"), weights, x, pre(weights, x).relu())
    assert hub.fetched() == set(files)
    with pytest.raises(tsae.UserError, match=r"someone/saes holds no autoencoder in a known format"):
        tsae.load("someone/saes")


# Bad input.


def test_no_such_place_and_no_known_format(tmp_path, hub) -> None:
    for missing in (str(tmp_path / "nothing"), "./nothing", "nothing", "../a/b"):
        with pytest.raises(tsae.UserError, match="There is no "):
            tsae.load(missing)
    assert not hub.requests
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(tsae.UserError) as caught:
        tsae.load(tmp_path)
    for name in ("sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz", "sae/cfg.json"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_shapes_are_named(weights, tmp_path) -> None:
    saelens(tmp_path / "a", weights | {"b_enc": torch.zeros(D_SAE + 1)})
    with pytest.raises(tsae.UserError, match=r"sae_weights.safetensors: b_enc has the shape \(25,\); expected \(24,\)"):
        tsae.load(tmp_path / "a")
    saelens(tmp_path / "a", weights, d_in=9)
    with pytest.raises(tsae.UserError, match=r"W_enc has the shape \(8, 24\); expected \(9, 24\)"):
        tsae.load(tmp_path / "a")
    ae(tmp_path / "b", linear(weights, "bias") | {"decoder.weight": torch.zeros(D_SAE, D_IN)})
    with pytest.raises(tsae.UserError, match=r"ae.pt: decoder.weight has the shape \(24, 8\); expected \(8, 24\)"):
        tsae.load(tmp_path / "b")
    np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    with pytest.raises(tsae.UserError, match=r"params.npz has no tensor threshold; it has \['W_dec', 'W_enc', "):
        tsae.load(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.zeros(3))
    with pytest.raises(tsae.UserError, match=r"W_enc has the shape \(3,\); expected a matrix"):
        tsae.load(tmp_path)


@pytest.mark.parametrize(
    ("state", "trainer", "message"),
    [
        ({"threshold": torch.tensor(-1.0), "k": torch.tensor(3)}, {"dict_class": "BatchTopKSAE"}, "threshold is -1.0"),
        ({"threshold": torch.tensor(0.5), "k": torch.tensor(3)}, {}, "may be an AutoEncoderTopK or a BatchTopKSAE"),
        ({"k": torch.tensor(99)}, {}, "k = 99; expected a positive integer of at most 24"),
        ({}, {"dict_class": "CrossCoder"}, "class 'CrossCoder'"),
        ({}, {}, "matches no class that this version reads"),
    ],
)
def test_dictionary_learning_refusals(state, trainer, message, weights, tmp_path) -> None:
    with pytest.raises(tsae.UserError, match=message):
        tsae.load(ae(tmp_path, linear(weights) | state, **trainer))


class Malicious:
    """Unpickling it creates a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch", "pickle", "old pickle", "among tensors", "npz"])
def test_a_malicious_pickle_is_not_executed(kind: str, weights, tmp_path) -> None:
    made = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malicious(made)))  # the attack works
    assert made.is_dir()
    made.rmdir()
    file = tmp_path / ("params.npz" if kind == "npz" else "ae.pt")
    if kind == "torch":
        torch.save(Malicious(made), file)
    elif kind in ("pickle", "old pickle"):
        file.write_bytes(pickle.dumps(Malicious(made), protocol=2 if kind == "old pickle" else None))
    elif kind == "among tensors":
        torch.save(linear(weights, "bias") | {"more": Malicious(made)}, file)
    else:
        np.savez(file, W_enc=np.array([Malicious(made)], dtype=object), allow_pickle=True)
    with pytest.raises(tsae.UserError) as caught:
        tsae.load(tmp_path)
    assert not made.exists()  # but not through tsae.load
    assert "\n" not in str(caught.value)
    assert file.name in str(caught.value)
    if kind != "npz":
        assert "so it was not read" in str(caught.value)


@pytest.mark.parametrize("name", ["ae.pt", "params.npz", "params.safetensors", "sae_weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"PK\x03\x04 and then nothing", b"\x80\x02."])
def test_damaged_files(name: str, content: bytes, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    if name == "sae_weights.safetensors":
        (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": 2, "d_sae": 4}))
    with pytest.raises(tsae.UserError) as caught:
        tsae.load(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_import_is_cheap() -> None:
    """`import tsae` does not import PyTorch; names are imported on first use."""
    code = "import sys, tsae; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules); tsae.load; dir(tsae)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        tsae.lod  # noqa: B018
