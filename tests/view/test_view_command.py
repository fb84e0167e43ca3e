"""`python -m tsae.view` on a run of the main job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import options

from tsae.train import main as train
from tsae.view.__main__ import main


@pytest.fixture(scope="module")
def run(tiny_gemma2: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("view") / "run"
    assert train(options(tiny_gemma2, text_file, out)) == 0
    return out


def content(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])


def test_the_page_of_a_run_shows_what_its_evaluation_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert "view.html" in capsys.readouterr().err
    shown = content(run / "view.html")
    evaluation = json.loads((run / "eval.json").read_text())
    assert shown["evaluation"] == {"metrics": evaluation, "text": None}
    expected = 10 ** load_file(run / "sae" / "sparsity.safetensors")["sparsity"].double()  # of the same text
    assert shown["features"]["density"] == pytest.approx(expected.where(expected > 1e-9, 0).tolist(), rel=1e-3)
    lag1 = [value for value in shown["features"]["autocorrelation"][0] if value is not None]
    assert sum(lag1) / len(lag1) == pytest.approx(evaluation["temporal"]["autocorrelation"]["1"], abs=1e-3)
    assert shown["features"]["threshold"] is not None
    assert {"reconstruction", "explained_variance", "l0"} <= shown["history"].keys()
    said = "".join(shown["texts"])
    assert "river" in said or "ri" in said
    assert str(run.parent) not in json.dumps(shown["run"])  # the author's folders are private


def test_how_much_text_and_where_to(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main([str(run), "--tokens", "200", "--out", str(out)]) == 0
    assert len(content(out)["rows"]) == 2  # of 128 tokens
    assert list(tmp_path.iterdir()) == [out]


def test_at_another_length(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    lags = {2: [1], 32: [1, 2, 4, 8, 16], 300: [1, 2, 4, 8, 16, 32, 64, 128]}
    for length, expected in lags.items():
        assert main([str(run), "--length", str(length), "--tokens", "900", "--out", str(out)]) == 0
        shown = content(out)
        assert len(shown["rows"]) == -(-900 // length)
        assert [lag for lag in shown["lags"] if lag <= 64] == [lag for lag in expected if lag <= 64]
        assert set(shown["lags"]) <= set(expected)  # a longer one only if a document is as long
        assert len(shown["features"]["autocorrelation"]) == len(shown["lags"])
        assert len(shown["features"]["band_autocorrelation"]) == len(shown["bands"])
        facts = dict(shown["run"]["facts"])
        assert facts["text on this page"].endswith(f"in sequences of {length}")
        assert "6,144 tokens in 12 steps" in facts["trained on"]  # the run's own: 12 steps of 4 x 128


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}/none"], "no run directory"),
        (["{run}", "--tokens", "0"], "--tokens is 0"),
        (["{run}", "--length", "1"], "length is 1; it must be from 2 to 4096"),
        (["{run}", "--length", "600"], "takes at most 512 tokens"),
        (["{run}", "--out", "{tmp}/none/page.html"], "no directory"),
        (["{tmp}/sweep"], "a sweep's directory"),
        (["{tmp}/untrained"], "no trained autoencoder"),
        (["{run}", "--tokns", "5"], "--tokns"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "config.json").write_text((run / "config.json").read_text())
    before = sorted(tmp_path.rglob("*"))
    assert main([a.format(run=run, tmp=tmp_path) for a in arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert sentence in error[0]
    assert sorted(tmp_path.rglob("*")) == before
