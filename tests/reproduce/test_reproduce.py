"""The papers' experiments on a tiny model: both inputs, the quoted figures, the score of zero, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import sample_text

import tsae.reproduce.papers
import tsae.training.run
import tsae.training.trainer
from tsae.config import EvaluationConfig, SAEConfig
from tsae.data.sequences import TokenBatch
from tsae.errors import UserError
from tsae.evaluate import evaluate
from tsae.lm.hooks import activations
from tsae.lm.loading import load_language_model
from tsae.presets import preset
from tsae.reproduce.__main__ import main
from tsae.reproduce.papers import PAPERS, configurations
from tsae.reproduce.results import explained_variance
from tsae.sae.model import SparseAutoencoder

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(sample_text(60_000))
    return path


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small evaluation, and no reports of single runs, which other tests cover."""
    monkeypatch.setattr(tsae.training.run, "write_report", lambda directory: None)
    small = EvaluationConfig(sequences=8, ce_sequences=2)
    monkeypatch.setattr(tsae.reproduce.papers, "EvaluationConfig", lambda **_: small)


def options(model: Path, text: Path, out: Path) -> list[str]:
    return f"--model {model} --layer 1 --data {text} --steps 4 --d-sae 24 --device cpu --out {out}".split()


def break_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with a large window coefficient diverge at step 3."""
    real = tsae.training.trainer.objective

    def broken(inputs: Any, step: int, cfg: Any) -> Any:
        terms = real(inputs, step, cfg)
        bad = cfg.temporal == "window" and cfg.window_weight == 0.1 and step == 2
        return terms._replace(temporal=torch.tensor(float("nan"))) if bad else terms

    monkeypatch.setattr(tsae.training.trainer, "objective", broken)


def test_tcsae_ends_with_table_and_figure(
    tiny_neox: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_runs(monkeypatch)
    out = tmp_path / "out"
    assert main(["tcsae", *options(tiny_neox, text, out)]) == 0
    results = json.loads((out / "results.json").read_text())
    rows = {row["run"]: row for row in results["rows"]}
    assert list(rows) == ["run0", "run1", "run2", "run3", "run4"]
    assert (results["steps"], results["sequences_per_step"], results["d_sae"]) == (4, 32, 24)

    # The papers' figures are as quoted, and null if not given.
    assert rows["run0"]["paper"]["explained_variance"] == -0.785
    assert (rows["run1"]["paper"]["steps"], rows["run1"]["paper"]["explained_variance"]) == (0, None)
    assert rows["run2"]["paper"]["l0"] == rows["run3"]["paper"]["l0"] == 249.06
    assert rows["run4"]["paper"]["relative_reconstruction_bias"] == 92.64
    assert rows["run4"]["paper"]["cossim"] is None

    # Ours come from the runs' evaluations; a diverged run has its steps and the loss term.
    for name, row in rows.items():
        for given in ("literal", "fixed"):
            ours, run = row[given], out / f"{name}-{given}"
            if name in ("run1", "run2"):
                assert (ours["steps"], ours["explained_variance"]) == (2, None)
                assert "step 3: the temporal term of the loss is nan" in ours["error"]
            else:
                metrics = json.loads((run / "eval.json").read_text())
                assert all(ours[key] == metrics[key] for key in ("explained_variance", "l0", "ce_loss_score"))
                assert (ours["steps"], ours["error"]) == (4, None)
                assert ours["explained_variance_with_bos"] < 1
            config = json.loads((run / "config.json").read_text())
            assert (config["normalize"], config["autocast"]) == (given == "fixed", "none")

    table = (out / "results.md").read_text()
    content = results["zero_output"]["content"]["zero_output"]
    assert f"EV = -|mean|^2 / Var = {content:.3f}" in table
    assert "| run0 | paper | -0.785 | – | -0.586 | – | – | 0.0 | 0.0 | – | – | – | – |" in table
    assert "| run1 | paper | – | – | – | – | – | – | – | – | – | – | 0 |" in table
    assert "|  | literal | – | – | – | – | – | – | – | – | – | – | 2 (stopped) |" in table
    assert results["rows"][0]["fixed"]["temporal.support_bits"] is None  # gelu has values below 0
    assert "run2, fixed: Training stopped at step 3" in table
    assert (out / "figure1.png").read_bytes().startswith(PNG)
    assert "92.64" in capsys.readouterr().out

    before = {name: (out / name).read_bytes() for name in ("figure1.png", "sweep.json")}
    assert main(["tcsae", "--resume", str(out)]) == 0
    assert before == {name: (out / name).read_bytes() for name in before}
    assert main(["tsae", "--resume", str(out)]) == 2
    assert "does not hold the experiments of tsae" in capsys.readouterr().err


def test_tsae_runs_every_variant(tiny_gemma2: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["tsae", *options(tiny_gemma2, text, out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert len(results["rows"]) == 9
    assert all(row[given]["steps"] == 4 for row in results["rows"] for given in ("literal", "fixed"))
    assert results["rows"][0]["paper"]["mse"] == 47.25
    assert (out / "figure1.png").exists()


def test_the_papers_own_models_have_the_papers_settings() -> None:
    for paper in PAPERS.values():
        own = preset(paper.preset)
        for name, cfg in configurations(paper, model=own.model).items():
            cfg.check()
            for key in ("model", "layer", "data", "steps", "batch", "text", "buffer"):
                assert getattr(cfg, key) == getattr(own, key), (name, key)
            assert cfg.sae.d_sae == own.sae.d_sae
            assert (cfg.optimizer.lr, cfg.objective.l1) == (own.optimizer.lr, own.objective.l1)
    cfg = configurations(PAPERS["tcsae"], model="EleutherAI/pythia-70m")["run3-fixed"]
    own = preset("tcsae-pythia-70m")
    assert (cfg.sae, cfg.objective, cfg.optimizer) == (own.sae, own.objective, own.optimizer)
    cfg = configurations(PAPERS["tsae"], model="google/gemma-2-2b")["no-layer-norm-fixed"]
    own = preset("tsae-gemma-2-2b")
    assert (cfg.sae, cfg.objective, cfg.optimizer) == (own.sae, own.objective, own.optimizer)
    with pytest.raises(UserError, match="--layer"):
        configurations(PAPERS["tsae"], model="some/other")


@pytest.mark.parametrize("name", PAPERS)
def test_every_experiment_differs_from_every_other(name: str) -> None:
    cfgs = list(configurations(PAPERS[name], model="gemma-3-270m").values())
    assert all(a != b for i, a in enumerate(cfgs) for b in cfgs[:i])


def test_explained_variance_with_and_without_bos(tiny_neox: Path) -> None:
    lm = load_language_model(str(tiny_neox), dtype="float32")
    tokens = torch.randint(5, 300, (5, 33), generator=torch.Generator().manual_seed(0))
    segments = torch.zeros(5, 32, dtype=torch.int32)
    segments[2, 20:] = -1
    sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=24, activation="relu"), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens, segments)
    got = explained_variance({"a": sae}, lm, batch.split(2), 1)
    x = activations(lm, tokens, 1)
    content = x[:, 1:][segments >= 0]
    for name, part in (("content", content), ("with_bos", torch.cat([content, x[:, 0]]))):
        mean = part.double().mean(0)
        spread = (part.double() - mean).square().sum()
        zero = 1 - part.double().square().sum() / spread
        assert got[name]["zero_output"] == pytest.approx(float(zero), rel=1e-9)
        assert got[name]["mean_norm"] == pytest.approx(float(mean.norm()), rel=1e-9)
        explained = 1 - (part - sae(part).detach()).double().square().sum() / spread
        assert got[name]["runs"]["a"] == pytest.approx(float(explained), rel=1e-5)
    metrics = evaluate(sae, lm, [batch], layer=1, ce_sequences=0).metrics
    assert got["content"]["runs"]["a"] == pytest.approx(metrics["explained_variance"], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["nosuch"], "nosuch"),
        (["tsae", "--steps", "0"], "--steps is 0"),
        (["tsae", "--model", "some/other"], "name it with --layer"),
        (["tsae", "--model", "/no/such", "--layer", "3"], "/no/such"),
        (["tsae", "--resume", "/no/such"], "holds nothing to resume"),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    where = [] if "--resume" in more else ["--out", str(out)]
    assert main([*more, *where]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()
