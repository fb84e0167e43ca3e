"""`python -m tsae.export`: files that load again and compute the same, refusals, and hysteresis dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluated_run import D_IN, write_run

import tsae
from tsae.config import SAEConfig
from tsae.evaluate import main as evaluate
from tsae.export import main
from tsae.formats.forms import without_hysteresis
from tsae.sae.model import SparseAutoencoder
from tsae.sae.release import with_release_ratio


def x() -> torch.Tensor:
    return torch.randn(3, 20, D_IN, generator=torch.Generator().manual_seed(1))


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("to", ["saelens", "dictionary_learning"])
def test_exported_autoencoders_load_again(activation: str, to: str, tiny_gemma3, tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", tiny_gemma3, activation=activation)
    (run / "eval.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()  # may exist if empty
    assert main([str(run), "--to", to, "--out", str(out)]) == 0
    weights = ["cfg.json", "sae_weights.safetensors"]
    if to == "dictionary_learning":
        weights = ["trainer_0/ae.pt", "trainer_0/config.json"]
    assert listing(out) == sorted(["eval.json", *weights])
    assert "Written" in capsys.readouterr().err
    a, b = tsae.load(run), tsae.load(out)
    with torch.no_grad():
        torch.testing.assert_close(b.encode(x()), a.encode(x()))
        torch.testing.assert_close(b(x()), a(x()))


def test_hysteresis_is_refused_or_dropped_and_measured_anew(tiny_gemma3, tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", tiny_gemma3, activation="schmitt")
    assert evaluate([str(run)]) == 0
    for to in ("saelens", "dictionary_learning"):
        assert main([str(run), "--to", to, "--out", str(tmp_path / "no")]) == 2
        assert "--drop-hysteresis exports the plain threshold" in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
    out = tmp_path / "out"
    assert main([str(run), "--to", "saelens", "--out", str(out), "--drop-hysteresis"]) == 0
    assert listing(out) == ["cfg.json", "eval.json", "sae_weights.safetensors", "sparsity.safetensors"]
    cfg = json.loads((out / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu"
    factor = cfg["metadata"]["hysteresis_dropped"]["threshold_factor"]
    assert 0.2 < factor < 1  # the release is 0.2 of the threshold
    plain, original = tsae.load(out), tsae.load(run)
    torch.testing.assert_close(plain.threshold, factor * original.threshold)
    before, after = (json.loads((d / "eval.json").read_text()) for d in (run, out))
    assert after["l0"] == pytest.approx(before["l0"], rel=0.05)
    assert after["temporal"]["persistence_excess"] < before["temporal"]["persistence_excess"]
    # Evaluating the exported directory on the run's text gives the same metrics.
    options = ["--model", str(tiny_gemma3), "--layer", "1", "--out", str(tmp_path / "again.json")]
    assert evaluate([str(out), str(run), *options]) == 0
    again = json.loads((tmp_path / "again.json").read_text())["out"]
    assert again["l0"] == pytest.approx(after["l0"])
    assert again["explained_variance"] == pytest.approx(after["explained_variance"])
    # dictionary_learning also has a form for one threshold.
    second = tmp_path / "second"
    assert main([str(run), "--to", "dictionary_learning", "--out", str(second), "--drop-hysteresis"]) == 0
    assert json.loads((second / "trainer_0" / "config.json").read_text())["trainer"]["dict_class"] == "BatchTopKSAE"


@pytest.mark.parametrize("activation", ["schmitt", "jumprelu_schmitt"])
def test_the_factor_gives_the_same_l0(activation: str) -> None:
    cfg = SAEConfig(d_in=D_IN, d_sae=96, k=4, activation=activation)
    sae = SparseAutoencoder(cfg, generator=torch.Generator().manual_seed(0)).eval()
    sae.threshold.copy_(torch.linspace(0.5, 1.5, 96))
    sae.release.copy_(0.3 * sae.threshold)
    sae.update_threshold_parameters()
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        segments = torch.zeros(4, 30, dtype=torch.int32)
        segments[:, 10:] = 1
        segments[0, 25:] = -1
        batches.append((torch.randn(4, 30, D_IN, generator=generator).cumsum(1) / 4, segments))

    def active(autoencoder: SparseAutoencoder) -> int:
        return sum(int((autoencoder.encode(x, s)[s >= 0] > 0).sum()) for x, s in batches)

    factor = with_release_ratio(sae, 1.0, batches).factor
    assert 0.3 < factor < 1
    assert active(without_hysteresis(sae, factor)) == active(sae) > active(without_hysteresis(sae))


def test_a_release_at_the_threshold_is_no_hysteresis(tiny_gemma3, tmp_path) -> None:
    run = write_run(tmp_path / "run", tiny_gemma3, activation="schmitt")
    sae = tsae.load(run)
    sae.release.copy_(sae.threshold)
    sae.save(run / "sae")
    assert main([str(run), "--to", "saelens", "--out", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        torch.testing.assert_close(tsae.load(tmp_path / "out").encode(x()), sae.encode(x()))


@pytest.mark.parametrize(
    ("sae", "options", "message"),
    [
        ({"activation": "gelu"}, [], "no equivalent of the activation gelu"),
        ({"activation": "relu", "layer_norm": "pre"}, [], "no equivalent of layer normalization"),
        ({"activation": "topk", "input_scale": 2.0}, [], "no equivalent of a scaled input"),
        ({"activation": "schmitt", "layer_norm": "pre"}, ["--drop-hysteresis"], "no equivalent of layer normalization"),
        ({"activation": "topk"}, ["--out", "FULL"], "is not an empty directory"),
        ({"activation": "topk"}, ["--to", "onnx"], "expected one of"),
    ],
)
def test_refusals_are_one_sentence_and_write_nothing(sae, options, message, tiny_gemma3, tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", tiny_gemma3, **sae)
    before = listing(tmp_path)
    options = [str(tmp_path) if a == "FULL" else a for a in options]
    assert main([str(run), "--to", "saelens", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert listing(tmp_path) == before


def test_dropping_needs_a_run(tiny_gemma3, tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", tiny_gemma3, activation="schmitt")
    options = ["--to", "saelens", "--out", str(tmp_path / "out"), "--drop-hysteresis"]
    assert main([str(run / "sae"), *options]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp").exists()
