"""Autoencoders of other libraries and several side by side, on a tiny language model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from evaluated_run import D_SAE, LAYER, write_dictionary_learning, write_run, write_saelens
from tiny import sample_text

import tsae.data.harvest
import tsae.evaluation.held_out
from tsae.evaluate import main
from tsae.evaluation.metrics import LanguageModelMetrics


def files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sample_text(20000))
    return path


@pytest.fixture
def options(tiny_gemma3, text) -> list[str]:
    more = ["--data", str(text), "--tokens", "512", "--ce-sequences", "2", "--device", "cpu"]
    return ["--model", str(tiny_gemma3), "--layer", str(LAYER), *more]


def test_an_autoencoder_of_another_library(options, tmp_path, capsys) -> None:
    sae = write_saelens(tmp_path / "theirs")
    before = files(sae)
    assert main([str(sae), *options, "--out", str(tmp_path / "out.json")]) == 0
    metrics = json.loads((tmp_path / "out.json").read_text())
    out = capsys.readouterr().out
    assert "explained variance" in out
    assert "P(stays on)" in out
    assert set(metrics["temporal"]) >= {"persistence_excess", "relative_difference", "smoothness"}
    assert metrics["ce_loss_with_sae"] > 0
    assert files(sae) == before


def test_a_run_scores_the_same_alone_and_beside_others(options, tmp_path, tiny_gemma3, text, capsys) -> None:
    run = write_run(tmp_path / "run", tiny_gemma3)
    assert main([str(run), "--tokens", "512", "--ce-sequences", "2"]) == 0
    alone = json.loads((run / "eval.json").read_text())
    before = files(run)
    sources = [run, write_saelens(tmp_path / "theirs"), write_dictionary_learning(tmp_path / "dict")]
    capsys.readouterr()
    out = tmp_path / "out.json"
    assert main([*map(str, sources), "--tokens", "512", "--ce-sequences", "2", "--out", str(out)]) == 0
    metrics = json.loads(out.read_text())
    assert list(metrics) == ["run", "theirs", "dict"]
    assert metrics["run"] == alone
    assert len({m["explained_variance"] for m in metrics.values()}) == 3
    table = capsys.readouterr().out
    assert "layer 1" in table
    for name in metrics:
        assert name in table
    assert files(run) == before
    # Two that share a name are listed by their full paths.
    (tmp_path / "other").mkdir()
    twin = write_saelens(tmp_path / "other" / "theirs")
    assert main([str(sources[1]), str(twin), *options, "--out", str(out)]) == 0
    assert list(json.loads(out.read_text())) == [str(sources[1]), str(twin)]


def test_the_language_model_runs_once_for_all(options, tmp_path, monkeypatch) -> None:
    calls = []
    real = tsae.data.harvest.activations
    monkeypatch.setattr(tsae.data.harvest, "activations", lambda *args: calls.append(1) or real(*args))
    sources = [write_saelens(tmp_path / "a"), write_saelens(tmp_path / "b", scale=0.5)]
    assert main([*map(str, sources), *options]) == 0
    assert len(calls) == 1  # 4 sequences, one batch


@pytest.mark.usefixtures("no_forward")
def test_a_width_that_does_not_fit_is_found_before_any_forward_pass_of_text(
    options, tmp_path, tiny_gemma3, capsys
) -> None:
    sources = [write_saelens(tmp_path / "right"), write_saelens(tmp_path / "wrong", d_in=20)]
    assert main([*map(str, sources), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "autoencoder wrong takes activations of width 20" in error
    assert "put out 32" in error
    run = write_run(tmp_path / "run", tiny_gemma3, d_in=20)
    before = files(run)
    assert main([str(run)]) == 2
    assert "width 20" in capsys.readouterr().err
    assert files(run) == before


def test_short_text_is_used_completely(options, tmp_path, capsys) -> None:
    """An autoencoder that is not a run does not say what it was trained on; one passage has no evaluation side."""
    (tmp_path / "short.txt").write_text(sample_text(300, seed=5))
    sae = write_saelens(tmp_path / "theirs")
    assert main([str(sae), *options, "--data", str(tmp_path / "short.txt")]) == 0
    assert "short.txt" in capsys.readouterr().out.replace("\n", "")  # a long path is wrapped


def test_runs_of_different_text(tmp_path, tiny_gemma3, monkeypatch, capsys) -> None:
    """They are compared on text on the evaluation side of all their splits."""
    runs = [write_run(tmp_path / name, tiny_gemma3) for name in ("a", "b")]
    config = json.loads((runs[1] / "config.json").read_text())
    config["text"]["evaluation_share"] = 0.3
    (runs[1] / "config.json").write_text(json.dumps(config))
    assert main([*map(str, runs)]) == 2
    assert "different text; name the text to compare them on" in capsys.readouterr().err
    seen = []
    real = tsae.evaluation.held_out.open_text
    seen_by = lambda *a, **k: seen.append(k["config"].threshold) or real(*a, **k)  # noqa: E731
    monkeypatch.setattr(tsae.evaluation.held_out, "open_text", seen_by)
    assert main([*map(str, runs), "--data", str(tmp_path / "text.txt")]) == 0
    assert seen == [0.05]


def test_one_that_is_not_finite_does_not_lose_the_others(options, tmp_path, capsys) -> None:
    good, bad = write_saelens(tmp_path / "good"), write_saelens(tmp_path / "bad", scale=math.nan)
    assert main([str(good), str(bad), *options]) == 0
    out = capsys.readouterr().out
    assert "bad: The metric" in out
    assert main([str(bad), *options]) == 2
    assert "is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No autoencoder is named"),
        (["theirs"], "is not a run directory (it has no config.json)"),
        (["theirs", "--layer", "1"], "name it with --model"),
        (["theirs", "theirs", "--model", "MODEL", "--layer", "1"], "named twice"),
        (["theirs", "--model", "MODEL", "--layer", "9"], "layer 9 does not exist"),
        (["theirs", "--model", "MODEL", "--layer", "1", "--tokens", "0"], "--tokens is 0"),
        (["theirs", "--model", "MODEL", "--layer", "1", "--format", "saebench"], "needs --out FILE"),
        (["theirs", "run", "--format", "saebench"], "name them one by one"),
        (["text.txt", "--model", "MODEL", "--layer", "1"], "no autoencoder in a known format"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, tiny_gemma3, monkeypatch, capsys) -> None:
    write_saelens(tmp_path / "theirs")
    write_run(tmp_path / "run", tiny_gemma3)
    monkeypatch.chdir(tmp_path)
    arguments = [str(tiny_gemma3) if a == "MODEL" else a for a in arguments]
    assert main([*arguments, *(["--tokens", "128"] if "--format" in arguments else [])]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_saebench_file_of_a_run(tmp_path, tiny_gemma3, text) -> None:
    """Its figures are those of eval.json under SAEBench's names; tests/peers checks the form against the schema."""
    run = write_run(tmp_path / "run", tiny_gemma3)
    assert main([str(run), "--format", "saebench"]) == 0
    metrics = json.loads((run / "eval.json").read_text())
    core = json.loads((run / "saebench_core.json").read_text())
    result = core["eval_result_metrics"]
    assert result["sparsity"]["l0"] == metrics["l0"]
    assert result["reconstruction_quality"]["explained_variance"] == metrics["explained_variance_saebench"]
    behaviour = result["model_behavior_preservation"]
    kl = behaviour["kl_div_with_ablation"], behaviour["kl_div_with_sae"]
    assert 1 - kl[1] / kl[0] == pytest.approx(metrics["kl_div_score"])
    assert result["shrinkage"]["l2_norm_out"] > 0
    assert core["eval_result_unstructured"]["tsae"] == metrics
    details = core["eval_result_details"]
    assert [feature["index"] for feature in details] == list(range(D_SAE))
    assert sum(feature["feature_density"] for feature in details) == pytest.approx(metrics["l0"])
    assert all(1 <= f["consistent_activation_heuristic"] <= 128 for f in details if f["feature_density"])
    out = tmp_path / "theirs.json"
    sae, options = write_saelens(tmp_path / "theirs"), ["--model", str(tiny_gemma3), "--layer", "1", "--tokens", "256"]
    assert main([str(sae), *options, "--data", str(text), "--format", "saebench", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["sae_lens_id"] == "theirs"


def test_divergence_of_identical_predictions_is_zero() -> None:
    metrics, logits = LanguageModelMetrics(), torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    tokens, segments = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int32)
    metrics.update("with_sae", logits, tokens, segments, logits)
    metrics.update("with_ablation", torch.zeros_like(logits), tokens, segments, logits)
    assert metrics.divergence("with_sae") == pytest.approx(0, abs=1e-6)
    p = logits[:, 1:4].double().log_softmax(-1)
    assert metrics.divergence("with_ablation") == pytest.approx(float((p.exp() * (p + math.log(7))).sum(-1).mean()))
